"""Atomic file writes; reading and writing files of tensors, without executing anything in them."""

import logging
import os
import re
import secrets
import stat
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

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]
PARTIAL = re.compile(r"\.([0-9a-f]{16}|\d+)_.+")  # earlier versions used the number of the process
MAX_UNFOLDED = 1 << 28  # bytes; a zip archive may unfold to more if it is not small itself
NOT_REGULAR = {
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def check_regular_file(path: Path, what: str) -> None:
    """Check, without opening it, that a path leads to a regular file: a fifo or a device could be read for ever.

    A path that does not exist passes; whoever opens it has the better message.

    Args:
        path: symbolic links are followed.
        what: the file should be, for the message, such as "checkpoint".

    Raises:
        UserError: it is a folder, fifo, socket or device.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError):  # missing, not permitted, or no path at all: opening it fails in the same way
        return
    if kind in NOT_REGULAR:
        raise UserError(f"the {what} {path} is a {NOT_REGULAR[kind]}, not a regular file; give the path of a file.")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; when the block ends without an error, it is renamed to `path`.

    Missing parent folders are created. Readers see the old file or the complete new one, never a part of it, also
    after a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, so that nobody can have put a link of that name there, which writing would follow.
    partial = path.with_name(f".{secrets.token_hex(8)}_{path.name}")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        try:
            _sync(path.parent)
        except OSError as error:  # some file systems on the network cannot do this with folders
            log.debug("%s cannot be synced (%s)", path.parent, error)
    finally:
        partial.unlink(missing_ok=True)


def partial_files(folder: Path) -> list[Path]:
    """Return the temporary files of `atomic_write` in a folder: of writes that are going on, or that were killed."""
    return [path for path in folder.glob(".*") if PARTIAL.fullmatch(path.name)]


def read_torch(path: Path, mmap: bool = False) -> Any:
    """Load a file that `torch.save` wrote, with `weights_only=True`, onto the CPU.

    Args:
        path: of the file.
        mmap: read tensors from the disk only when they are used. Not for a file that another process may overwrite
            meanwhile: the next access would crash this process.

    Raises:
        UserError: the file does not exist, is damaged, is of another kind, or needs code to load.
    """
    _check_is_file(path)
    try:
        uncompressed = _check_zip(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about files that it then refuses
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and uncompressed)
    except Exception as error:  # a damaged or unknown file can make the reader raise anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} cannot be read as a checkpoint: it needs code to load ({code[1]}), and code in a file can do "
                "anything; nothing was run. Ask for a file of tensors only, such as safetensors."
            ) from error
        raise _unreadable(path, error) from error


def explain_content(path: Path) -> str:
    """Return what a file is that was meant to be an image or a checkpoint, by its first bytes; "" if it is unknown."""
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()  # a byte order mark and blanks
    except OSError:
        return ""
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "it is a web page, so its download failed: download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself: run git lfs pull where it is from"
    return ""


def printable(name: object) -> str:
    """Return a name from an untrusted file as text; names with control characters are quoted and escaped."""
    text = str(name)
    return text if text.isprintable() else repr(text)


@contextmanager
def explain_read_errors(path: str | Path) -> Iterator[None]:
    """Turn any exception that the content of an unknown file causes in the block into a UserError of one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise UserError(f"{path} is not understood; it is damaged or of another kind ({reason}).") from error


@contextmanager
def explain_write_errors(path: Path, key: str = "output_dir") -> Iterator[None]:
    """Turn a failed write in the block into a UserError that gives the reason, and the key that names another place."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise UserError(f"cannot write {path} ({reason}); choose another {key}=...") from error


def check_can_write(path: Path, overwrite: bool, key: str = "output_dir") -> None:
    """Check that a file may be written; `key` names another place in the message.

    Raises:
        UserError: the file exists and must not be overwritten, or the path is a folder.
    """
    with explain_write_errors(path, key):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; choose another {key}=..., or overwrite=true to replace it.")
        if path.is_dir():
            raise UserError(f"{path} is a folder, not a file; remove it, or choose another {key}=...")


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: the length of the header (8 bytes), then its JSON."""
    _check_is_file(path)
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Return the tensors of a safetensors file (memory-mapped) and the metadata in its header.

    Raises:
        UserError: the file does not exist or is damaged.
    """
    _check_is_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise _unreadable(path, error) from error


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; `format: pt`, which diffusers requires, is added to the metadata.

    Raises:
        OSError: the file cannot be written.
    """
    unshared: Tensors = {}
    storages = set()
    for name, value in tensors.items():  # the format cannot express tensors that share memory: copy them
        shared = value.untyped_storage().data_ptr() in storages
        unshared[name] = value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
        storages.add(unshared[name].untyped_storage().data_ptr())
    with atomic_write(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(unshared, partial, {"format": "pt", **metadata})
        except SafetensorError as error:
            if (code := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        partial.chmod(mode)  # safetensors creates files that only their owner can read


def _sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_zip(path: Path) -> bool:
    """Return whether a file is a zip archive that can be memory-mapped; repacked archives are often compressed.

    Raises:
        ValueError: the archive would take far more memory than its size on the disk.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    unfolded = sum(entry.file_size for entry in entries)
    if unfolded > max(MAX_UNFOLDED, 10 * path.stat().st_size):  # compressed weights take about 0.9 of their size
        raise ValueError(f"its {path.stat().st_size:,} bytes unfold to {unfolded:,}")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        if not path.is_dir():
            check_regular_file(path, "checkpoint")
        if (last := path / "checkpoints" / "last.ckpt").is_file():
            raise UserError(f"{path} is the folder of a training, not a checkpoint; its newest one is {last}.")
        raise UserError(
            f"there is no checkpoint {path}; give the path of a file that exists, such as one that scripts/train.py "
            "or scripts/import_checkpoint.py wrote."
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    if content := explain_content(path):
        return UserError(f"{path} cannot be read as a checkpoint: {content}.")
    reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__
    return UserError(f"{path} cannot be read as a checkpoint: it is cut short, damaged or of another kind ({reason}).")
