"""Numbered images in batches, which are halved where they do not fit into memory."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

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
            if not _out_of_memory(error):
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


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
