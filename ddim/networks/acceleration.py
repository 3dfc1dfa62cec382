"""Options that make a network faster; its outputs change by rounding only."""

import ctypes
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddim.errors import UserError
from ddim.networks.compiler import find_compiler, is_private

log = logging.getLogger(__name__)
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable: the folder of compiled code
MAX_COMPILED_SIZES = 64  # batch sizes that a network is compiled for; torch runs further ones uncompiled
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def accelerate(
    network: nn.Module,
    device: torch.device,
    *,
    channels_last: bool = False,
    compile: bool = False,
    graphs: bool = False,
    winograd: bool = False,
) -> None:
    """Prepare a network for the device on which it will run, in place; names and values of the weights stay.

    Args:
        network: on any device; for winograd on the CPU.
        device: on which the network will run.
        channels_last: store weights, and so activations, in this memory format.
        compile: compile the network with torch.compile at its first call.
        graphs: also replay the compiled network as one CUDA graph, which avoids launching every kernel separately;
            pays for batches so small that launching takes longer than computing. CUDA devices only.
        winograd: faster convolutions and normalisations in C++ (`ddim/networks/cpu/README.md`). CPUs only. Weights that
            take no gradient must not change afterwards.

    Raises:
        UserError: winograd or graphs on another device; or the C++ compiler is missing or fails.
    """
    if graphs and device.type != "cuda":
        raise UserError(f"graphs=true is for CUDA devices, and the device is {device}; leave it false.")
    if winograd and device.type != "cpu":
        raise UserError(f"winograd=true is for CPUs, and the device is {device}; leave it false.")
    if device.type == "cpu":
        if compile:
            find_compiler()
        keep_freed_memory()
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if winograd:
        from ddim.networks.cpu import use_cpp_loops  # here, so that nothing else depends on that folder

        use_cpp_loops(network)
    if compile or graphs:
        _keep_compiled_code()
        # One compilation per batch size: code for any size is slower, and on some CPUs it does not compile.
        torch._dynamo.config.recompile_limit = max(MAX_COMPILED_SIZES, torch._dynamo.config.recompile_limit)
        if graphs:
            replay = torch.compile(network.forward, mode="reduce-overhead", dynamic=False)
            # The next replay overwrites the output of this one, which samplers with a memory still use.
            network.forward = lambda *inputs: replay(*inputs).clone()
        else:
            network.compile(dynamic=False)


def has_cpp_loops() -> bool:
    """Return whether `accelerate` can do winograd=true on this machine's CPU; the loops are compiled if need be."""
    from ddim.networks.cpu import load_cpp_loops  # here, so that nothing else depends on that folder

    try:
        load_cpp_loops()
    except UserError as error:
        log.debug("there are no C++ loops: %s", error)
        return False
    return True


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Let GPUs compute float32 products and convolutions in TF32 inside the block, or not; torch's default is both.

    torch has older settings and newer ones (`fp32_precision`, from 2.9 on), and refuses to read an older one where the
    two disagree: both are set.
    """
    backends: Any = torch.backends
    cudnn, parts = backends.cudnn, []
    if hasattr(cudnn, "conv"):
        parts = [cudnn.conv, cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul]
        newer = conv, _, matmul, on_cpu = [part.fp32_precision for part in parts]
        older = ("medium" if on_cpu == "bf16" else "high" if matmul == "tf32" else "highest"), conv == "tf32"
    else:
        newer, older = [], (torch.get_float32_matmul_precision(), cudnn.allow_tf32)
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        cudnn.allow_tf32 = tf32
        for part in parts[:2]:  # without this, false would leave them to torch.backends.fp32_precision
            part.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(older[0])
        cudnn.allow_tf32 = older[1]
        for part, precision in zip(parts, newer, strict=True):
            part.fp32_precision = precision


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return whether the C library supports that.

    Otherwise glibc returns the memory of every large tensor to the system, and the next tensor is zeroed and mapped
    page by page: a sixth of the time of a network evaluation on large batches.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all(mallopt(parameter, value) for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))


def _keep_compiled_code() -> None:
    """Let the next process reuse what torch compiles in this one.

    torch's default is the temporary folder, which clusters empty after each job. Here it is `~/.cache/torch/inductor`
    (next to torch's other downloads; TORCH_HOME moves it), unless TORCHINDUCTOR_CACHE_DIR names another folder or this
    one is not writable, or writable by others: torch loads and runs what is in it.
    """
    folder = Path(torch.hub.get_dir()).parent / "inductor"
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    # Parts of torch set the variable to the temporary folder when they are imported.
    value = os.environ.get(CACHE)
    set_by_user = value is not None and not value.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_"))
    if not set_by_user and os.access(existing, os.W_OK) and is_private(folder):
        os.environ[CACHE] = str(folder)
