"""What a person sees while a network trains: pace, time left, and pictures."""

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from ddim.data.images import to_uint8
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.sampling import last_state
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.image_io import grid, save_png
from ddim.random import check_seed
from ddim.training.checkpoints import Checkpoints
from ddim.training.ema import EMA
from ddim.training.module import DiffusionModule

log = logging.getLogger(__name__)


class Progress(Callback):
    """Logs throughput and the time left, and says both in the run's log every `every` steps.

    Args:
        batch_size: the global batch.
        every: optimiser steps between two reports.
    """

    def __init__(self, batch_size: int, every: int) -> None:
        self.batch_size, self.every = batch_size, every
        self.step, self.since = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.step, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *args: Any) -> None:
        """Report, at the end of every `every`-th optimiser step."""
        step = trainer.global_step
        if step == self.step or step % self.every:
            return
        now = time.perf_counter()
        pace = (step - self.step) / (now - self.since)
        self.step, self.since = step, now
        seconds_left = (trainer.max_steps - step) / pace
        pl_module.log_dict({"train/images_per_second": pace * self.batch_size, "train/hours_left": seconds_left / 3600})
        if trainer.is_global_zero:
            loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
            log.info(
                "step %d of %d, loss %.4f, %.1f steps/s, %.0f images/s, %s left",
                step,
                trainer.max_steps,
                loss,
                pace,
                pace * self.batch_size,
                timedelta(seconds=round(seconds_left)),
            )


class DivergenceGuard(Callback):
    """Says when steps were skipped because their gradient was not finite, and ends a training that only skips.

    The count is kept on the device and looked at every `every` steps: to look is to wait for the device.

    Args:
        every: optimiser steps between two looks.
        most: skipped steps in a row that end the training.
    """

    def __init__(self, every: int, most: int) -> None:
        self.every, self.most = every, most
        self.step, self.reported = 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Do not report again what was reported before a resumption."""
        self.step, self.reported = trainer.global_step, int(pl_module.skipped[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Look, at the end of every `every`-th optimiser step.

        Raises:
            UserError: too many in a row were skipped; the last checkpoint and the weights before them are whole.
        """
        step = trainer.global_step
        if step == self.step or step % self.every:
            return
        self.step = step
        skipped, in_row = pl_module.skipped.tolist()
        pl_module.log("train/skipped_steps", float(skipped))
        if skipped > self.reported and trainer.is_global_zero:
            log.warning("step %d: %d steps so far had no finite gradient and were skipped", step, skipped)
        self.reported = skipped
        if in_row >= self.most:
            # Before the checkpoint callback, which comes last: this step is not saved yet.
            checkpoint = trainer.checkpoint_callback
            if isinstance(checkpoint, Checkpoints):
                checkpoint.save(trainer)
            raise UserError(
                f"the last {in_row} steps up to step {step} had no finite gradient, so the training has diverged; the "
                "state is saved. Try a smaller optim.lr, a longer optim.warmup, or trainer.precision=32-true."
            )


@dataclass(frozen=True)
class GridSpec:
    """The sample grid of a training run.

    Attributes:
        every: optimiser steps between two grids; 0 for none.
        n: images in a grid.
        seed: of their noise, the same in every grid; 0 .. 2**64 - 1.
        sampler: how they are sampled.

    Raises:
        ValueError: a negative `every`, n below 1, or a seed out of range.
    """

    every: int = 5000
    n: int = 64
    seed: int = 0
    sampler: SamplerSpec = field(default_factory=lambda: SamplerSpec(S=20))

    def __post_init__(self) -> None:
        if self.every < 0 or self.n < 1:
            raise ValueError(f"every={self.every} must be at least 0 and n={self.n} at least 1.")
        check_seed(self.seed)


class SampleGrid(Callback):
    """Samples the same noise again and again with the EMA weights, into `folder` and the loggers.

    Args:
        spec: what to sample and when.
        folder: gets step_00001000.png and so on.
        ema: the average, or None to sample with the online weights.
        batch_size: the global batch of training; no more images are sampled at once than a device trains on at once.
    """

    def __init__(self, spec: GridSpec, folder: Path, ema: EMA | None, batch_size: int) -> None:
        self.spec, self.folder, self.ema, self.batch_size = spec, folder, ema, batch_size
        self.last = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Do not repeat the grid of the step that a run resumes from."""
        self.last = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """Sample at the end of every `every`-th optimiser step, on the first process only (nothing is collective)."""
        step = trainer.global_step
        if not self.spec.every or step == self.last or step % self.spec.every or not trainer.is_global_zero:
            return
        self.last = step
        image = grid(self._sample(pl_module))
        path = self.folder / f"step_{step:08d}.png"
        save_png(image, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", image, step)

    @torch.no_grad()
    def _sample(self, module: DiffusionModule) -> Tensor:
        trainer = module.trainer
        # What fits in a training step fits here.
        micro = max(1, self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))
        batches = torch.arange(self.spec.n, device=module.device).split(micro)
        was_training = module.network.training
        module.network.eval()
        try:
            with self.ema.applied(module) if self.ema else nullcontext(), trainer.precision_plugin.forward_context():
                return torch.cat([self._sample_batch(module, indices) for indices in batches])
        finally:
            module.network.train(was_training)

    def _sample_batch(self, module: DiffusionModule, indices: Tensor) -> Tensor:
        spec, model = self.spec, module.spec
        x_T = initial_noise(indices, model.image_shape, spec.seed, device=module.device)
        states = spec.sampler.trajectory(
            module.model, model.schedule, x_T, prediction=model.prediction, seed=spec.seed, indices=indices
        )
        return to_uint8(last_state(states)).cpu()
