"""A checksum at the end of a training checkpoint, so that damage is noticed before anything is loaded.

`torch.save` writes a zip archive, and `torch.load` does not verify the archive's own checksums. A zip archive may end
in a comment; here the comment is the SHA-256 of all bytes before it (the length field of the comment included).
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

from ddim.errors import UserError

_PREFIX = b"ddim-sha256:"
_LENGTH = len(_PREFIX) + 64  # 64 hexadecimal digits
_BLOCK = 1 << 20  # bytes


def write_checksum(path: Path) -> None:
    """Append the checksum to a zip archive that has no comment, and flush the file to the disk."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the last field of a zip archive is the length of its comment
        file.write(_LENGTH.to_bytes(2, "little"))
        digest = _digest(file, file.tell())
        file.write(_PREFIX + digest)
        file.flush()
        os.fsync(file.fileno())


def has_checksum(path: Path) -> bool:
    """Whether a file ends in a checksum; if it does, the checksum is verified.

    Raises:
        UserError: the checksum does not match the content.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) - _LENGTH
        file.seek(max(size, 0))
        end = file.read()
        if not end.startswith(_PREFIX):
            return False
        if end != _PREFIX + _digest(file, size):
            raise checksum_error(path)
    return True


def checksum_error(path: Path) -> UserError:
    """Return the error for a file whose checksum is wrong or missing."""
    return UserError(
        f"{path} cannot be read as a checkpoint: it is cut short, damaged or of another kind (its checksum is wrong)."
    )


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the SHA-256 of the first `size` bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0:
        block = file.read(min(_BLOCK, size))
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()
