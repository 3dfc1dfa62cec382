"""A GPU for each process of a sweep: hydra/launcher=box."""

import os
import tempfile
from functools import cache
from itertools import count, takewhile
from pathlib import Path

from filelock import FileLock, Timeout

_held: list[FileLock] = []  # until this process ends


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = (name.strip() for name in named.split(","))
        return [*takewhile(lambda name: name and not name.startswith("-"), gpus)]  # as CUDA reads it
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def jobs_side_by_side() -> int:
    """Return the number of GPUs; without any -1, for which joblib starts a job on each CPU."""
    return len(visible_gpus()) or -1


@cache
def own_gpu() -> str:
    """Return the GPU of this process, or "" without any: the processes of one sweep take one after the other.

    A process keeps its GPU until it ends, since CUDA cannot change it; that of one that ended is free again.
    """
    if not (gpus := visible_gpus()):
        return ""
    name = f"ddim_{getattr(os, 'getuid', int)()}_{os.getppid()}"
    number = next(n for n in count() if _take(Path(tempfile.gettempdir()) / f"{name}_{n}.lock"))
    return gpus[number % len(gpus)]


def _take(path: Path) -> bool:
    """Return whether a lock was free; it is held from now on."""
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return False
    _held.append(lock)
    return True
