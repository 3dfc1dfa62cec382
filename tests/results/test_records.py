"""The file of records keeps what was appended to it, whoever else appends and wherever a process was killed."""

import copy
import fcntl
import importlib.metadata
import json
import multiprocessing
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddim.errors import UserError
from ddim.results import records
from ddim.results.records import PACKAGES, RecordFile, code_revision, provenance, record_key

IDENTITY = {
    "model": {"weights": "ema", "weights_hash": "abc", "step": 4, "T": 1000},
    "sampler": {"rule": "ddim", "eta": 0.0, "tau": [1, 500, 1000]},
    "n": 50,
    "bf16": False,
    "reference": {"name": "digits", "images": 1797},
}


def test_records_come_back_in_their_order(tmp_path: Path) -> None:
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
def test_a_last_line_that_was_cut_short_is_dropped_and_overwritten(tmp_path: Path, cut: str) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append({"key": "a"})
    with file.path.open("ab") as online:
        online.write(cut.encode("latin-1"))
    assert file.read() == [{"key": "a"}]
    file.append({"key": "c"})
    assert file.read() == [{"key": "a"}, {"key": "c"}]
    assert file.path.read_text() == '{"key": "a"}\n{"key": "c"}\n'


@pytest.mark.parametrize("damage", [b'{"key": "b"', b"\xff\xfe"])
@pytest.mark.parametrize("after", [b"", b'{"key": "c"}\n'])
def test_a_damaged_line_is_one_sentence_with_its_number(tmp_path: Path, damage: bytes, after: bytes) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.path.write_bytes(b'{"key": "a"}\n' + damage + b"\n" + after)
    with pytest.raises(UserError, match=r"records\.jsonl, line 2, is damaged .*delete that line\.$") as caught:
        file.read()
    assert "\n" not in str(caught.value)


def test_an_append_waits_for_one_that_is_under_way(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    process = multiprocessing.get_context("fork").Process(target=append_many, args=(path, "b", 1))
    with path.open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b'{"key": ')  # as long as nobody waits, this is a line to be dropped
        process.start()
        process.join(0.3)
        assert process.is_alive()
        file.write(b'"a"}\n')
        fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough: the process has inherited the file
    process.join(10)
    assert process.exitcode == 0
    assert [record["key"] for record in RecordFile(path).read()] == ["a", "b0"]


def append_many(path: Path, name: str, count: int) -> None:
    for i in range(count):
        # Longer than any buffer, so that a line takes several writes.
        RecordFile(path).append({"key": f"{name}{i}", "filling": name * 50_000})


def test_two_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    path, count = tmp_path / "records.jsonl", 40
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=append_many, args=(path, name, count)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = RecordFile(path).read()
    assert sorted(r["key"] for r in found) == sorted(f"{name}{i}" for name in "ab" for i in range(count))
    for name in "ab":
        assert [r["key"] for r in found if r["key"][0] == name] == [f"{name}{i}" for i in range(count)]


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if not isinstance(node, dict | list):
        yield path
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield from leaves(value, (*path, key))


def reversed_order(node: Any) -> Any:
    return {k: reversed_order(node[k]) for k in reversed(node)} if isinstance(node, dict) else node


def test_a_key_depends_on_content_alone() -> None:
    key = record_key(IDENTITY)
    assert len(key) == 16
    assert int(key, 16) >= 0
    assert record_key(reversed_order(IDENTITY)) == key
    assert record_key(json.loads(json.dumps(IDENTITY))) == key  # as read back from a file


@pytest.mark.parametrize("path", list(leaves(IDENTITY)), ids=lambda path: ".".join(map(str, path)))
def test_a_key_changes_with_every_entry(path: tuple[Any, ...]) -> None:
    other = copy.deepcopy(IDENTITY)
    node: Any = other
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = "another"
    assert record_key(other) != record_key(IDENTITY)


def test_a_key_changes_with_the_order_of_a_list() -> None:
    assert record_key({"tau": [1, 2]}) != record_key({"tau": [2, 1]})


def test_provenance_holds_the_versions_of_what_computed() -> None:
    found = provenance()
    assert set(found) == {"revision", "versions"}
    assert set(found["versions"]) == {*PACKAGES, "python"}
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    json.dumps(found)


def test_a_package_that_is_absent_has_an_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PACKAGES", ("torch", "no-such-package"))
    assert provenance()["versions"]["no-such-package"] == "unknown"


def test_the_revision_is_the_commit_and_says_when_code_was_edited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    module = tmp_path / "package" / "records.py"
    module.parent.mkdir()
    module.write_text("1")
    monkeypatch.setattr(records, "__file__", str(module))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_revision() == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40
    assert code_revision() == commit
    (tmp_path / "outputs.txt").write_text("a result")
    assert code_revision() == commit
    module.write_text("2")
    assert code_revision() == commit + "+changes"
