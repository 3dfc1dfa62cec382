"""Records of measurements: one JSON line for each, with everything that determines its numbers."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from filelock import FileLock

from ddim.errors import UserError

Record = dict[str, Any]
RECORDS = "records.jsonl"  # the name of the file in a folder of results
PACKAGES = ("ddim", "torch", "torchvision", "lightning", "torch-fidelity", "numpy")


class RecordFile:
    """An append-only file of records; several processes may append to it.

    Args:
        path: of the .jsonl file. The first record creates it and its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """Return all records, oldest first; [] if there is no file.

        A last line without a newline was cut short by a kill and is left out: its evaluation is computed again.

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
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a+b") as file:
            file.truncate(self.path.read_bytes().rfind(b"\n") + 1)  # drops a last line that a kill cut short
            file.write(json.dumps(record, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def record_key(content: dict[str, Any]) -> str:
    """Return the key of a result: 16 hexadecimal digits of the hash of everything that determines it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Return the code revision and the versions behind a result."""
    return {
        "revision": code_revision(),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }


def code_revision(module: Path = Path(__file__)) -> str:
    """Return the commit of the checkout that holds `module`, with "+changes" if it was edited, or "unknown"."""
    folder = module.resolve().parent
    try:
        _git(folder, "ls-files", "--error-unmatch", module.name)  # fails if the checkout is that of another project
        revision = _git(folder, "rev-parse", "HEAD")
        # A run writes its results into the checkout too, so only tracked files count as edits.
        return revision + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
