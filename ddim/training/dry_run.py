"""What a training run will cost, measured on a few real steps."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ddim.checkpoints.model import read_checkpoint
from ddim.checkpoints.posthoc import LENGTHS, snapshot_steps
from ddim.networks import float32_products
from ddim.signals import StopSignals
from ddim.training.ema import EMA
from ddim.training.module import step_ended
from ddim.training.posthoc_ema import PostHocEMA
from ddim.training.resume import explain_memory_errors
from ddim.training.run import build_callbacks, build_trainer, prepare
from ddim.training.spec import TrainSpec
from ddim.training.validation import Validation


def dry_run(spec: TrainSpec, steps: int = 10) -> list[str]:
    """Run `steps` training steps, save nothing, and return what the run will be, as human-readable lines.

    Raises:
        UserError: bad input, as from `train`.
    """
    model = spec.model_spec()
    spec, _, checkpoint, data, module = prepare(spec, model)
    done = read_checkpoint(checkpoint)["global_step"] if checkpoint else 0
    stopwatch = Stopwatch(first=2)
    callbacks = build_callbacks(spec, model, StopSignals())
    measured = [ValidationTimer(callback) for callback in callbacks if isinstance(callback, Validation)]
    averages = [callback for callback in callbacks if isinstance(callback, EMA | PostHocEMA)]
    used: list[Callback] = [*averages, stopwatch, *measured]
    trainer = build_trainer(spec, spec.folder, used, loggers=[], max_steps=stopwatch.first + steps)
    data.max_steps = max(data.max_steps, trainer.max_steps)  # of a run that is shorter
    with float32_products(bool(spec.trainer.tf32)), explain_memory_errors(trainer, spec.trainer.batch_size):
        trainer.fit(module, data)

    t, seconds = spec.trainer, stopwatch.seconds_per_step
    images = len(data.images)
    device = trainer.strategy.root_device
    parameters = sum(p.numel() for p in module.network.parameters())
    posthoc = len(LENGTHS) if spec.ema and spec.ema.posthoc else 0
    copies = 3 + (len(spec.ema.rates) if spec.ema else 0) + posthoc  # the weights, Adam's two moments, the EMAs
    size = 4 * parameters * copies  # of a checkpoint, in bytes
    snapshots = len(snapshot_steps(t.max_steps + 1))
    and_snapshots = f"; {snapshots} snapshots: {4 * parameters * posthoc * snapshots / 2**30:,.2f} GiB"
    kept = t.keep_last + (t.max_steps // t.keep_every if t.keep_every else 0) + (t.keep_best if measured else 0)
    kept += 1  # while it is written
    left = t.max_steps - done
    validations = t.max_steps // spec.eval.every - done // spec.eval.every if measured else 0
    each = sum(timer.seconds for timer in measured)
    and_validations = f" and {validations:,} validations of {each:.3g} s" if validations else ""
    return [
        f"network: {model.network}, {parameters:,} parameters, images {'x'.join(map(str, model.image_shape))}",
        f"data: {spec.data.name}, {images:,} images; {t.max_steps:,} steps of {t.batch_size} are "
        f"{t.max_steps * t.batch_size / images:,.1f} epochs",
        f"devices: {trainer.world_size} x {device.type}, {t.accumulate} x "
        f"{t.batch_size // (trainer.world_size * t.accumulate)} images each in a step; {t.precision}",
        f"schedule: {model.schedule.name}, T={model.schedule.T}; prediction {model.prediction}",
        f"throughput: {seconds:.3g} s/step over {stopwatch.steps} steps, {t.batch_size / seconds:,.0f} images/s",
        f"time: {timedelta(seconds=round(seconds * left + each * validations))} for {left:,} steps"
        f"{f' from step {done:,} on' if done else ''}{and_validations}, grids not counted",
        f"memory: {_peak_memory(device) / 2**30:.2f} GiB at most on {device.type} so far",
        f"disk: {size / 2**20:,.0f} MiB a checkpoint, {kept} at most: {kept * size / 2**30:,.2f} GiB"
        f"{and_snapshots if posthoc else ''}",
        f"folder: {spec.output_dir}",
        "no checkpoint was written; leave dry_run out to train.",
    ]


class ValidationTimer(Callback):
    """Times a validation after the last step, with the memory that training has taken.

    Args:
        validation: is prepared, and not run.
    """

    def __init__(self, validation: Validation) -> None:
        self.validation, self.seconds = validation, 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the seconds of a validation."""
        self.seconds = self.validation.prepare(trainer, pl_module)


class Stopwatch(Callback):
    """Times the optimiser steps of a training, without the first few, which compile and allocate.

    Args:
        first: steps before the clock starts.
        clock: returns seconds.
    """

    def __init__(self, first: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.first, self.clock = first, clock
        self.steps = 0  # that were timed
        self.times: list[float] = []  # after step `first`, and after the last step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock twice; in between nothing waits for the device, as in a real training."""
        if step_ended(trainer, batch_idx) and trainer.global_step in (self.first, trainer.max_steps):
            if pl_module.device.type != "cpu":
                torch.accelerator.synchronize(pl_module.device)
            self.times.append(self.clock())
            self.steps = trainer.global_step - self.first

    @property
    def seconds_per_step(self) -> float:
        """The mean over the timed steps."""
        begin, end = self.times
        return (end - begin) / self.steps


def _peak_memory(device: torch.device) -> int:
    """Return bytes: of the device's allocator, or of this process where the device uses the host's memory."""
    if device.type == "cpu":
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated(device)
