"""C++ loops: compiled when needed, cached, and one clear error for a missing or failing compiler."""

import ctypes
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddim.errors import UserError
from ddim.networks import compiler
from ddim.networks.cpu import native

pytestmark = [pytest.mark.usefixtures("compiler"), pytest.mark.integration]
SOURCE = 'extern "C" double twice(double x) { return 2 * x; }'


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    native.load.cache_clear()
    path = tmp_path / "loop.cpp"
    path.write_text(SOURCE)
    yield path
    native.load.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """The commands of the compiler so far."""
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


def test_a_source_is_compiled_again_only_when_changed(source, compilations, tmp_path):
    assert [twice(source), twice(source)] == [42, 42]
    assert len(compilations) == 1
    source.write_text(SOURCE.replace("2 *", "3 *"))
    assert twice(source) == 63
    assert len(compilations) == 2
    assert sorted(path.suffix for path in (tmp_path / "home" / "ddim").iterdir()) == [".so", ".so"]  # nothing temporary


def test_another_processor_gets_its_own_library(source, compilations, monkeypatch):
    twice(source)
    monkeypatch.setattr(native, "CAPABILITY", "a future instruction set")
    twice(source)
    assert len(compilations) == 2
    assert not any(word.startswith("-m") for word in compilations[1])


def test_an_unwritable_cache_compiles_per_process(source, compilations, tmp_path):
    (tmp_path / "home").write_text("a file where a folder should be")
    assert [twice(source), twice(source)] == [42, 42]
    assert len(compilations) == 2


def test_a_kept_library_needs_no_compiler(source, compilations, monkeypatch, tmp_path):
    twice(source)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert twice(source) == 42
    assert len(compilations) == 1


def foreign(path, monkeypatch):
    """Let a path belong to another user."""
    owner, lstat = os.getuid() + 1, Path.lstat

    def fake(self):
        status = list(lstat(self))
        status[stat.ST_UID] = owner if self == path else status[stat.ST_UID]
        return os.stat_result(status)

    monkeypatch.setattr(Path, "lstat", fake)


def linked(path, monkeypatch):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


# What may not be loaded: a library or its folder that ...
UNTRUSTED = {
    "others can write to": lambda path, monkeypatch: path.chmod(0o777),
    "a group can write to": lambda path, monkeypatch: path.chmod(0o720),
    "belongs to another user": foreign,
    "is a link": linked,
}


@pytest.mark.parametrize("which", ["library", "folder"])
@pytest.mark.parametrize("case", UNTRUSTED)
def test_code_that_others_could_have_written_is_not_loaded(case, which, source, compilations, monkeypatch, caplog):
    twice(source)
    folder = source.parent / "home" / "ddim"
    (library,) = folder.iterdir()
    trap = source.with_name("trap.cpp")
    trap.write_text(SOURCE.replace("2 *", "666 *"))
    twice(trap)
    os.replace(next(folder.glob("trap-*.so")), library)
    assert len(compilations) == 2
    path = library if which == "library" else folder
    UNTRUSTED[case](path, monkeypatch)
    assert twice(source) == 42
    assert len(compilations) == 3
    [warning] = caplog.messages
    assert warning.startswith(f"{path} is a link, or not of this user alone, so code in it is not loaded")


def test_kept_code_is_private_whatever_the_umask(source, compilations):
    before = os.umask(0)
    try:
        assert [twice(source), twice(source)] == [42, 42]
    finally:
        os.umask(before)
    folder = source.parent / "home" / "ddim"
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())] == [0o700, 0o700]
    assert len(compilations) == 1


def test_a_damaged_library_is_an_error(source, tmp_path, monkeypatch):
    twice(source)
    native.load.cache_clear()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "another"))  # the C library remembers the paths that it has loaded
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
    program = "import sys, pathlib; from ddim.networks.cpu import native; native.load(pathlib.Path(sys.argv[1])).twice"
    processes = [subprocess.Popen([sys.executable, "-c", program, str(source)]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]


def test_a_failing_compiler_is_quoted(source):
    source.write_text(SOURCE.replace("x;", "y;"))
    with pytest.raises(UserError, match=r"(?s)loop\.cpp failed; name another compiler .*\by\b"):
        native.load(source)


@pytest.mark.parametrize("cxx", ["", "mycc -O2"])
def test_a_missing_compiler_is_named(monkeypatch, tmp_path, source, cxx):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", cxx)
    name = re.escape((cxx or compiler.DEFAULT).split()[0])
    with pytest.raises(UserError, match=f"need a C.. compiler, and {name} "):
        native.load(source)
