"""Compiles C++ loops at their first use, keeps the libraries, and calls their functions.

The C++ files include nothing of torch, so that compiling takes a second and a library fits every version of torch.
"""

import atexit
import ctypes
import functools
import hashlib
import logging
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
from ddim.networks.compiler import compiler_command, find_compiler, is_private

log = logging.getLogger(__name__)

OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC", *(() if sys.platform == "darwin" else ("-fopenmp",)))
VECTOR_OPTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}  # by torch's name of the processor's instruction set
CAPABILITY = torch.backends.cpu.get_cpu_capability()
TYPES = {torch.float32: "float", torch.float64: "double"}
CHANNELS = 32  # the loops need a multiple of it: two of the longest vectors of float32


def run(source: Path, function: str, dtype: torch.dtype, *arguments: Tensor | int | float) -> None:
    """Call `{function}_float` or `{function}_double` of a C++ file.

    The function receives a pointer for each tensor, an int64_t for each int, a double for each float, and last the
    number of torch's threads.

    Raises:
        ValueError: a tensor is not contiguous, not on a CPU, or of another dtype.
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
    with torch.profiler.record_function(f"{source.stem}.{function}"):  # torch's profiler does not see C++ functions
        getattr(load(source), f"{function}_{TYPES[dtype]}")(*numbers)


def supports(x: Tensor, weight: Tensor, channels: int) -> bool:
    """Return whether x is (B, channels, H, W) on a CPU, in a dtype of the loops that is also the weight's."""
    return x.dtype in TYPES and x.dtype == weight.dtype and x.is_cpu and x.dim() == 4 and x.shape[1] == channels


def to_nhwc(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


@functools.cache
def load(source: Path) -> ctypes.CDLL:
    """Return the functions of a C++ file, compiled unless that was done before for this kind of processor.

    Libraries are kept in `~/.cache/torch/ddim` (TORCH_HOME moves it) under a hash of source and compiler options; if
    that is not writable, or others than this user could have written to it, each process compiles for itself. Several
    processes may load the same file at the same time.

    Raises:
        UserError: the compiler is missing or fails (with the end of its output), or a kept library cannot be loaded.
    """
    options = (*OPTIONS, *VECTOR_OPTIONS.get(CAPABILITY, ()))
    content = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    target = " ".join((*compiler_command(), *options, sys.platform, platform.machine()))
    key = hashlib.sha256(b"".join((*content, target.encode()))).hexdigest()[:16]
    library = Path(torch.hub.get_dir()).parent / "ddim" / f"{source.stem}-{key}.so"
    if shared := [path for path in (library.parent, library) if not is_private(path)]:
        log.warning(
            "%s is a link, or not of this user alone, so code in it is not loaded but compiled anew; remove it.",
            shared[0],
        )
        library = _compile(source, options, None)
    elif not os.path.isfile(library):
        library = _compile(source, options, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UserError(
            f"{library} cannot be loaded ({error}); delete it to have it compiled again, or use winograd=false."
        ) from error


def _compile(source: Path, options: tuple[str, ...], library: Path | None) -> Path:
    """Write the library atomically; return its path, which is a temporary one if `library` is None or not writable."""
    command = [*find_compiler(), *options, str(source)]
    try:
        if library is not None:
            library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="ddim-", dir=library and library.parent))
    except OSError:
        folder, library = Path(tempfile.mkdtemp(prefix="ddim-")), None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    compiled = folder / f"{source.stem}.so"
    done = subprocess.run(
        [*command, "-o", str(compiled)], capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise UserError(
            f"{shlex.join(command)} failed; name another compiler in the variable CXX, or use winograd=false. "
            f"Its output: {(done.stdout + done.stderr)[-500:].strip()}"
        )
    if library is None:
        return compiled
    compiled.chmod(0o700)  # whatever the umask is
    os.replace(compiled, library)
    folder.rmdir()
    return library
