"""What a training is going to cost, from a few real steps."""

import resource
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ddim.checkpoints import ModelSpec
from ddim.training.spec import TrainSpec


class Stopwatch(Callback):
    """Times the optimiser steps of a training but the first few, which compile and allocate.

    Args:
        first: steps before the clock starts.
        clock: returns seconds.
    """

    def __init__(self, first: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.first, self.step, self.clock = first, 0, clock
        self.times: list[float] = []  # the clock after step `first`, and after the last step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the time where it starts and ends; in between the device is not waited for, as in a real training."""
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        if self.step in (self.first, trainer.max_steps):
            if pl_module.device.type != "cpu":
                torch.accelerator.synchronize(pl_module.device)
            self.times.append(self.clock())

    @property
    def steps(self) -> int:
        """How many steps were timed."""
        return self.step - self.first

    @property
    def seconds_per_step(self) -> float:
        """The mean over the steps that count."""
        begin, end = self.times
        return (end - begin) / self.steps


def plan(
    spec: TrainSpec, model: ModelSpec, parameters: int, images: int, stopwatch: Stopwatch, trainer: Trainer, done: int
) -> list[str]:
    """Return the plan of a run in lines for people.

    Args:
        spec, model: the run.
        parameters: of the network.
        images: of the training set.
        stopwatch, trainer: of the few steps.
        done: steps that are behind the run already.
    """
    t, pace = spec.trainer, stopwatch.seconds_per_step
    left = timedelta(seconds=round(pace * (t.max_steps - done)))
    sets = 3 + (len(spec.ema.rates) if spec.ema else 0)  # the weights, Adam's two moments, the averages
    checkpoint = 4 * parameters * sets
    kept = t.keep_last + (t.max_steps // t.keep_every if t.keep_every else 0) + 1  # one more while it is written
    device = trainer.strategy.root_device
    micro = t.batch_size // (trainer.world_size * t.accumulate)
    epochs = t.max_steps * t.batch_size / images
    return [
        f"network: {model.network}, {parameters:,} parameters, images {'x'.join(map(str, model.image_shape))}",
        f"data: {spec.data.name}, {images:,} images; {t.max_steps:,} steps of {t.batch_size} are {epochs:,.1f} epochs",
        f"devices: {trainer.world_size} x {device.type}, {t.accumulate} x {micro} images each in a step; {t.precision}",
        f"schedule: {model.schedule.name}, T={model.schedule.T}; prediction {model.prediction}",
        f"pace: {pace:.3g} s a step over {stopwatch.steps} steps, {t.batch_size / pace:,.0f} images/s",
        f"time: {left} for {t.max_steps - done:,} steps{f' from step {done:,} on' if done else ''}, grids not counted",
        f"memory: {_peak_memory(device) / 2**30:.2f} GiB at most on {device.type} so far",
        f"disk: {checkpoint / 2**20:,.0f} MiB a checkpoint, {kept} at most: {kept * checkpoint / 2**30:,.2f} GiB",
        f"folder: {spec.output_dir}",
        "no checkpoint was written; leave dry_run out to train.",
    ]


def _peak_memory(device: torch.device) -> int:
    """Return bytes: of the device's allocator, or of this process where the host's memory is the device's."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.get_device_module(device).max_memory_allocated(device)
