"""Two processes, connected as under torchrun, that run a function of a test."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _start(
    rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], to: Path
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from ddim.distributed import join_process_group

    torch.save(function(join_process_group(), *arguments), to / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def run_in_processes(function: Callable[..., Any], *arguments: Any, to: Path, count: int = 2) -> list[Any]:
    """Return what `function(processes, *arguments)` returns in each of `count` processes."""
    to.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A forked process need not import everything again, but cannot use CUDA where its parent has.
    fork = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    torch.multiprocessing.start_processes(
        _start, (count, port, function, arguments, to), count, start_method="fork" if fork else "spawn"
    )
    return [torch.load(to / f"{rank}.pt", weights_only=False) for rank in range(count)]
