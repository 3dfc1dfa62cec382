"""Quality while training: samples of the averaged weights against real images, and the loss of held-out images.

The samples are those of `scripts/evaluate.py`, by the same code: the number of a step is the one that `evaluate.py`
gives for the checkpoint of that step, and its record has the same key.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ddim.checkpoints import LoadedModel, weights_hash
from ddim.config import FilePath
from ddim.data.datasets import DataSpec
from ddim.data.images import Images
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS, Processes, training_processes
from ddim.errors import Interrupted, UserError
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.metrics import MetricSpec, metric_name
from ddim.evaluation.session import Session
from ddim.evaluation.sweep import seconds_per_image, time_job
from ddim.inference.compute import ComputeSpec, evaluate_zeros
from ddim.random import check_seed
from ddim.results.records import record_key
from ddim.signals import StopSignals
from ddim.training.checkpoints import STATE, Checkpoints, step_file
from ddim.training.ema import EMA
from ddim.training.heldout import Batches, heldout_images, heldout_loss, load_heldout
from ddim.training.module import COUNTS, step_ended

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSpec:
    """What is measured while a network trains.

    Attributes:
        every: optimiser steps between two validations; 0 for none.
        n: generated images; 0 measures the held-out loss alone.
        heldout: images of the held-out loss, the first of the test split; all of them if there are fewer; 0 for none.
        weights: ema, online, ema_RATE, or a list; the first decides which checkpoint is best. None is ema, or online
            in a training without an average.
        seed: of the samples, and of the times and noise of the held-out loss, 0 .. 2**64 - 1.
        sampler, metric, reference_dir: as in `ddim.evaluation.fidelity.EvaluateSpec`; the reference is `data`.

    Raises:
        ValueError: a number out of range, nothing to measure, or a first metric that is no distance.
    """

    every: int = 0
    n: int = 2048
    heldout: int = 2048
    weights: str | tuple[str, ...] | None = None
    seed: int = 0
    sampler: SamplerSpec = field(default_factory=lambda: SamplerSpec(S=20))
    metric: MetricSpec = field(default_factory=lambda: MetricSpec("inception"))
    reference_dir: FilePath = "outputs/reference"

    def __post_init__(self) -> None:
        for name in ("every", "n", "heldout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.every and not (self.n or self.heldout):
            raise ValueError("n=0 and heldout=0 leave nothing to measure; set one of them, or every=0.")
        if self.metric.metrics[0] not in ("fd", "kd"):
            raise ValueError(
                f"metric.metrics={list(self.metric.metrics)} must begin with fd or kd, which choose the best."
            )
        if self.weights == ():
            raise ValueError("weights=[] must name at least one; null is the average, where there is one.")
        check_seed(self.seed)

    @property
    def decisive(self) -> str:
        """The metric that decides which checkpoint is best; less is better."""
        return metric_name(self.metric.metrics[0], self.metric.extractor, self.n) if self.n else "loss"

    def labels(self, has_average: bool) -> tuple[str, ...]:
        """Return the labels of the weights that are measured."""
        weights = self.weights or ("ema" if has_average else "online")
        return (weights,) if isinstance(weights, str) else weights


@dataclass(frozen=True, eq=False)
class _TrainedModel(LoadedModel):
    """The network that is being trained; a signal to stop ends what it is evaluated for."""

    stop: StopSignals | None

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        if self.stop is not None and self.stop.received is not None:
            raise Interrupted("stopped while the weights were being measured; go on with checkpoint=last.")
        return super().__call__(x_t, t, y)


class _TrainingSession(Session):
    """What one validation shares: the model and the images of the training are in memory already."""

    def __init__(self, processes: Processes, model: LoadedModel, images: Images) -> None:
        super().__init__(processes)
        self.trained, self.training_images = model, images

    def model(
        self, checkpoint: str, weights: str, compute: ComputeSpec, evaluations: int = 0, images: int = 1024
    ) -> tuple[LoadedModel, ComputeSpec]:
        """Return the model in memory."""
        return self.trained, compute

    def warn_once(self, warning: str | None) -> None:
        """Leave out warnings: they are for commands that evaluate."""

    def images(self, data: DataSpec, split: Literal["train", "test"]) -> Images:
        """Return the images of the training, or another split of its data."""
        return self.training_images if split == "train" else super().images(data, split)


class Validation(Callback):
    """Measures the weights every `spec.every` steps, on all processes together.

    A number goes to the loggers as val/..., and one of samples also into a record of the run. A validation that a
    signal ends is made up for when the run resumes.

    Args:
        spec: what is measured.
        job: the same as an evaluation, whose device, batch size and weights are set here; `compute.batch_size` is the
            global batch of training.
        ema: the averages, or None.
        reduction: of the loss over an image, a key of REDUCTIONS.
        checkpoints: keeps the best.
    """

    def __init__(
        self, spec: EvalSpec, job: EvaluateSpec, ema: EMA | None, reduction: str, checkpoints: Checkpoints
    ) -> None:
        self.spec, self.job, self.ema, self.reduction, self.checkpoints = spec, job, ema, reduction, checkpoints
        self.labels = spec.labels(ema is not None)
        # Numbers of other settings cannot be compared.
        self.protocol = record_key(dataclasses.asdict(spec) | {"every": None, "reference_dir": None})
        checkpoints.protocol = self.protocol
        self.step = 0  # of the last validation
        self.processes = SINGLE_PROCESS
        self.heldout: Batches = []  # the share of this process

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store which steps were measured, and which were best."""
        state = {"step": self.step, "protocol": self.protocol, "best": self.checkpoints.best}
        checkpoint.setdefault(COUNTS, {})[STATE] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore which step was measured, if the settings are those of before."""
        state = checkpoint.get(COUNTS, {}).get(STATE, {})
        if state.get("protocol") == self.protocol:
            self.step = int(state["step"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check everything, report the cost, and make up for a validation that was interrupted.

        Raises:
            UserError: bad input.
        """
        seconds = self.prepare(trainer, pl_module)
        if trainer.is_global_zero:
            log.info(
                "validation every %d steps, about %s each: %s",
                self.spec.every,
                timedelta(seconds=round(seconds)),
                self._describe(trainer),
            )
        step = trainer.global_step
        if step and step % self.spec.every == 0 and step != self.step:
            self._validate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Validate after every `every`-th optimiser step."""
        if step_ended(trainer, batch_idx, self.spec.every):
            self._validate(trainer, pl_module)

    def prepare(self, trainer: Trainer, module: LightningModule) -> float:
        """Check everything, load the held-out images, and return the seconds of a validation, from a short timing.

        Raises:
            UserError: bad input.
        """
        self.processes = training_processes(trainer.global_rank, trainer.world_size, trainer.local_rank)
        with self._session(trainer, module, self.labels[0]) as (session, job), self.processes.barrier():
            compute, model = job.compute, session.trained
            self.heldout = load_heldout(job.data, self.spec.heldout, compute.batch_size, self.processes)
            seconds = 0.0
            if self.spec.n:
                try:
                    prepared = job.prepare(session)
                    network, extraction = time_job(prepared)
                except UserError as error:
                    raise UserError(
                        f"eval.n={self.spec.n} cannot be measured ({str(error).rstrip('.')}); a training takes "
                        "metric@eval.metric=NAME, and eval.n=0 measures the held-out loss alone."
                    ) from error
                seconds = self.spec.n * (prepared.steps * network + extraction)
            else:
                network = seconds_per_image(
                    lambda count: evaluate_zeros(model, compute, count), compute.batch_size, compute.compiles
                )
        losses = sum(len(held.numbers) for held in self.heldout) * network
        return len(self.labels) * (seconds / self.processes.world_size + losses)

    def _describe(self, trainer: Trainer) -> str:
        """Return what is measured, in one line."""
        job, parts = self.job, []
        if self.spec.n:
            parts.append(f"{self.spec.decisive} of {self.spec.n:,} images ({job.title})")
        if self.spec.heldout:
            images: Images = trainer.datamodule.images  # type: ignore[attr-defined]
            chosen = heldout_images(images, self.spec.heldout)  # if the test split is the training images
            seen = all(
                held.numbers.stop <= len(chosen)
                and torch.equal(held.pixels, images.batch(chosen[held.numbers.start : held.numbers.stop]))
                for held in self.heldout
            )
            split = f"training images ({job.data.name} has no test split)" if seen else "images of the test split"
            parts.append(f"val/loss of up to {self.spec.heldout:,} {split}")
        return f"{', '.join(parts)}; {', '.join(self.labels)} weights"

    def _validate(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure all weights, log the numbers, and rank the step; a signal leaves it for the next run."""
        start = time.perf_counter()
        values: dict[str, float] = {}
        try:
            for label in self.labels:
                suffix = "" if label == self.labels[0] else f"_{label}"
                values |= {
                    f"val/{name}{suffix}": value for name, value in self._measure(trainer, module, label).items()
                }
        except (Interrupted, UserError):
            if not any(self.processes.gather(self.checkpoints.stop.received is not None)):
                raise
            trainer.should_stop = True
            return
        self.step = trainer.global_step
        best = self.checkpoints.rank(values[f"val/{self.spec.decisive}"], self.step)
        for logger in trainer.loggers:  # at once: Lightning would drop what is not at a step of `log_every`
            logger.log_metrics(values, step=self.step - 1)  # Lightning's number of the step that ended
            logger.save()
        if trainer.is_global_zero:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if "loss_quarter" not in name)
            log.info("step %d: %s (%.0f s)%s", self.step, numbers, time.perf_counter() - start, ", the best" * best)

    def _measure(self, trainer: Trainer, module: LightningModule, label: str) -> dict[str, float]:
        """Return the numbers of one set of weights, by name."""
        with self._session(trainer, module, label) as (session, job):
            losses = {}
            if self.spec.heldout:
                losses = heldout_loss(
                    session.trained, self.heldout, self.reduction, self.spec.seed, job.compute, self.processes
                )
            if not self.spec.n:
                return losses
            more = {"val_loss": losses["loss"]} if losses else {}
            record, _ = evaluate(job, session, more)
        return losses | {name: value for name, value in record["metrics"].items() if name != "val_loss"}

    @contextmanager
    def _session(self, trainer: Trainer, module: Any, label: str) -> Iterator[tuple[_TrainingSession, EvaluateSpec]]:
        """Give a session in which these weights are the model, and the evaluation of them.

        It is made anew for each validation, so that the extractor takes no memory of the device in between.
        """
        job, network, step = self.job, module.network, trainer.global_step
        micro = max(1, job.compute.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))
        job = dataclasses.replace(
            job,
            weights=label,
            checkpoint=str(step_file(self.checkpoints.folder, step)),
            compute=dataclasses.replace(job.compute, device=str(module.device), batch_size=micro),
        )
        # The last validation is finished in any case: a run at its last step does not resume.
        stop = self.checkpoints.stop if step < trainer.max_steps else None
        applied = nullcontext() if self.ema is None or label == "online" else self.ema.applied(module, label)
        was_training = network.training
        network.eval()
        try:
            with applied:
                hashed = weights_hash(network.state_dict())
                model = _TrainedModel(module.spec, network, label, hashed, step, stop, recipe=module.recipe)
                yield _TrainingSession(self.processes, model, trainer.datamodule.images), job  # type: ignore[attr-defined]
        finally:
            network.train(was_training)
