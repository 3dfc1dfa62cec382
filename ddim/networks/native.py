"""Loops in C++ that torch has not: compiled on a machine's first use of them, and kept.

For loops only. Their code includes nothing of torch, so that compiling takes seconds and the result fits every version.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ddim.errors import UserError

COMPILER = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # torch takes $CXX, or else this one
OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC", *(() if sys.platform == "darwin" else ("-fopenmp",)))
VECTORS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}  # by what torch calls a processor's abilities
TYPES = {torch.float32: "float", torch.float64: "double"}
CHANNELS = 32  # come in multiples of what two of the longest vectors of a processor hold


def run(source: Path, function: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
    """Call `{function}_float` or `{function}_double` of a C++ file.

    It gets pointers for tensors, which must be contiguous or have their strides among the arguments; int64_t for whole
    numbers, double for others; and last the number of torch's threads.
    """
    last = torch.get_num_threads()
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in (*arguments, last)]
    numbers = [ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value) for value in values]
    getattr(load(source), f"{function}_{TYPES[dtype]}")(*numbers)


def pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: the variable CXX, or what the platform has.

    Raises:
        UserError: it is not there.
    """
    command = shlex.split(os.environ.get("CXX") or COMPILER)
    if shutil.which(command[0]) is None:
        raise UserError(
            f"compile=true and winograd=true need a C++ compiler, and {command[0]} cannot be found; install it "
            "(apt install g++, conda install gxx), name another by the variable CXX, or leave both false."
        )
    return command


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """Return the functions of a C++ file, which is compiled unless it was before, for a processor like this one.

    They are kept in `~/.cache/torch/ddim` (TORCH_HOME moves that); where that cannot be written, each process compiles
    them for itself. Processes may load the same file at the same time.

    Raises:
        UserError: no compiler, or it fails; the message has its last lines.
    """
    options = (*OPTIONS, *VECTORS.get(torch.backends.cpu.get_cpu_capability(), ()))
    command = [*find_compiler(), *options, str(source)]
    content = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256(b"".join((*content, " ".join((*command[:-1], sys.platform)).encode()))).hexdigest()[:16]
    library = _folder() / f"{source.stem}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            fresh = Path(folder) / library.name
            done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
            if done.returncode:
                raise UserError(
                    f"{shlex.join(command)} failed; name another compiler by the variable CXX, or use winograd=false. "
                    f"It said: {done.stderr[-500:].strip()}"
                )
            os.replace(fresh, library)  # at once, whoever else is about it
    return ctypes.CDLL(str(library))


def _folder() -> Path:
    folder = Path(torch.hub.get_dir()).parent / "ddim"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return Path(tempfile.mkdtemp(prefix="ddim-"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
