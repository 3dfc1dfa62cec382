"""What makes a network faster on a processor and leaves its outputs as they are, but for rounding."""

import ctypes
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from ddim.errors import UserError
from ddim.networks.cpu.native import find_compiler
from ddim.networks.cpu.norm_silu import fuse_norms
from ddim.networks.cpu.winograd import use_winograd

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable: where it keeps what it compiled
SIZES = 64  # that a network is compiled for; beyond them torch runs it uncompiled, and says so in passing
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def tune_network(
    network: nn.Module,
    device: torch.device,
    *,
    channels_last: bool = False,
    compile: bool = False,
    graphs: bool = False,
    winograd: bool = False,
) -> None:
    """Prepare a network for the device on which it is going to run, in place; names and weights stay.

    Args:
        network: on any device; on the CPU for winograd.
        device: where it will be.
        channels_last: lay out weights and with them activations so.
        compile: let torch compile the network when it is first called.
        graphs: and replay what was compiled as one CUDA graph, which saves starting every kernel by itself; worth it
            where batches are so small that starting takes longer than computing. On CUDA devices only.
        winograd: see `use_winograd`, and `fuse_norms`, which comes with it; on CPUs only. Weights must not change
            afterwards where they take no gradient.

    Raises:
        UserError: winograd or graphs on another device; a compiler is needed and there is none, or it fails.
    """
    if graphs and device.type != "cuda":
        raise UserError(f"graphs=true is for CUDA devices, and the device is {device}; leave it false.")
    if winograd and device.type != "cpu":
        raise UserError(f"winograd=true is for CPUs, and the device is {device}; leave it false.")
    if device.type == "cpu":
        if compile:
            find_compiler()
        keep_freed_memory()
    if compile or graphs:
        _keep_compiled()
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if winograd:
        use_winograd(network)
        fuse_norms(network)
    if compile or graphs:
        # For each batch size anew: code for all of them is slower, and on some CPUs it does not compile.
        torch._dynamo.config.recompile_limit = max(SIZES, torch._dynamo.config.recompile_limit)
        network.compile(mode="reduce-overhead" if graphs else None, dynamic=False)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; return whether it is going to.

    Where the C library hands the memory of every large tensor back, the next one is zeroed and mapped page by page,
    which takes a sixth of the time of a network evaluation on large batches.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return all(mallopt(parameter, value) for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))


def _keep_compiled() -> None:
    """Let the next process find what torch compiles in this one.

    torch keeps it below the temporary folder, which clusters empty after each job. Here it lies beside torch's other
    downloads, `~/.cache/torch/inductor` (TORCH_HOME moves that), unless TORCHINDUCTOR_CACHE_DIR names another folder or
    that one cannot be written.
    """
    folder = Path(torch.hub.get_dir()).parent / "inductor"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    # Parts of torch set it to the temporary folder as soon as they are imported.
    named = os.environ.get(CACHE)
    chosen = named is not None and not named.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_"))
    if not chosen and os.access(there, os.W_OK):
        os.environ[CACHE] = str(folder)
