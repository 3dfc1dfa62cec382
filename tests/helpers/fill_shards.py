"""Compute all missing shards, as an evaluation does."""

from collections.abc import Callable

from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.evaluation.shards import Shards
from ddim.inference.batching import map_batches
from ddim.io import Tensors


def fill(
    shards: Shards, batch_size: int, compute: Callable[[range], Tensors], processes: Processes = SINGLE_PROCESS
) -> None:
    """Store compute(batch) for this process's share of what is missing."""
    with shards.writer(processes) as write:
        for batch, tensors in map_batches(shards.missing(batch_size, processes), compute):
            write(batch, tensors)
