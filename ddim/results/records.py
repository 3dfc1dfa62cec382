"""One JSON line for each number, with everything that decided it."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from ddim.errors import UserError

Record = dict[str, Any]
RECORDS = "records.jsonl"  # the name of the file in a folder of results
PACKAGES = ("ddim", "torch", "torchvision", "lightning", "torch-fidelity", "numpy")


class RecordFile:
    """An append-only file of records; several processes may append to it.

    Args:
        path: of the .jsonl file; made, with its folder, when the first record comes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """Return all records, oldest first; [] when there is no file.

        A last line without its newline was cut short by a kill and is left out: its cell is computed again.

        Raises:
            UserError: another line is not JSON.
        """
        if not self.path.exists():
            return []
        records = []
        *lines, _ = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{self.path}, line {number}, is damaged ({error}); delete that line.") from error
        return records

    def find(self, key: str) -> Record | None:
        """Return the record with this key, or None."""
        return next((record for record in self.read() if record["key"] == key), None)

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _drop_unfinished_line(self.path, file)
            file.write(json.dumps(record, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _drop_unfinished_line(path: Path, file: Any) -> None:
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)


def record_key(identity: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that stand for everything that decides a result."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Return the code revision and the versions behind a result."""
    return {
        "revision": code_revision(),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def code_revision() -> str:
    """Return the commit of the checkout this package lies in, "+changes" if it was edited, or "unknown"."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # else it is the checkout of something else
        revision = _git(here, "rev-parse", "HEAD")
        # The results a run writes lie in the checkout too; only tracked files count as edits.
        return revision + ("+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
