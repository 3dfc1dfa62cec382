"""Loops in C++ that torch has not: compiled on a machine's first use of them, and kept.

For loops only. Their code includes nothing of torch, so that compiling takes seconds and the result fits every version.
"""

import atexit
import ctypes
import functools
import hashlib
import os
import platform
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
CAPABILITY = torch.backends.cpu.get_cpu_capability()
TYPES = {torch.float32: "float", torch.float64: "double"}
CHANNELS = 32  # come in multiples of what two of the longest vectors of a processor hold


def run(source: Path, function: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
    """Call `{function}_float` or `{function}_double` of a C++ file.

    It gets pointers for tensors, int64_t for whole numbers, double for others; and last the number of torch's threads.

    Raises:
        ValueError: a tensor is not contiguous, not on a CPU or of another dtype.
    """
    values: list[int | float] = []
    for argument in (*arguments, torch.get_num_threads()):
        if not isinstance(argument, Tensor):
            values.append(argument)
        elif argument.dtype == dtype and argument.is_cpu and argument.is_contiguous():
            values.append(argument.data_ptr())
        else:
            raise ValueError(f"{function} takes contiguous {dtype} on CPUs, not {argument.dtype}, {argument.device}.")
    numbers = [ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value) for value in values]
    with torch.profiler.record_function(f"{source.stem}.{function}"):  # profiles see no further than torch's operations
        getattr(load(source), f"{function}_{TYPES[dtype]}")(*numbers)


def takes(x: Tensor, weight: Tensor, channels: int) -> bool:
    """Whether x is (B, channels, H, W), and with the weight of a kind that `run` takes."""
    known = x.dtype in TYPES and x.dtype == weight.dtype and x.is_cpu
    return known and x.dim() == 4 and x.shape[1] == channels


def pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: the variable CXX, or what the platform has.

    Raises:
        UserError: it is not there.
    """
    command = _compiler()
    if shutil.which(command[0]) is None:
        raise UserError(
            f"compile=true and winograd=true need a C++ compiler, and {command[0]} cannot be found; install it "
            "(apt install g++, conda install gxx), name another by the variable CXX, or leave both false."
        )
    return command


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """Return the functions of a C++ file, which g++ or clang++ compiles unless it was before, for such a processor.

    They are kept in `~/.cache/torch/ddim` (TORCH_HOME moves that); where that cannot be written, each process compiles
    them for itself. Processes may load the same file at the same time.

    Raises:
        UserError: no compiler, or it fails, with the last of what it says; or what was kept cannot be loaded.
    """
    options = (*OPTIONS, *VECTORS.get(CAPABILITY, ()))
    content = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    told = " ".join((*_compiler(), *options, sys.platform, platform.machine()))
    key = hashlib.sha256(b"".join((*content, told.encode()))).hexdigest()[:16]
    library = Path(torch.hub.get_dir()).parent / "ddim" / f"{source.stem}-{key}.so"
    if not library.exists():
        library = _compile(source, options, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UserError(
            f"{library} cannot be loaded ({error}); delete it to have it compiled anew, or use winograd=false."
        ) from error


def _compile(source: Path, options: tuple[str, ...], library: Path) -> Path:
    """Make the library, at once for whoever else is about it, and return where it is."""
    command = [*find_compiler(), *options, str(source)]
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=library.parent))
    except OSError:  # it cannot be written: for this process alone
        folder = Path(tempfile.mkdtemp(prefix="ddim-"))
        library = folder / library.name
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fresh = folder / "fresh.so"
    done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{shlex.join(command)} failed; name another compiler by the variable CXX, or use winograd=false. "
            f"It said: {(done.stdout + done.stderr)[-500:].strip()}"
        )
    os.replace(fresh, library)
    if library.parent != folder:
        folder.rmdir()
    return library


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or [COMPILER]
