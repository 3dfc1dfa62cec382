"""The averages from which scripts/ema.py makes that of any length after a training."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ddim.checkpoints.posthoc import (
    LENGTHS,
    MAX_LENGTH,
    MAX_SHARE,
    STATE,
    longest_from,
    snapshot_file,
    snapshot_steps,
    snapshot_tensors,
    training_of,
    update_rate,
)
from ddim.io import partial_files, write_safetensors
from ddim.training.ema import parameters

log = logging.getLogger(__name__)


class PostHocEMA(Callback):
    """Keeps the averages of `module.network`'s parameters of the lengths LENGTHS, and writes them at `snapshot_steps`.

    Like `EMA` it is updated once per optimiser step and counts parameters only. A snapshot is written before any
    checkpoint of its step, so that no kill loses one; one that is written again after resuming is the same.

    Args:
        folder: gets the snapshots.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.averages: dict[float, dict[str, Tensor]] = {length: {} for length in LENGTHS}
        self.start: int | None = None  # the step at which the averages began, with the weights of that step
        self.updates = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the weights of this step, or move the restored averages to the device."""
        self.updates = trainer.global_step
        if self.start is None:
            self.start = self.updates
            if (
                self.start
                and trainer.is_global_zero
                and (longest := longest_from(self.start, trainer.max_steps)) < MAX_LENGTH
            ):
                log.warning(
                    "ema.posthoc: averaging begins at step %d, with the weights of that step; at step %d they still "
                    "count for more than %g %% in averages of a length above %.2g.",
                    self.start,
                    trainer.max_steps,
                    100 * MAX_SHARE,
                    longest,
                )
        named = parameters(pl_module)
        self.averages = {
            length: {name: torch.empty_like(p).copy_(average.get(name, p)).detach() for name, p in named}
            for length, average in self.averages.items()
        }

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update the averages if this batch ended an optimiser step, and write them if they are due."""
        if trainer.global_step <= self.updates:
            return
        self.updates = trainer.global_step
        weights = [parameter.detach() for _, parameter in parameters(pl_module)]
        for length, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), weights, update_rate(length, self.updates))
        if trainer.is_global_zero and self.updates in snapshot_steps(self.updates + 1):
            for partial in partial_files(self.folder):  # left by a write that was killed
                partial.unlink()
            recipe: dict[str, Any] = pl_module.recipe  # type: ignore[assignment]
            path = snapshot_file(self.folder, self.updates)
            write_safetensors(path, snapshot_tensors(self.averages), training_of(recipe))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the averages; not under `callbacks`, where Lightning would miss them in a run without this callback."""
        if self.start is not None:
            averages = {f"{length:g}": average for length, average in self.averages.items()}
            checkpoint[STATE] = {"start": self.start, "averages": averages}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore them, if the run had them."""
        if state := checkpoint.get(STATE):
            self.start = state["start"]
            self.averages = {length: dict(state["averages"][f"{length:g}"]) for length in LENGTHS}
