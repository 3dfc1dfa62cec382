"""The LightningModule: it owns no formula, only the order of the calls."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ddim.checkpoints import ModelSpec
from ddim.checkpoints.model import RECIPE
from ddim.checkpoints.spec import KEY
from ddim.config import choose
from ddim.data.batches import Batch
from ddim.diffusion.objective import REDUCTIONS, TIME_SAMPLERS, per_sample_loss, training_noise
from ddim.diffusion.prediction import PREDICTIONS
from ddim.diffusion.sampling import Model
from ddim.networks import build_network, zero_based
from ddim.random import DROPOUT, WEIGHTS, random_words

COUNTS = "ddim_counts"  # the entry of a training checkpoint with what its logs count


@dataclass(frozen=True)
class ObjectiveSpec:
    """The loss, by the names of its parts.

    Attributes:
        prediction: what the network learns, a key of PREDICTIONS: eps, x0 or v.
        reduction: over the dimensions of an image, a key of REDUCTIONS: mean (Ho et al.) or sum (the official
            implementation).
        times: a key of TIME_SAMPLERS: uniform (Ho et al.) or antithetic (the official implementation).

    Raises:
        UserError: an unknown name.
    """

    prediction: str = "eps"
    reduction: str = "mean"
    times: str = "uniform"

    def __post_init__(self) -> None:
        choose("objective.prediction", self.prediction, PREDICTIONS)
        choose("objective.reduction", self.reduction, REDUCTIONS)
        choose("objective.times", self.times, TIME_SAMPLERS)


@dataclass(frozen=True)
class OptimSpec:
    """Adam, as every model of the paper was trained.

    Attributes:
        lr: learning rate after warm-up.
        betas, eps, weight_decay: Adam's.
        warmup: steps over which the learning rate rises linearly to lr; 0 for none.
        grad_clip: the largest norm of the gradient; null for no clipping.

    Raises:
        ValueError: a negative number, or a zero learning rate.
    """

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 5000
    grad_clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive.")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("warmup and weight_decay must not be negative.")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"grad_clip={self.grad_clip} must be positive, or null for no clipping.")


class DiffusionModule(LightningModule):
    """Trains a network towards the objective; all randomness is addressed by (seed, step, position).

    Args:
        spec: the model; stored in every checkpoint.
        objective: the loss.
        optim: the optimiser.
        seed: of the initial weights, times, noise and dropout.
        recipe: plain values, stored in every checkpoint: what else decides the weights.
    """

    adam: torch.optim.Adam
    skipped: Tensor
    losses: Tensor

    def __init__(
        self,
        spec: ModelSpec,
        objective: ObjectiveSpec,
        optim: OptimSpec,
        seed: int,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.recipe = dict(recipe or {})
        self.spec, self.objective, self.optim, self.seed = spec, objective, optim, seed
        with _seeded(int(random_words(seed, WEIGHTS, 0, [0]))):
            self.network = build_network(spec.network, spec.network_spec)
        self.register_buffer("alpha_bar", spec.schedule.alpha_bar, persistent=False)
        # Steps without a finite gradient: all of this process, and those in a row up to now.
        self.register_buffer("skipped", torch.zeros(2, dtype=torch.int64), persistent=False)
        # Sums and numbers of this process's finite losses at times in each quarter of 1..T since they were logged.
        self.register_buffer("losses", torch.zeros(2, 4), persistent=False)
        # DDP would send the first process's to the others at every step: one is a constant, two are counted by each.
        self._ddp_params_and_buffers_to_ignore = ["alpha_bar", "skipped", "losses"]

    @property
    def model(self) -> Model:
        """The network behind its time adapter: called with the paper's times."""
        return zero_based(self.network)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch."""
        x0, step, positions = batch["images"], batch["step"], batch["positions"]
        t = TIME_SAMPLERS[self.objective.times](self.spec.schedule.T, self.seed, step, positions)
        eps = training_noise(self.seed, step, positions, x0.shape[1:])
        with self._addressed_dropout(step, batch_idx):
            losses = per_sample_loss(
                self.model,
                self.alpha_bar,  # type: ignore[arg-type]
                x0,
                t,
                eps,
                prediction=self.objective.prediction,
                reduction=self.objective.reduction,
            )
        quarter = (t - 1) * 4 // self.spec.schedule.T
        values, finite = losses.detach().float(), losses.detach().isfinite()
        self.losses.index_add_(1, quarter, torch.stack([values.where(finite, 0), finite.float()]))
        return losses.mean()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the whole gradient, and let Adam skip a step whose gradient is not finite.

        All on the device: fused Adam reads `found_inf` there. After the sum over processes all of them agree.
        """
        parameters = list(self.network.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        skip = ~norm.isfinite()
        self.adam.found_inf = skip.float()  # type: ignore[attr-defined]
        self.skipped[0] += skip
        self.skipped[1] = (self.skipped[1] + 1) * skip
        self.log("train/gradient_norm", norm)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the mean loss over the samples of all processes since it was logged last, and by quarters of times."""
        trainer = self.trainer
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        sums, numbers = self._losses_of_all()
        self.log("train/loss", sums.sum() / numbers.sum())
        self.log_dict({f"train/loss_quarter_{i + 1}": mean for i, mean in enumerate(sums / numbers)})
        self.losses.zero_()

    def configure_optimizers(self) -> Any:
        """Return Adam with a linear warm-up: at step k = 1, 2, ... the learning rate is lr min(1, k / warmup)."""
        o = self.optim
        self.adam = torch.optim.Adam(
            self.network.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        warmup = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda k: min(1.0, (k + 1) / max(o.warmup, 1)))
        return {"optimizer": self.adam, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint describe itself."""
        checkpoint[KEY] = self.spec.to_dict() | {RECIPE: self.recipe}
        # Callbacks save before this module logs: what this very step is going to log is not to be logged again.
        logged = self.trainer.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        losses = torch.zeros_like(self.losses) if logged else self._losses_of_all()
        checkpoint[COUNTS] = {"skipped": self.skipped, "losses": losses}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting; and let Lightning count whole optimiser steps behind it, in the micro-batches of this run.

        Its own count is in those of the run that wrote the checkpoint, whose accumulation may differ, and it holds half
        a step when a resumed run was saved again before its first step.
        """
        if kept := checkpoint.get(COUNTS):  # older checkpoints have none
            self.skipped.copy_(kept["skipped"])
            self.losses.copy_(kept["losses"] * self.trainer.is_global_zero)  # the sums over all, kept by one
        past = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        loop = checkpoint["loops"]["fit_loop"]
        # 1 when saved in the hooks of the batch that ended the step: Lightning then completes that batch itself.
        uncompleted = checkpoint["global_step"] - loop["epoch_loop.state_dict"]["_batches_that_stepped"]
        for counts in (loop["epoch_loop.batch_progress"]["total"], loop["epoch_loop.batch_progress"]["current"]):
            counts.update(ready=past, started=past, processed=past, completed=past - uncompleted)

    def _losses_of_all(self) -> Tensor:
        """Return the sums and numbers of losses over all processes, (2, 4); all of them must ask."""
        return self.trainer.strategy.reduce(self.losses.clone(), reduce_op="sum")

    def _addressed_dropout(self, step: int, batch_idx: int) -> AbstractContextManager[None]:
        """Seed what torch's dropout draws from by (seed, step, micro-batch, process)."""
        if not getattr(self.spec.network_spec, "dropout", 0):
            return nullcontext()
        trainer = self.trainer
        micro = batch_idx % trainer.accumulate_grad_batches * trainer.world_size + trainer.global_rank
        return _seeded(int(random_words(self.seed, DROPOUT, step, [micro])), self.device)


@contextmanager
def _seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's generators of the CPU and of `device`, and leave no trace of it afterwards."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
