"""The file of records loses nothing when several processes append and when one is killed."""

import copy
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ddim.errors import UserError
from ddim.results import records as module
from ddim.results.records import PACKAGES, RecordFile, provenance, record_key, revision_of

CONTENT = {
    "model": {"weights": "ema", "weights_hash": "abc", "step": 4, "T": 1000},
    "sampler": {"rule": "ddim", "eta": 0.0, "tau": [1, 500, 1000]},
    "n": 50,
    "bf16": False,
    "reference": {"name": "digits", "images": 1797},
}


def test_records_are_read_in_order(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "new" / "folder" / "records.jsonl")
    assert file.read() == []
    written = [{"key": str(i), "value": i / 3, "tau": [1, 2], "label": "σ̂", "none": None} for i in range(3)]
    for record in written:
        file.append(record)
    assert file.read() == written
    assert file.find("1") == written[1]
    assert file.find("7") is None
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == written


@pytest.mark.parametrize("cut", ['{"key": "b", "va', '{"key": "b"}', "\xff"])
def test_unfinished_last_line_is_overwritten(tmp_path: Path, cut: str) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append({"key": "a"})
    with file.path.open("ab") as unfinished:
        unfinished.write(cut.encode("latin-1"))
    assert file.read() == [{"key": "a"}]
    file.append({"key": "c"})
    assert file.read() == [{"key": "a"}, {"key": "c"}]
    assert file.path.read_text() == '{"key": "a"}\n{"key": "c"}\n'


def test_what_could_not_be_read_back_is_not_added(tmp_path: Path) -> None:
    def check(record: dict[str, Any]) -> None:
        if record["tau"] != [1, 2]:
            raise ValueError("it has another tau")

    file = RecordFile(tmp_path / "records.jsonl", check)
    file.append({"tau": (1, 2)})  # as it is read: a list
    with pytest.raises(ValueError, match="another tau"):
        file.append({"tau": [1, 3]})
    assert file.read() == [{"tau": [1, 2]}]


NO_RECORDS = [b'{"key": "b"', b"\xff\xfe", b"5", b"[]", b"null", bytes(20), b"[" * 100_000, b"{" * 100_000]


@pytest.mark.parametrize("damage", NO_RECORDS, ids=lambda damage: repr(damage[:10]))
@pytest.mark.parametrize("after", [b"", b'{"key": "c"}\n'])
def test_damaged_line_is_reported_with_its_number(tmp_path: Path, damage: bytes, after: bytes) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.path.write_bytes(b'{"key": "a"}\n' + damage + b"\n" + after)
    with pytest.raises(UserError, match=r"records\.jsonl, line 2, is damaged .*delete that line\.$") as caught:
        file.read()
    assert "\n" not in str(caught.value)


def test_lookups_parse_each_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the whole file for each evaluation."""
    file, other, parsed = RecordFile(tmp_path / "a.jsonl"), RecordFile(tmp_path / "a.jsonl"), []
    for i in range(100):
        other.append({"key": str(i), "value": i})
    loads = json.loads
    monkeypatch.setattr(module.json, "loads", lambda line, **options: (parsed.append(line), loads(line, **options))[1])
    assert [file.find(key) for key in ("40", "x", "99")] == [
        {"key": "40", "value": 40},
        None,
        {"key": "99", "value": 99},
    ]
    assert len(parsed) == 100 + 2  # and those that were looked up
    other.append({"key": "100"})  # as by another process
    other.append({"key": "40", "value": "of a later line"})
    assert (file.find("100"), file.find("40")) == ({"key": "100"}, {"key": "40", "value": 40})
    assert len(parsed) == 100 + 2 + 2 + 2


@pytest.mark.parametrize("change", ["edited", "replaced", "deleted"])
def test_a_file_that_was_edited_is_read_again(tmp_path: Path, change: str) -> None:
    file = RecordFile(tmp_path / "a.jsonl")
    for key in "abc":
        file.append({"key": key})
    assert file.find("c") == {"key": "c"}
    lines = file.path.read_text().splitlines(keepends=True)
    if change == "replaced":  # by a file of another inode that is not shorter
        (tmp_path / "new").write_text(lines[0] + lines[2] + '{"key": "d", "longer": true}\n')
        (tmp_path / "new").replace(file.path)
    elif change == "edited":
        file.path.write_text(lines[0] + lines[2])
    else:
        file.path.unlink()
    assert file.find("b") is None
    assert file.find("c") == (None if change == "deleted" else {"key": "c"})


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE", 100)
    file = RecordFile(tmp_path / "a.jsonl")
    file.append({"key": "a"})
    with file.path.open("ab") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(UserError, match="line 2, is longer than 100 bytes"):
        file.read()


@pytest.mark.parametrize("use", [RecordFile.read, lambda file: file.find("a"), lambda file: file.append({"key": "a"})])
def test_a_fifo_is_no_file_of_records(tmp_path: Path, use: Callable[[RecordFile], object]) -> None:
    os.mkfifo(tmp_path / "records.jsonl")
    with pytest.raises(UserError, match="is a fifo, not a regular file"):
        use(RecordFile(tmp_path / "records.jsonl"))


def test_append_waits_for_another_append(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    process = multiprocessing.get_context("fork").Process(target=append_many, args=(path, "b", 1))
    with FileLock(tmp_path / ".records.jsonl.lock"), path.open("ab", buffering=0) as file:
        file.write(b'{"key": ')  # a process that does not wait drops this line
        process.start()
        process.join(0.3)
        assert process.is_alive()
        file.write(b'"a"}\n')
    process.join(10)
    assert process.exitcode == 0
    assert [record["key"] for record in RecordFile(path).read()] == ["a", "b0"]


def append_many(path: Path, name: str, count: int) -> None:
    for i in range(count):
        # Longer than any buffer, so a line takes several writes.
        RecordFile(path).append({"key": f"{name}{i}", "filling": name * 50_000})


def test_concurrent_appends_lose_nothing(tmp_path: Path) -> None:
    path, count = tmp_path / "records.jsonl", 40
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=append_many, args=(path, name, count)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    records = RecordFile(path).read()
    assert sorted(r["key"] for r in records) == sorted(f"{name}{i}" for name in "ab" for i in range(count))
    for name in "ab":
        assert [r["key"] for r in records if r["key"][0] == name] == [f"{name}{i}" for i in range(count)]


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if not isinstance(node, dict | list):
        yield path
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from leaves(value, (*path, key))


def reversed_order(node: Any) -> Any:
    return {k: reversed_order(node[k]) for k in reversed(node)} if isinstance(node, dict) else node


def test_key_depends_on_content_only() -> None:
    key = record_key(CONTENT)
    assert len(key) == 16
    assert int(key, 16) >= 0
    assert record_key(reversed_order(CONTENT)) == key
    assert record_key(json.loads(json.dumps(CONTENT))) == key  # as read back from a file


@pytest.mark.parametrize("path", list(leaves(CONTENT)), ids=lambda path: ".".join(map(str, path)))
def test_key_changes_with_every_value(path: tuple[Any, ...]) -> None:
    other = copy.deepcopy(CONTENT)
    node: Any = other
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = "another"
    assert record_key(other) != record_key(CONTENT)


def test_key_changes_with_the_order_of_a_list() -> None:
    assert record_key({"tau": [1, 2]}) != record_key({"tau": [2, 1]})


def test_provenance_has_all_versions() -> None:
    origin = provenance()
    assert set(origin) == {"revision", "versions"}
    assert set(origin["versions"]) == {*PACKAGES, "python"}
    assert origin["versions"]["python"] == platform.python_version()
    assert origin["versions"]["torch"] == importlib.metadata.version("torch")
    json.dumps(origin)


def test_missing_package_has_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    assert provenance()["versions"]["no-such-package"] == "unknown"


def test_the_revision_is_that_of_the_code_in_memory(another_commit: Callable[[], None]) -> None:
    """Whatever is committed, or checked out, while a sweep runs."""
    assert provenance()["revision"] == "a" * 40
    another_commit()
    assert provenance()["revision"] == "a" * 40


def test_revision_is_the_commit_and_marks_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "package" / "records.py"
    file.parent.mkdir()
    file.write_text("1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert revision_of(file) == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40
    assert revision_of(file) == commit
    (tmp_path / "outputs.txt").write_text("a result")
    assert revision_of(file) == commit
    file.write_text("2")
    assert revision_of(file) == commit + "+changes"
