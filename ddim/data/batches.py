"""Which images make up which training batch: addressed by (seed, step), never drawn from a running state.

The training samples stand in one endless row: every image once in an order that depends on (seed, epoch), then every
image once again in another. Optimiser step `s` takes the places `s * batch_size` to `(s + 1) * batch_size - 1`, so no
partial batch is dropped, and the batch of a step is the same after a resumption and for any number of processes.
"""

from collections.abc import Iterator
from typing import NotRequired, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ddim.data.images import Images, MemoryImages, normalize
from ddim.errors import UserError
from ddim.random import FLIP, SHUFFLE, random_words


class Addresses(TypedDict):
    """One micro-batch of b images before it reaches the device.

    step: the optimiser step, from 0. positions: int64 (b,), places in the global batch of that step.
    indices: int64 (b,), places in the data set. images: uint8 (b, C, H, W), when they do not wait on the device.
    """

    step: int
    positions: Tensor
    indices: Tensor
    images: NotRequired[Tensor]


class Batch(TypedDict):
    """What the training step gets: images float32 (b, C, H, W) in [-1, 1]; step and positions as in `Addresses`."""

    images: Tensor
    step: int
    positions: Tensor


def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `size` images in `epoch`, int64 (size,), a function of the three arguments alone."""
    return random_words(seed, SHUFFLE, epoch, torch.arange(size))[:, 0].argsort(stable=True)


class MicroBatches(Dataset[Addresses]):
    """The micro-batches of one process: number k is part `k % accumulate` of optimiser step `k // accumulate`.

    The micro-batches with one value of `k // accumulate`, over all processes, are consecutive slices of the global
    batch of that step.

    Args:
        images: the data set.
        batch_size: samples of one optimiser step, over all processes and micro-batches.
        seed: 0 .. 2**64 - 1.
        max_steps: optimiser steps of the whole training.
        accumulate: micro-batches per optimiser step.
        rank, world_size: this process, of how many.
        with_images: put the pixels into the micro-batch, not only their indices.

    Raises:
        UserError: batch_size is not a positive multiple of world_size * accumulate.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        max_steps: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        with_images: bool = True,
    ) -> None:
        if batch_size < 1 or batch_size % (world_size * accumulate):
            raise UserError(
                f"batch_size={batch_size} is the global batch of one step and must be a multiple of "
                f"{world_size * accumulate} ({world_size} processes x {accumulate} accumulated batches)."
            )
        self.size, self.batch_size, self.seed, self.max_steps = len(images), batch_size, seed, max_steps
        self.accumulate, self.rank, self.world_size = accumulate, rank, world_size
        self._images = images if with_images else None  # not even handed to worker processes
        self._orders: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.max_steps * self.accumulate

    def __getitem__(self, k: int) -> Addresses:
        step, part = divmod(k, self.accumulate)
        micro = self.batch_size // (self.world_size * self.accumulate)
        first = (part * self.world_size + self.rank) * micro
        positions = torch.arange(first, first + micro)
        batch = Addresses(step=step, positions=positions, indices=self._indices(step * self.batch_size + positions))
        if isinstance(self._images, MemoryImages):
            batch["images"] = self._images.images[batch["indices"]]
        elif self._images is not None:
            batch["images"] = torch.stack([self._images[i] for i in batch["indices"].tolist()])
        return batch

    def _indices(self, places: Tensor) -> Tensor:
        """Map places in the endless row, increasing, to places in the data set."""
        epochs = range(int(places[0]) // self.size, int(places[-1]) // self.size + 1)
        known = self._orders
        self._orders = {e: known[e] if e in known else permutation(self.size, self.seed, e) for e in epochs}
        row = torch.cat([self._orders[e] for e in epochs]) if len(epochs) > 1 else self._orders[epochs[0]]
        return row[places - epochs[0] * self.size]


class From(Sampler[list[int]]):
    """The numbers of the micro-batches from `start` on, one by one; the length is that of the whole training.

    Lightning counts the micro-batches before `start` into its progress by itself, hence the length.
    """

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[list[int]]:
        return ([k] for k in range(self.start, self.total))


def flips(seed: int, step: int, positions: Tensor) -> Tensor:
    """Return which samples of a step are mirrored: bool (b,), fair coins addressed by (seed, step, position)."""
    return random_words(seed, FLIP, step, positions)[:, 0] >= 1 << 31


def finish(images_u8: Tensor, step: int, positions: Tensor, seed: int, flip: bool) -> Batch:
    """Turn the pixels of a micro-batch, uint8 (b, C, H, W), into what the training step gets, on their device.

    Args:
        images_u8: the unflipped images at `positions`.
        step, positions: see `Addresses`.
        seed: decides the flips together with step and position.
        flip: mirror half of the images left to right.
    """
    if flip:
        mirrored = flips(seed, step, positions)[:, None, None, None]
        images_u8 = torch.where(mirrored, images_u8.flip(-1), images_u8)
    return Batch(images=normalize(images_u8), step=step, positions=positions)
