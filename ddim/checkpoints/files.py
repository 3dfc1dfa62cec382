"""Files of tensors, read without ever executing anything in them, and written whole or not at all."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddim.errors import UserError
from ddim.files import whole

Tensors = dict[str, Tensor]


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
        return torch.load(path, map_location="cpu", weights_only=True, mmap=on_disk and zipfile.is_zipfile(path))
    except Exception as error:  # whatever the bytes of a damaged or foreign file make the reader stumble over
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} cannot be read as a checkpoint: it needs code to load ({code[1]}), and code in a file can do "
                "anything; nothing was run. Ask for a file of tensors alone, such as safetensors."
            ) from error
        raise _unreadable(path, error) from error


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
    """Write tensors and metadata. Readers of PyTorch's want `format: pt` there, and get it."""
    with whole(path) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {"format": "pt", **metadata})


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"there is no checkpoint {path}; give the path of a file that scripts/train.py or "
            "scripts/import_checkpoint.py wrote."
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__
    return UserError(f"{path} cannot be read as a checkpoint: it is cut short, damaged or of another kind ({reason}).")
