"""Training batches for Lightning."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from ddim.data.batches import Addresses, Batch, From, MicroBatches, finish
from ddim.data.images import Images, MemoryImages
from ddim.errors import UserError

RESIDENT_FRACTION = 0.25  # of the free memory of a device that images may take by default


class ImageDataModule(LightningDataModule):
    """Hands `training_step` the batches of `MicroBatches` as `Batch`, finished on the device.

    The Trainer must be made with `max_steps` (at most the one here), `max_epochs=-1` and
    `use_distributed_sampler=False`; its `accumulate_grad_batches` and number of processes divide the batch.

    Args:
        images: what to train on.
        batch_size: the global batch: samples of one optimiser step, over all processes and accumulated batches.
        seed: of the order and the flips, 0 .. 2**64 - 1.
        max_steps: optimiser steps of the whole training, those before a resumption included.
        flip: mirror each sample left to right with probability 1/2.
        num_workers: processes that read ahead; worth having for images that are not in memory.
        device_resident: keep all images on the device. None does so for images in memory unless they take more than
            RESIDENT_FRACTION of the memory that is free there.

    Raises:
        UserError: an argument is out of range; from `setup` on also a batch that does not divide.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int,
        max_steps: int,
        flip: bool,
        num_workers: int = 0,
        device_resident: bool | None = None,
    ) -> None:
        super().__init__()
        if max_steps < 1:
            raise UserError(f"max_steps={max_steps} must be at least 1.")
        if num_workers < 0:
            raise UserError(f"num_workers={num_workers} must not be negative; 0 reads in the training process.")
        if device_resident and not isinstance(images, MemoryImages):
            raise UserError(f"device_resident=true needs images in memory, and {images.name} are read on demand.")
        self.images, self.batch_size, self.seed, self.max_steps, self.flip = images, batch_size, seed, max_steps, flip
        self.num_workers, self.device_resident = num_workers, device_resident
        self._resident: Tensor | None = None
        self._batches: MicroBatches | None = None

    def setup(self, stage: str) -> None:
        """Divide the batch among the processes, and move the images to the device where they fit."""
        if stage != "fit":
            return
        trainer = self._trainer()
        if not 0 <= trainer.max_steps <= self.max_steps:
            raise UserError(f"the Trainer's max_steps={trainer.max_steps} must lie in 0 .. {self.max_steps}.")
        device = trainer.strategy.root_device
        if isinstance(self.images, MemoryImages) and self._fits(self.images.images, device):
            self._resident = self.images.images.to(device)
        self._batches = MicroBatches(
            self.images,
            self.batch_size,
            self.seed,
            self.max_steps,
            accumulate=trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            with_images=self._resident is None,
        )

    def teardown(self, stage: str) -> None:
        """Free the memory of the device."""
        self._resident = None

    def train_dataloader(self) -> DataLoader:
        """Start at the optimiser step that the Trainer is at."""
        trainer, batches = self._trainer(), self._batches
        assert batches is not None
        return _ResumableLoader(
            batches,
            batch_sampler=From(trainer.global_step * batches.accumulate, len(batches)),
            collate_fn=_only,
            num_workers=self.num_workers,
            pin_memory=_free_memory(trainer.strategy.root_device) is not None,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch | Any:
        """Gather, flip and scale on the device; batches of validation and prediction pass through."""
        if not self._trainer().training:
            return batch
        images = batch["images"] if self._resident is None else self._resident[batch["indices"]]
        return finish(images, batch["step"], batch["positions"], self.seed, self.flip)

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module is not attached to a Trainer; pass it to trainer.fit.")
        return self.trainer

    def _fits(self, images: Tensor, device: torch.device) -> bool:
        if self.device_resident is not None:
            return self.device_resident
        free = _free_memory(device)
        return free is None or images.nbytes <= RESIDENT_FRACTION * free


class _ResumableLoader(DataLoader):
    """Tells Lightning that a resumption in the middle of an epoch is right: `From` starts where the Trainer is."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """There is nothing to load: batches are addressed."""


def _only(batches: list[Addresses]) -> Addresses:
    return batches[0]


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device with a memory of its own, None for one that shares the host's."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else None
