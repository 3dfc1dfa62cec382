"""Two processes that meet as under torchrun, for functions that the tests hand over."""

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


def together(function: Callable[..., Any], *arguments: Any, to: Path, count: int = 2) -> list[Any]:
    """Return what `function(processes, *arguments)` returns in each of `count` processes."""
    to.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_start, (count, port, function, arguments, to), nprocs=count)
    return [torch.load(to / f"{rank}.pt", weights_only=False) for rank in range(count)]
