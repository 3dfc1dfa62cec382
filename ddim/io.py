"""Atomic file writes; files of tensors, read without executing anything in them."""

import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddim.errors import UserError

Tensors = dict[str, Tensor]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a name to write to, in the folder of `path`, which is made; `path` then appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}_{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_torch(path: Path, on_disk: bool = False) -> Any:
    """Return what `torch.save` wrote, tensors on the CPU.

    Args:
        path: of the file.
        on_disk: leave the tensors of a zip archive on the disk until they are used. Not for a file that something may
            write to meanwhile: reading the rest would kill the process.

    Raises:
        UserError: no such file, one that needs code to load, or one that is damaged or of another kind.
    """
    _check_is_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what makes it stumble, which is said below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk and _is_plain_archive(path))
    except Exception as error:  # whatever the bytes of a damaged or foreign file make the reader stumble over
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} cannot be read as a checkpoint: it needs code to load ({code[1]}), and code in a file can do "
                "anything; nothing was run. Ask for a file of tensors alone, such as safetensors."
            ) from error
        raise _unreadable(path, error) from error


def shown(name: object) -> str:
    """Return a name out of somebody else's file as it is, or in quotes if it is not for the eye."""
    return str(name) if str(name).isprintable() else repr(name)


def _is_plain_archive(path: Path) -> bool:
    """Whether a file is an archive whose bytes are those of its tensors: one that was packed again is compressed."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


@contextmanager
def explain_read_errors(path: str | Path) -> Iterator[None]:
    """Turn whatever the content of somebody else's file makes the block stumble over into one sentence.

    Raises:
        UserError: the block raised something.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise UserError(f"{path} is not understood; it is damaged, or not what it looks like ({reason}).") from error


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Say in one sentence why a file cannot be written.

    Raises:
        UserError: it cannot.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise UserError(f"cannot write {path} ({reason}); choose another out=...") from error


def check_target(path: Path, overwrite: bool) -> None:
    """Do nothing for a file that may be written.

    Raises:
        UserError: it is there already and shall not be replaced, or a folder has its name.
    """
    with explain_write_errors(path):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; choose another out=..., or overwrite=true to replace it.")
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the path of a file, out=...")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like one of safetensors: the length of a header, then its JSON."""
    _check_is_file(path)
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors of a safetensors file, on the disk until they are used, and the metadata of its header.

    Raises:
        UserError: no such file, or a damaged one.
    """
    _check_is_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata. Readers of PyTorch's want `format: pt` there, and get it.

    Raises:
        OSError: the file cannot be written.
    """
    own: Tensors = {}
    storages = set()
    for name, value in tensors.items():
        shared = value.untyped_storage().data_ptr() in storages
        own[name] = (
            value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
        )  # the format has no place for sharing
        storages.add(own[name].untyped_storage().data_ptr())
    with atomic_write(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(own, partial, {"format": "pt", **metadata})
        except SafetensorError as error:
            if (code := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        partial.chmod(mode)  # by itself the library makes files that only their owner can read


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}; give the path of a file that exists, such as one that scripts/train.py "
            "or scripts/import_checkpoint.py wrote."
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__
    return UserError(f"{path} cannot be read as a checkpoint: it is cut short, damaged or of another kind ({reason}).")
