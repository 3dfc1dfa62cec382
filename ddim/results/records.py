"""Records of measurements: one JSON line for each, with everything that determines its numbers."""

import functools
import hashlib
import importlib.metadata
import json
import mmap
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from ddim.errors import UserError
from ddim.io import check_regular_file
from ddim.plugins import imported_plugins

Record = dict[str, Any]
RECORDS = "records.jsonl"  # the name of the file in a folder of results
MAX_LINE = 1 << 24  # bytes of a line
PACKAGES = ("ddim", "torch", "torchvision", "lightning", "torch-fidelity", "numpy")


class RecordFile:
    """An append-only file of records; several processes may append to it.

    Args:
        path: of the .jsonl file. The first record creates it and its folder.
        check: is called with each record that is read or added, and raises ValueError if it is none.
    """

    def __init__(self, path: Path, check: Callable[[Record], None] | None = None) -> None:
        self.path, self.check = path, check
        # What `find` knows: where each record begins (all records of a long file would fill the memory), of which file,
        # and how far it was read, in bytes and lines.
        self._starts: dict[str, int] = {}
        self._inode: int | None = None
        self._end = self._lines = 0

    def read(self) -> list[Record]:
        """Return all records, oldest first; [] if there is no file. Equal mappings in them are one object.

        A last line without a newline was cut short by a kill and is left out: its evaluation is computed again.

        Raises:
            UserError: it is no regular file, or another line is no record.
        """
        return [record for *_, record in self._read_lines(0, 0, _Shared())]

    def find(self, key: str) -> Record | None:
        """Return the first record with this key, or None. Of the file, only lines are read that were not read before.

        Raises:
            UserError: it is no regular file, or a line is no record.
        """
        status = self.path.stat() if self.path.exists() else None
        if status is None or status.st_ino != self._inode or status.st_size < self._end:  # another file, or edited
            self._starts, self._end, self._lines = {}, 0, 0
            self._inode = None if status is None else status.st_ino
        for number, start, end, record in self._read_lines(self._end, self._lines):
            self._lines, self._end = number, end
            self._starts.setdefault(str(record.get("key")), start)
        if key not in self._starts:
            return None
        with self.path.open("rb") as file:
            file.seek(self._starts[key])
            return self._parse(file.readline(), "that is looked up")

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns.

        Raises:
            ValueError: it is none, as `check` says: in the file it would end every later read.
        """
        line = json.dumps(record, sort_keys=True).encode() + b"\n"
        if self.check is not None:
            self.check(json.loads(line))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_regular_file(self.path, "file of records")
        with FileLock(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a+b") as file:
            if file.tell():
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    complete = content.rfind(b"\n") + 1
                file.truncate(complete)  # drops a last line that a kill cut short
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _read_lines(
        self, start: int, number: int, hook: Callable[[Record], Record] | None = None
    ) -> Iterator[tuple[int, int, int, Record]]:
        """Yield (number, start, end, record) of each complete line from byte `start` on; `number` lines are before."""
        check_regular_file(self.path, "file of records")
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(start)
            while (line := file.readline(MAX_LINE)).endswith(b"\n"):
                start, end, number = file.tell() - len(line), file.tell(), number + 1
                if line != b"\n":
                    yield number, start, end, self._parse(line, str(number), hook)
        if len(line) == MAX_LINE:
            raise UserError(f"{self.path}, line {number + 1}, is longer than {MAX_LINE:,} bytes; delete that line.")

    def _parse(self, line: bytes, number: str, hook: Callable[[Record], Record] | None = None) -> Record:
        try:
            record = json.loads(line, object_hook=hook)
            if not isinstance(record, dict):
                raise ValueError("it is no JSON object")
            if self.check is not None:
                self.check(record)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}, line {number}, is damaged ({reason}); delete that line.") from error
        return record


class _Shared(dict[int, Record]):
    """Gives an equal mapping that was read before: most of what records hold is the same in all of them."""

    def __call__(self, read: Record) -> Record:
        other = self.setdefault(hash(repr(read)), read)
        return other if other == read else read


def record_key(content: dict[str, Any]) -> str:
    """Return the key of a result: 16 hexadecimal digits of the hash of everything that determines it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Return the code revision and the versions behind a result."""
    return {
        "revision": code_revision(),
        "versions": {name: _version(name) for name in (*PACKAGES, *imported_plugins())}
        | {"python": platform.python_version()},
    }


@functools.cache
def code_revision() -> str:
    """Return the commit of this code, as `revision_of`; asked once, since the code in memory stays the same."""
    return revision_of(Path(__file__))


def revisions(record: Record) -> list[str]:
    """Return the commits whose code computed a record; usually one."""
    return [revision for revision in (record.get("revision"), *record.get("other_revisions", ())) if revision]


def revision_of(module: Path) -> str:
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
