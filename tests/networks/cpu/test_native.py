"""C++ beside the code: compiled once, found again, and a compiler that is missing or fails is one sentence."""

import ctypes
import re
import subprocess
import sys

import pytest
import torch

from ddim.errors import UserError
from ddim.networks.cpu import native

pytestmark = pytest.mark.usefixtures("compiler")
SOURCE = 'extern "C" double twice(double x) { return 2 * x; }'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    native.load.cache_clear()
    yield tmp_path / "loop.cpp"
    native.load.cache_clear()


@pytest.fixture
def counted(monkeypatch):
    """The commands that were run."""
    commands, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: commands.append(command) or run(command, **options)
    )
    return commands


def twice(source):
    native.load.cache_clear()  # as another process would
    function = native.load(source).twice
    function.restype = ctypes.c_double
    return function(ctypes.c_double(21))


def test_a_source_is_compiled_once_and_again_when_it_changes(source, counted, tmp_path):
    source.write_text(SOURCE)
    assert [twice(source), twice(source)] == [42, 42]
    assert len(counted) == 1
    source.write_text(SOURCE.replace("2 *", "3 *"))
    assert twice(source) == 63
    assert len(counted) == 2
    kept = tmp_path / "home" / "ddim"
    assert sorted(path.suffix for path in kept.iterdir()) == [".so", ".so"]  # and nothing temporary


def test_another_processor_has_code_of_its_own(source, counted, monkeypatch):
    source.write_text(SOURCE)
    twice(source)
    monkeypatch.setattr(native, "CAPABILITY", "a capability of tomorrow")
    twice(source)
    assert len(counted) == 2
    assert not any(word.startswith("-m") for word in counted[1])


def test_where_nothing_can_be_kept_it_is_compiled_all_the_same(source, counted, tmp_path):
    source.write_text(SOURCE)
    (tmp_path / "home").write_text("a file where a folder should be")
    assert [twice(source), twice(source)] == [42, 42]
    assert len(counted) == 2


def test_what_is_kept_needs_no_compiler(source, counted, monkeypatch, tmp_path):
    source.write_text(SOURCE)
    twice(source)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert twice(source) == 42
    assert len(counted) == 1


def test_what_is_kept_and_cannot_be_loaded_is_told(source, tmp_path, monkeypatch):
    source.write_text(SOURCE)
    twice(source)
    native.load.cache_clear()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "another"))  # the C library remembers paths that it has loaded
    (kept,) = (tmp_path / "home" / "ddim").iterdir()
    (tmp_path / "another" / "ddim").mkdir(parents=True)
    (tmp_path / "another" / "ddim" / kept.name).write_bytes(b"not a library")
    with pytest.raises(UserError, match=r"cannot be loaded \(.*\); delete it"):
        native.load(source)


@pytest.mark.parametrize(
    "x", [torch.ones(2, 2).T, torch.ones(2, dtype=torch.float64), torch.ones(2, device="meta")], ids=str
)
def test_tensors_that_a_loop_would_misread_are_refused(x):
    with pytest.raises(ValueError, match=r"takes contiguous torch\.float32 on CPUs"):
        native.run(native.Path("none.cpp"), "none", torch.float32, x)


def test_processes_may_compile_at_the_same_time(source):
    source.write_text(SOURCE)
    program = "import sys, pathlib; from ddim.networks import native; native.load(pathlib.Path(sys.argv[1])).twice"
    processes = [subprocess.Popen([sys.executable, "-c", program, str(source)]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]


def test_what_the_compiler_says_is_told(source):
    source.write_text(SOURCE.replace("x;", "y;"))
    with pytest.raises(UserError, match=r"(?s)loop\.cpp failed; name another compiler .*\by\b"):
        native.load(source)


@pytest.mark.parametrize("named", [None, "mycc -O2"])
def test_a_missing_compiler_is_told(monkeypatch, tmp_path, source, named):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", named)
    source.write_text(SOURCE)
    with pytest.raises(
        UserError, match=f"need a C.. compiler, and {re.escape((named or native.COMPILER).split()[0])} "
    ):
        native.load(source)
