"""What is logged while a network trains: loss, skipped steps, sample grids; throughput is in progress.py."""

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from ddim.data.datamodule import check_memory
from ddim.data.images import to_uint8
from ddim.diffusion.labels import title
from ddim.diffusion.sampling import last_state
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.image_io import class_grid, grid, save_png
from ddim.random import check_seed
from ddim.training.checkpoints import Checkpoints
from ddim.training.ema import EMA
from ddim.training.module import COUNTS, DiffusionModule, step_ended

log = logging.getLogger(__name__)


class LossByTime(Callback):
    """Logs the mean loss, and that of each quarter of the times 1..T, over all samples since it was logged last.

    Of a conditional network also that of the samples with a label, and of those without.

    Losses that are not finite are left out. What was not logged yet is part of a checkpoint, so that a resumed run logs
    the same numbers. A step is saved after it is logged: this callback comes before those that save.

    Args:
        T: the largest time.
        every: optimiser steps between two logs.
        classes: K of a conditional network; None for an unconditional one.
    """

    def __init__(self, T: int, every: int, classes: int | None = None) -> None:
        self.T, self.every, self.classes = T, every, classes
        # Of this process's weighted losses, and of their weights: by quarter, with a label, then without.
        self.sums = torch.zeros(2, 4 if classes is None else 8)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the sums over all processes, on one of them."""
        losses = checkpoint.get(COUNTS, {}).get("losses")
        if losses is not None:  # older checkpoints have none
            self.sums = losses * trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the sums to the device."""
        self.sums = self.sums.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the losses of a micro-batch; log after every `every`-th optimiser step."""
        finite = outputs["losses"].isfinite()
        values, weights = outputs["losses"].float().where(finite, 0), outputs["weights"].where(finite, 0)
        column = (outputs["t"] - 1) * 4 // self.T
        if self.classes is not None:
            column = column + 4 * (outputs["y"] == self.classes)
        self.sums.index_add_(1, column, torch.stack([weights * values, weights]))
        if step_ended(trainer, batch_idx, self.every):
            sums, numbers = self._over_processes(trainer).unflatten(1, (-1, 4))
            pl_module.log("train/loss", sums.sum() / numbers.sum())
            quarters = sums.sum(0) / numbers.sum(0)
            pl_module.log_dict({f"train/loss_quarter_{i + 1}": mean for i, mean in enumerate(quarters)})
            if self.classes is not None:
                conditional, unconditional = sums.sum(1) / numbers.sum(1)
                pl_module.log_dict({"train/loss_conditional": conditional, "train/loss_unconditional": unconditional})
            self.sums.zero_()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the sums over all processes."""
        checkpoint.setdefault(COUNTS, {})["losses"] = self._over_processes(trainer)

    def _over_processes(self, trainer: Trainer) -> Tensor:
        """Return the sums over all processes, (2, 4 or 8); all of them must call this."""
        # NCCL takes no tensor of the CPU, where a resumed run that is finished leaves them.
        return trainer.strategy.reduce(self.sums.to(trainer.strategy.root_device, copy=True), reduce_op="sum")


class DivergenceGuard(Callback):
    """Warns of steps that were skipped because their gradient was not finite, and ends a training that only skips.

    The count is on the device, and to read it is to wait for the device; so it is read every `every` steps.

    Args:
        every: optimiser steps between two checks.
        most: skipped steps in a row that end the training.
    """

    def __init__(self, every: int, most: int) -> None:
        self.every, self.most, self.reported = every, most, 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Do not report again what was reported before resuming."""
        self.reported = int(pl_module.skipped[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check after every `every`-th optimiser step.

        Raises:
            UserError: too many in a row were skipped; a checkpoint is saved first (the weights are those before them).
        """
        if not step_ended(trainer, batch_idx, self.every):
            return
        step = trainer.global_step
        skipped, in_row = pl_module.skipped.tolist()
        pl_module.log("train/skipped_steps", float(skipped))
        if skipped > self.reported and trainer.is_global_zero:
            log.warning("step %d: %d steps so far had no finite gradient and were skipped", step, skipped)
        self.reported = skipped
        if in_row >= self.most:
            # Lightning calls checkpoint callbacks last, so this step is not saved yet.
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
        sampler: the sampler, its steps and options.

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
    """Samples from the same noise every time, with the EMA weights, into `folder` and the loggers.

    Of a conditional network, image i has the label i mod K, and each class a row.

    Args:
        spec: what to sample and when.
        folder: gets step_00001000.png and so on.
        ema: the EMA, or None to sample with the online weights.
        batch_size: the global batch of training; no more images are sampled at once than a device trains on at once.
    """

    def __init__(self, spec: GridSpec, folder: Path, ema: EMA | None, batch_size: int) -> None:
        self.spec, self.folder, self.ema, self.batch_size = spec, folder, ema, batch_size

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a grid that is larger than the memory."""
        if self.spec.every:
            pixels = math.prod(pl_module.spec.image_shape)
            check_memory(
                f"grid.n={self.spec.n}", self.spec.n * pixels, torch.get_default_device(), "choose a smaller one"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sample after every `every`-th optimiser step, on rank 0 only (nothing is collective)."""
        every, step = self.spec.every, trainer.global_step
        if not every or not trainer.is_global_zero or not step_ended(trainer, batch_idx, every):
            return
        images, K = self._sample(pl_module), pl_module.spec.num_classes
        image = grid(images) if K is None else class_grid(images, torch.arange(len(images)) % K)
        path = self.folder / f"step_{step:08d}.png"
        save_png(image, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=step, caption=[self.caption(step)])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", image, step)

    def caption(self, step: int) -> str:
        """Return what a grid shows."""
        weights = "online weights" if self.ema is None else f"EMA {self.ema.spec.rates[0]:g}"
        return f"step {step:,}, {weights}, {title(self.spec.sampler)}, seed {self.spec.seed}"

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
        x_T = model.x_T(indices, spec.seed, module.device)
        K = model.num_classes
        labelled = module.model if K is None else partial(module.model, y=indices % K)
        states = spec.sampler.trajectory(
            labelled, model.schedule, x_T, prediction=model.prediction, seed=spec.seed, indices=indices
        )
        return to_uint8(last_state(states)).cpu()
