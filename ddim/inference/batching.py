"""Numbered images in batches, which are halved where they do not fit into memory."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, pairwise
from typing import TypeVar

import torch

from ddim.distributed import Processes
from ddim.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")  # torch's on the CPU; CUDA's


def split(indices: range, batch_size: int, origin: int = 0) -> list[range]:
    """Cut consecutive numbers where their distance from `origin` is a multiple of `batch_size`."""
    first = indices.start + batch_size - (indices.start - origin) % batch_size
    edges = [indices.start, *range(first, indices.stop, batch_size), indices.stop]
    return [range(start, stop) for start, stop in pairwise(edges) if start < stop]


def map_batches(batches: Sequence[range], compute: Callable[[range], T]) -> Iterator[tuple[range, T]]:
    """Yield (batch, compute(batch)). One that does not fit into memory is halved, and so are all that come after it.

    Raises:
        UserError: not even a single image fits.
    """
    queue, largest = deque(batches), 0
    while queue:
        batch = queue.popleft()
        if largest and len(batch) > largest:
            queue.extendleft(reversed(split(batch, largest, batch.start)))
            continue
        try:
            result = compute(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise UserError("not even one image at a time fits into memory; use a device with more.") from error
            largest = (len(batch) + 1) // 2
            log.warning("%d images at a time do not fit into memory; going on with %d.", len(batch), largest)
        else:
            yield batch, result
            continue
        # Outside the handler, whose traceback keeps the tensors of the failed batch alive.
        queue.appendleft(batch)
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def share(batches: Sequence[range], processes: Processes) -> Sequence[range]:
    """Return the batches that this process computes, of those that all of them have."""
    if processes.is_main and 0 < len(batches) < processes.world_size:
        _warn_of_idle_processes(len(batches), processes.world_size, sum(map(len, batches)))
    return batches[processes.rank :: processes.world_size]


def map_shared(batches: Sequence[range], compute: Callable[[range], T], processes: Processes) -> list[T]:
    """Return `compute(batch)` of all batches, in order and in every process; each computes its share.

    Raises:
        UserError: see `map_batches`; or it failed in another process.
    """
    with processes.barrier():
        own = [*map_batches(share(batches, processes), compute)]
    return [result for _, result in sorted(chain(*processes.gather(own)), key=lambda pair: pair[0].start)]


@cache  # for the figures, which sample often: a single warning
def _warn_of_idle_processes(batches: int, processes: int, images: int) -> None:
    size = max(1, images // processes)
    advice = f"; compute.batch_size={size} shares the images out" if images > batches else ""
    log.warning("only %d of %d processes have a batch to compute%s.", batches, processes, advice)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of a device or of the machine does not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
