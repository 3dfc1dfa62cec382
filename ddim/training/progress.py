"""How far a training is: a bar on terminals, lines in the log, throughput among the metrics."""

import logging
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm

from ddim.training.module import step_ended

log = logging.getLogger(__name__)
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
REFRESH = 1.0  # seconds; to read the loss is to wait for the device


class Progress(Callback):
    """Logs throughput and the remaining time, as metrics and as lines of the run's log; rank 0 shows a bar.

    The bar counts optimiser steps; those before resuming count in it, but not in its rate. It shows on terminals only.

    Args:
        batch_size: the global batch.
        every: optimiser steps between two reports in the log.
    """

    def __init__(self, batch_size: int, every: int) -> None:
        self.batch_size, self.every = batch_size, every
        self.step, self.since = 0, 0.0  # of the last report
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and the bar at the step that is resumed from."""
        self.step, self.since = trainer.global_step, time.perf_counter()
        if trainer.is_global_zero:
            self.bar = tqdm(
                desc="training",
                total=trainer.max_steps,
                initial=trainer.global_step,
                bar_format=BAR,
                mininterval=REFRESH,
                smoothing=0.1,  # the rate of about the last ten seconds
                dynamic_ncols=True,
                disable=None,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar; report after every `every`-th optimiser step."""
        if not step_ended(trainer, batch_idx):
            return
        if self.bar is not None and self.bar.update():
            rate = self.bar.format_dict["rate"]
            images = f", {rate * self.batch_size:,.0f} images/s" if rate else ""
            self.bar.set_postfix_str(f"loss {_loss(trainer, outputs):.4f}{images}")
        if trainer.global_step % self.every == 0:
            self._report(trainer, pl_module, outputs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is at the end."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bar, so that the reason is on a line of its own."""
        self.on_train_end(trainer, pl_module)

    def _report(self, trainer: Trainer, pl_module: LightningModule, outputs: Any) -> None:
        step, now = trainer.global_step, time.perf_counter()
        steps_per_second = (step - self.step) / (now - self.since)
        self.step, self.since = step, now
        images_per_second = steps_per_second * self.batch_size
        seconds_left = (trainer.max_steps - step) / steps_per_second
        pl_module.log_dict({"train/images_per_second": images_per_second, "train/hours_left": seconds_left / 3600})
        if trainer.is_global_zero:
            log.info(
                "step %d of %d, loss %.4f, %.1f steps/s, %.0f images/s, %s left",
                step,
                trainer.max_steps,
                _loss(trainer, outputs),
                steps_per_second,
                images_per_second,
                timedelta(seconds=round(seconds_left)),
            )


def _loss(trainer: Trainer, outputs: Any) -> float:
    return float(outputs["loss"]) * trainer.accumulate_grad_batches
