"""A file appears whole or not at all, and whatever was there before stays until then."""

import subprocess
import sys

import pytest

from ddim import io
from ddim.io import atomic_write


def test_the_file_appears_with_its_content_when_the_block_ends(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_write(path) as partial:
        partial.write_text("first")
        assert not path.exists()
        assert partial.parent == path.parent  # a rename is not atomic between file systems
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old"
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_who_reads_the_old_file_goes_on_reading_it(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with path.open() as reader:
        with atomic_write(path) as partial:
            partial.write_text("new")
        assert reader.read() == "old"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_error_leaves_everything_as_it_was(tmp_path, error, old):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error, match="half way"), atomic_write(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise error("half way")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([] if old is None else [("file.txt", old)])


def test_an_error_before_anything_is_written_is_the_one_that_is_seen(tmp_path):
    with pytest.raises(ValueError, match="at once"), atomic_write(tmp_path / "file.txt"):
        raise ValueError("at once")
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.txt", "old")]


def test_a_folder_under_that_name_stays(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="folder"), atomic_write(path) as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert path.is_dir()


def test_the_remains_of_a_killed_process_do_no_harm(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as partial:
        name = partial.name
        partial.write_text("new")
    (tmp_path / name).write_text("something longer than the new content")
    with atomic_write(path) as partial:
        partial.write_text("newer")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.txt", "newer")]


def test_what_is_not_finished_is_hidden(tmp_path):
    """So that no pattern like *.png takes it for a file."""
    with atomic_write(tmp_path / "file.txt") as partial:
        assert partial.name.startswith(".")
        partial.write_text("")
    assert not list(tmp_path.glob(".*"))


CHILD = """
import runpy, sys
from pathlib import Path

whole = runpy.run_path(sys.argv[1])["whole"]  # without the package, whose torch takes seconds
path, letter, times = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(times):
    with whole(path) as partial, partial.open("w") as file:
        for _ in range(50):
            file.write(letter * 1000)
            file.flush()
"""


def test_of_two_processes_that_write_at_the_same_time_each_writes_a_whole_file(tmp_path):
    path = tmp_path / "shared.txt"
    arguments = [sys.executable, "-c", CHILD, io.__file__, str(path)]
    writers = [
        subprocess.Popen([*arguments, letter, "200"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    seen = []
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.append(path.read_text())
    for writer in writers:
        writer.communicate()
    seen.append(path.read_text())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert set(seen) <= {50_000 * "a", 50_000 * "b"}
    assert len(seen) > 1
    assert list(tmp_path.iterdir()) == [path]
