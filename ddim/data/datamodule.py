"""Training batches for Lightning: read, move to the device, flip and scale what `MicroBatches` lists."""

import math
import os
from typing import Any, NotRequired

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddim.data.batches import Batch, MicroBatch, MicroBatches, ResumableSampler, random_flip
from ddim.data.images import Images, MemoryImages, normalize
from ddim.errors import UserError
from ddim.signals import ignore_stop_signals

_COPIES = 4  # of a batch in float32, at least: images, noise, noisy images, prediction
RESIDENT_FRACTION = 0.25  # of the free memory of a device that images may take by default


class ImageDataModule(LightningDataModule):
    """Gives `training_step` a `Batch` for each micro-batch of `MicroBatches`.

    The Trainer must be made with `max_steps` (at most the one here), `max_epochs=-1` and
    `use_distributed_sampler=False`; its `accumulate_grad_batches` and number of processes divide the batch.

    Args:
        images: the training set.
        batch_size, seed, max_steps: see `MicroBatches`; the seed decides the flips too.
        flip: mirror each sample left to right with probability 1/2.
        num_workers: processes that read ahead; useful for images that are not in memory.
        device_resident: keep all images on the device. None does so for images in memory unless they take more than
            RESIDENT_FRACTION of the free memory there.

    Raises:
        UserError: an argument is out of range; from `setup` on also a batch that does not divide, or that is larger
            than the memory of its device.
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
        self._labels: Tensor | None = None  # of all images, on the device

    def setup(self, stage: str) -> None:
        """Check that a batch can fit the device, and move the images there if they fit."""
        trainer = self._trainer()
        if not 0 <= trainer.max_steps <= self.max_steps:
            raise UserError(f"the Trainer's max_steps={trainer.max_steps} must lie in 0 .. {self.max_steps}.")
        device = trainer.strategy.root_device
        at_once = self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches)
        check_memory(
            f"trainer.batch_size={self.batch_size}",
            _COPIES * 4 * at_once * math.prod(self.images.shape),
            device,
            "choose a smaller one, or accumulate it in parts with trainer.accumulate",
        )
        if isinstance(self.images, MemoryImages) and self._fits(self.images.images, device):
            self._resident = self.images.images.to(device)
        if self.images.labels is not None:
            self._labels = self.images.labels.to(device)

    def teardown(self, stage: str) -> None:
        """Free the memory of the device."""
        self._resident = self._labels = None

    def train_dataloader(self) -> DataLoader:
        """Divide the batch among the processes, and start at the Trainer's optimiser step."""
        trainer = self._trainer()
        batches = MicroBatches(
            len(self.images),
            self.batch_size,
            self.seed,
            self.max_steps,
            accumulate=trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return _ResumableLoader(
            _Reader(batches, self.images if self._resident is None else None),
            batch_size=None,  # an item of the data set is a micro-batch
            sampler=ResumableSampler(trainer.global_step * batches.accumulate, len(batches)),
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            worker_init_fn=ignore_stop_signals,
            pin_memory=_free_memory(trainer.strategy.root_device) is not None,
        )

    def on_before_batch_transfer(self, batch: "_Item | UserError", dataloader_idx: int) -> "_Item":
        """Raise what prevented reading."""
        if isinstance(batch, UserError):
            raise batch
        return batch

    def on_after_batch_transfer(self, batch: "_Item", dataloader_idx: int) -> Batch:
        """Gather, flip and scale the images on the device."""
        step, positions = batch["step"], batch["positions"]
        images_u8 = batch["images"] if self._resident is None else self._resident[batch["indices"]]
        if self.flip:
            images_u8 = random_flip(images_u8, self.seed, step, positions)
        result = Batch(images=normalize(images_u8), step=step, positions=positions)
        if self._labels is not None:
            result["labels"] = self._labels[batch["indices"]]
        return result

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("the data module is not attached to a Trainer; pass it to trainer.fit.")
        return self.trainer

    def _fits(self, images: Tensor, device: torch.device) -> bool:
        if self.device_resident is not None:
            return self.device_resident
        free = _free_memory(device)
        return free is None or images.nbytes <= RESIDENT_FRACTION * free


class _Item(MicroBatch):
    """What is moved to the device: images, uint8 (b, C, H, W), are added unless they are there already."""

    images: NotRequired[Tensor]


class _Reader(Dataset[_Item | UserError]):
    """Item k is micro-batch k, or the error of an image that cannot be read.

    `images` is None where none are to be read (worker processes would copy them).
    """

    def __init__(self, batches: MicroBatches, images: Images | None) -> None:
        self.batches, self.images = batches, images

    def __getitem__(self, k: int) -> _Item | UserError:
        item = _Item(**self.batches[k])
        if self.images is not None:
            try:
                item["images"] = self.images.batch(item["indices"])
            except UserError as error:  # a worker process would raise it again with its traceback as the message
                return error
        return item


class _ResumableLoader(DataLoader):
    """Lightning's documented interface of a loader that may be resumed in the middle of an epoch.

    There is nothing to store: `ResumableSampler` starts at the Trainer's step.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""


def _unchanged(item: Any) -> Any:
    return item


def check_memory(what: str, needed: int, device: torch.device, advice: str) -> None:
    """Refuse what needs more bytes than a device, or this machine for the CPU, has in all.

    Raises:
        UserError: it does; the system would end the process without a word, once it had taken all memory.
    """
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        memory = module.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if needed > memory:
        raise UserError(
            f"{what} needs at least {needed / 2**30:,.0f} GiB for its images alone, and {device.type} has "
            f"{memory / 2**30:,.0f} GiB of memory; {advice}."
        )


def _free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a device with a memory of its own, None for one that shares the host's."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else None
