"""Which samples make up training batch k, and which of them are mirrored: functions of (seed, step), without state.

The training samples form one endless sequence: all images in an order that depends on (seed, epoch), then all images in
another order. Optimiser step `s` takes the elements `s * batch_size` to `(s + 1) * batch_size - 1`, so no partial batch
is dropped, and the batch of a step is the same after resuming and for any number of processes.
"""

from collections.abc import Iterator
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ddim.errors import UserError
from ddim.random import FLIP, SHUFFLE, random_words


class MicroBatch(TypedDict):
    """Which b samples one process takes at once.

    step: the optimiser step, from 0. positions: int64 (b,), positions in the global batch of that step.
    indices: int64 (b,), image numbers in the data set.
    """

    step: int
    positions: Tensor
    indices: Tensor


class Batch(TypedDict):
    """Input of a training step: images, float32 (b, C, H, W) in [-1, 1]; step and positions as in `MicroBatch`.

    labels: int64 (b,), where the data set has them.
    """

    images: Tensor
    labels: NotRequired[Tensor]
    step: int
    positions: Tensor


def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `size` images in `epoch`, int64 (size,)."""
    return random_words(seed, SHUFFLE, epoch, torch.arange(size))[:, 0].argsort(stable=True)


class MicroBatches:
    """The micro-batches of one process; number k belongs to optimiser step `k // accumulate`.

    The micro-batches of one step, over all processes, are consecutive slices of the global batch.

    Args:
        size: images in the data set.
        batch_size: the global batch: samples of one optimiser step, over all processes and micro-batches.
        seed: of the order, 0 .. 2**64 - 1.
        max_steps: optimiser steps of the whole training.
        accumulate: micro-batches per optimiser step on each process.
        rank, world_size: this process, and the number of processes.

    Raises:
        UserError: batch_size is not a positive multiple of world_size * accumulate.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        max_steps: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise UserError(
                f"batch_size={batch_size} is the global batch of one step and must be a multiple of "
                f"{world_size * accumulate} ({world_size} processes x {accumulate} accumulated batches)."
            )
        self.size, self.batch_size, self.seed, self.max_steps = size, batch_size, seed, max_steps
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __getitem__(self, k: int) -> MicroBatch:
        step, slice_of_step = divmod(k, self.accumulate)
        b = self.batch_size // (self.world_size * self.accumulate)
        first = (slice_of_step * self.world_size + self.rank) * b
        positions = torch.arange(first, first + b)
        indices = self._indices(step * self.batch_size + positions)
        return MicroBatch(step=step, positions=positions, indices=indices)

    def _indices(self, elements: Tensor) -> Tensor:
        """Map increasing positions in the endless sequence to image numbers."""
        epochs = range(int(elements[0]) // self.size, int(elements[-1]) // self.size + 1)
        known = self._orders
        self._orders = {e: known[e] if e in known else permutation(self.size, self.seed, e) for e in epochs}
        sequence = torch.cat([self._orders[e] for e in epochs]) if len(epochs) > 1 else self._orders[epochs[0]]
        return sequence[elements - epochs[0] * self.size]


class ResumableSampler(Sampler[int]):
    """The numbers `start` to `total - 1`; the length is `total`, because Lightning counts those before `start` too."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))


def flips(seed: int, step: int, positions: Tensor) -> Tensor:
    """Return which samples of a step are mirrored: bool (b,), fair coins that depend on (seed, step, position)."""
    return random_words(seed, FLIP, step, positions)[:, 0] >= 1 << 31


def random_flip(images: Tensor, seed: int, step: int, positions: Tensor) -> Tensor:
    """Mirror the images (b, C, H, W) at `positions` of a step left to right where `flips` is true."""
    return torch.where(flips(seed, step, positions)[:, None, None, None], images.flip(-1), images)
