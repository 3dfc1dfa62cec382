"""Atomic writes: readers see the old file or the complete new one. Tensors of any layout in safetensors files."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import same

from ddim.errors import UserError
from ddim.io import atomic_write, check_regular_file, read_safetensors, write_safetensors


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_write(path) as partial:
        partial.write_text("first")
        assert not path.exists()
        assert partial.parent == path.parent  # a rename is not atomic between file systems
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_write(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old"
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_open_reader_keeps_reading_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with path.open() as reader:
        with atomic_write(path) as partial:
            partial.write_text("new")
        assert reader.read() == "old"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_error_changes_nothing(tmp_path, error, old):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error, match="half way"), atomic_write(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise error("half way")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([] if old is None else [("file.txt", old)])


def test_an_error_before_the_first_write_is_raised_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="in the block"), atomic_write(tmp_path / "file.txt"):
        raise ValueError("in the block")
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.txt", "old")]


def test_a_folder_with_that_name_stays(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="folder"), atomic_write(path) as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert path.is_dir()


def test_temporary_files_of_killed_processes_are_replaced(tmp_path):
    path = tmp_path / "file.txt"
    with atomic_write(path) as partial:
        name = partial.name
        partial.write_text("new")
    (tmp_path / name).write_text("something longer than the new content")
    with atomic_write(path) as partial:
        partial.write_text("newer")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.txt", "newer")]


def test_temporary_files_are_hidden(tmp_path):
    """So that patterns such as *.png do not match them."""
    with atomic_write(tmp_path / "file.txt") as partial:
        assert partial.name.startswith(".")
        partial.write_text("")
    assert not list(tmp_path.glob(".*"))


WRITER = """
import sys
from pathlib import Path
from ddim.io import atomic_write

path, letter, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(times):
    with atomic_write(path) as partial, partial.open("w") as file:
        for _ in range(50):
            file.write(letter * 1000)
            file.flush()
"""


@pytest.mark.integration
def test_two_processes_that_write_at_once_do_not_mix(tmp_path):
    path = tmp_path / "shared.txt"
    arguments = [sys.executable, "-c", WRITER, str(path)]
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


# Files that are none.


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


NOT_FILES = {
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "socket": make_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_only_regular_files_pass(tmp_path, monkeypatch, kind, linked):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path("it")
    NOT_FILES[kind](path)
    if linked:
        (path := Path("link")).symlink_to("it")
    with pytest.raises(UserError, match=rf"^the statistics {path} is a {kind}, not a regular file; [^\n]*\.$"):
        check_regular_file(path, "statistics")


@pytest.mark.parametrize("name", ["file", "link", "missing", "dangling", "file/below", "\0", "n" * 5000])
def test_files_and_what_cannot_be_opened_pass(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    check_regular_file(tmp_path / name, "statistics")


# Tensors.

BASE = torch.arange(24.0).reshape(2, 3, 4)
DTYPES = ("float64", "bfloat16", "float16", "int64", "uint8", "bool")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param({"a": BASE.transpose(0, 2)}, id="transposed"),
        pytest.param({"a": BASE[:, ::2]}, id="strided"),
        pytest.param({"a": BASE[1:]}, id="slice"),
        pytest.param({"a": BASE[:1].expand(2, 3, 4)}, id="expanded"),
        pytest.param({"a": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)}, id="channels_last"),
        pytest.param({"a": BASE.clone().requires_grad_()}, id="gradient"),
        pytest.param({"a": torch.nn.Parameter(BASE)}, id="parameter"),
        pytest.param(dict(zip("ab", BASE.chunk(2), strict=True)), id="chunks"),
        pytest.param({"a": BASE, "b": BASE.transpose(0, 1)}, id="transposed view"),
        pytest.param({"a": torch.tensor(3.0), "b": torch.zeros(0), "c": torch.zeros(2, 0)}, id="empty"),
        pytest.param({n: BASE.to(getattr(torch, n)) for n in DTYPES}, id="types"),
        pytest.param({}, id="none"),
    ],
)
def test_tensors_of_any_layout_survive(path, tensors):
    write_safetensors(path, tensors, {"key": "väl\nue"})
    back, metadata = read_safetensors(path)
    assert same(back, {name: value.detach() for name, value in tensors.items()})
    assert metadata == {"format": "pt", "key": "väl\nue"}


@pytest.mark.parametrize(
    "tensors",
    [{"a": BASE, "b": BASE}, {"a": BASE, "b": BASE.view(-1)}, {"a": BASE[0], "b": BASE.view(-1)[6:]}],
    ids=["same", "view", "overlapping"],
)
def test_tensors_that_share_memory_are_stored_separately(path, tensors):
    write_safetensors(path, tensors, {})
    assert same(read_safetensors(path)[0], tensors)


def test_writing_does_not_change_the_tensors(path):
    tensor = BASE.transpose(0, 2)
    stride = tensor.stride()
    write_safetensors(path, {"a": tensor}, {})
    assert tensor.stride() == stride
    assert torch.equal(BASE, torch.arange(24.0).reshape(2, 3, 4))


def test_a_full_disk_is_an_os_error_that_names_the_file(path):
    """safetensors' own error has neither the file nor the error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_safetensors(path, {"a": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(path)
    assert [*path.parent.iterdir()] == []
