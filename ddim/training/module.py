"""The LightningModule: it owns no formula, only the order of the calls."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from ddim.checkpoints import ModelSpec
from ddim.checkpoints.model import RECIPE, WANDB_RUN
from ddim.checkpoints.spec import KEY
from ddim.config import choose
from ddim.data.batches import Batch
from ddim.diffusion import multinomial
from ddim.diffusion.importance import LOSS_SECOND_MOMENT, empty_history, importance_times, record_losses
from ddim.diffusion.learned_variance import VARIANCES
from ddim.diffusion.objective import (
    LOSS_WEIGHTS,
    REDUCTIONS,
    TIME_SAMPLERS,
    drop_labels,
    per_sample_loss,
    training_noise,
)
from ddim.diffusion.prediction import PREDICTIONS
from ddim.diffusion.sampling import Model
from ddim.networks import build_network, zero_based
from ddim.random import DROPOUT, TRAINING_NOISE, WEIGHTS, random_words
from ddim.training.lightning_workarounds import count_complete_steps, keep_buffers_local, skip_step_if

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, for each parameter
COMPUTED = "computed"  # in the description: how the weights were trained, where that was chosen; decides nothing
COUNTS = "ddim_counts"  # entry of a training checkpoint: counters behind the logged numbers


@dataclass(frozen=True)
class ObjectiveSpec:
    """The loss.

    Attributes:
        prediction: what the network learns, a key of PREDICTIONS: eps, x0 or v.
        reduction: over the dimensions of an image, a key of REDUCTIONS: mean (Ho et al.) or sum (the official
            implementation).
        times: a key of TIME_SAMPLERS: uniform (Ho et al.) or antithetic (the official implementation); or
            loss_second_moment, importance sampling (Nichol and Dhariwal 2021, for weight=vlb).
        weight: of the squares, one of LOSS_WEIGHTS: simple (Ho et al.), min_snr, vlb or hybrid; see `per_sample_loss`.
        gamma: γ of min_snr.
        vlb_weight: λ of hybrid.
        variance: a key of VARIANCES: fixed, or learned_range, for which the network gets twice the output channels.
        multinomial: the loss where pixels are one of K categories, a key of `ddim.diffusion.multinomial.LOSSES`, for
            the largest σ; null where they are numbers. It is the mean over pixels of a prediction of x0.
        label_drop: of a conditional network, the probability with which a sample is trained on without its label, for
            guidance; in [0, 1).

    Raises:
        UserError: an unknown name.
        ValueError: a number out of range, a weight that leaves a learned variance without a gradient, or needs
            one, or a multinomial loss with another prediction, reduction, weight or variance.
    """

    prediction: str = "eps"
    reduction: str = "mean"
    times: str = "uniform"
    weight: str = "simple"
    gamma: float = 5.0
    vlb_weight: float = 0.001
    variance: str = "fixed"
    multinomial: str | None = None
    label_drop: float = 0.1

    def __post_init__(self) -> None:
        choose("objective.prediction", self.prediction, PREDICTIONS)
        choose("objective.reduction", self.reduction, REDUCTIONS)
        choose("objective.times", self.times, {**TIME_SAMPLERS, LOSS_SECOND_MOMENT: None})
        choose("objective.weight", self.weight, dict.fromkeys(LOSS_WEIGHTS))
        choose("objective.variance", self.variance, VARIANCES)
        for name in ("gamma", "vlb_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop={self.label_drop} must be a probability in [0, 1); use 0 to drop no label.")
        if self.variance == "fixed" and self.weight == "hybrid":
            raise ValueError("weight=hybrid trains a learned variance; set variance=learned_range, or weight=simple.")
        if self.variance != "fixed" and self.weight not in ("vlb", "hybrid"):
            raise ValueError(
                f"variance={self.variance} is not trained by weight={self.weight}; set weight=hybrid or weight=vlb."
            )
        if self.multinomial is not None:
            choose("objective.multinomial", self.multinomial, multinomial.LOSSES)
            if (self.prediction, self.reduction, self.weight, self.variance) != ("x0", "mean", "simple", "fixed"):
                raise ValueError(
                    f"multinomial={self.multinomial} needs prediction=x0, reduction=mean, weight=simple "
                    "and variance=fixed."
                )

    def recipe(self) -> dict[str, Any]:
        """Return the fields that decide the weights; newer ones where they are set, so that old runs can be resumed."""
        default, old = ObjectiveSpec(), ("prediction", "reduction", "times")
        return {k: v for k, v in asdict(self).items() if k in old or v != getattr(default, k)}


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
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps < 0:
            raise ValueError(f"betas={list(self.betas)} must be in [0, 1), and eps={self.eps} must not be negative.")
        if self.warmup < 0 or self.weight_decay < 0:
            raise ValueError("warmup and weight_decay must not be negative.")
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(f"grad_clip={self.grad_clip} must be positive, or null for no clipping.")


class DiffusionModule(LightningModule):
    """Trains a network on the objective.

    Times, noise and dropped labels are functions of (seed, step, position); dropout of (seed, step, micro-batch,
    process).

    Args:
        spec: the model; stored in every checkpoint.
        objective: the loss.
        optim: the optimiser.
        seed: of the initial weights, times, noise and dropout.
        recipe: plain values, stored in every checkpoint: everything else that determines the weights.
    """

    adam: torch.optim.Adam
    skipped: Tensor
    loss_history: Tensor

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
        self.computed: dict[str, str] = {}  # the settings that were chosen, and why; stored in every checkpoint
        self.spec, self.objective, self.optim, self.seed = spec, objective, optim, seed
        with _seeded(int(random_words(seed, WEIGHTS, 0, [0]))):
            self.network = build_network(spec.network, spec.network_spec)
        self.register_buffer("alpha_bar", spec.schedule.alpha_bar, persistent=False)
        # Steps whose gradient was NaN or infinite: all so far, and those in a row up to now.
        self.register_buffer("skipped", torch.zeros(2, dtype=torch.int64), persistent=False)
        self.register_buffer("loss_history", empty_history(spec.schedule.T), persistent=False)  # of importance sampling
        self._drawn: list[Tensor] = []  # position, time and loss of the samples of this step, by micro-batch
        keep_buffers_local(self, ["alpha_bar", "skipped", "loss_history"])

    @property
    def has_importance_times(self) -> bool:
        """Whether times are drawn by the losses of earlier steps."""
        return self.objective.times == LOSS_SECOND_MOMENT

    @property
    def model(self) -> Callable[..., Tensor]:
        """The network behind its time adapter: called with the paper's times, and with labels if it is conditional."""
        return zero_based(self.network)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Return loss: the weighted mean over the micro-batch, (); losses: (b,), detached, their t in 1..T and weights.

        The weights are 1 unless times are sampled by importance. Of a conditional network also y, its labels: (b,).
        """
        x0, step, positions = batch["images"], batch["step"], batch["positions"]
        conditional: dict[str, Tensor] = {}
        if (K := self.spec.num_classes) is not None:
            drop = self.objective.label_drop
            conditional = {"y": drop_labels(batch["labels"], K, drop, self.seed, step, positions)}
        if self.has_importance_times:
            t, weights = importance_times(self.loss_history, self.seed, step, positions)
        else:
            t = TIME_SAMPLERS[self.objective.times](self.spec.schedule.T, self.seed, step, positions)
            weights = torch.ones(len(x0), device=x0.device)
        with self._addressed_dropout(step, batch_idx):
            losses = self._losses(partial(self.model, **conditional), x0, t, step, positions)
        if self.has_importance_times:
            self._drawn.append(torch.stack([x.double() for x in (positions, t, losses.detach())], 1))
        means = {"loss": (weights * losses).mean(), "losses": losses.detach()}
        return means | {"t": t, "weights": weights} | conditional

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Record the losses of the step, of all processes and micro-batches, for the times of later steps."""
        if not self.has_importance_times:
            return
        samples = torch.cat(self._drawn)
        # By position in the global batch: each process knows its own, and 0 for the others.
        batch = samples.new_zeros(len(samples) * self.trainer.world_size, 2)
        batch[samples[:, 0].long()] = samples[:, 1:]
        t, losses = self.trainer.strategy.reduce(batch, reduce_op="sum").T
        self.loss_history.copy_(record_losses(self.loss_history, t.long(), losses))
        self._drawn.clear()

    def _losses(self, model: Model, x0: Tensor, t: Tensor, step: int, positions: Tensor) -> Tensor:
        alpha_bar: Tensor = self.alpha_bar  # type: ignore[assignment]
        if self.objective.multinomial is not None:
            words = multinomial.words_of(self.seed, TRAINING_NOISE, step, positions, x0.shape[1:])
            K = self.spec.categories or 0
            return multinomial.per_sample_loss(model, alpha_bar, x0, t, words, K, self.objective.multinomial)
        eps = training_noise(self.seed, step, positions, x0.shape[1:])
        return per_sample_loss(
            model,
            alpha_bar,
            x0,
            t,
            eps,
            prediction=self.objective.prediction,
            reduction=self.objective.reduction,
            weight=self.objective.weight,
            gamma=self.objective.gamma,
            vlb_weight=self.objective.vlb_weight,
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient by its global norm, and skip the step if it is not finite; nothing waits for the device.

        DDP has summed the gradients before, so all processes skip the same steps.
        """
        parameters = list(self.network.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        skip = ~norm.isfinite()
        skip_step_if(self.adam, skip)
        self.skipped[0] += skip
        self.skipped[1] = (self.skipped[1] + 1) * skip
        self.log("train/gradient_norm", norm)
        log_every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % log_every == 0:  # to copy a number to the device is to wait for it
            self.log("train/learning_rate", self.adam.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """Return Adam with a linear warm-up: at step k = 1, 2, ... the learning rate is lr min(1, k / warmup)."""
        o = self.optim
        self.adam = torch.optim.Adam(
            self.network.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True
        )
        warmup = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda k: min(1.0, (k + 1) / max(o.warmup, 1)))
        return {"optimizer": self.adam, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the description of the model, the recipe, the number of skipped steps and the losses of each time."""
        checkpoint[KEY] = self.spec.to_dict() | {RECIPE: self.recipe}
        if self.computed:
            checkpoint[KEY][COMPUTED] = self.computed
        for logger in self.trainer.loggers if self.trainer.is_global_zero else ():
            if isinstance(logger, WandbLogger):
                checkpoint[KEY][WANDB_RUN] = logger.experiment.path
        counts = checkpoint.setdefault(COUNTS, {})
        counts["skipped"] = self.skipped
        if self.has_importance_times:
            counts["loss_history"] = self.loss_history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` stored, and resume at the start of an optimiser step."""
        self._adapt_optimizer_states(checkpoint["optimizer_states"])
        if counts := checkpoint.get(COUNTS):  # older checkpoints have none
            self.skipped.copy_(counts["skipped"])
            if self.has_importance_times:
                self.loss_history.copy_(counts["loss_history"])
        count_complete_steps(checkpoint, self.trainer.accumulate_grad_batches)

    def _adapt_optimizer_states(self, states: list[dict[str, Any]]) -> None:
        """Let stored states follow today's implementation of Adam, and the memory format of the parameters.

        Old checkpoints are of an Adam that was not fused, which cannot skip steps; the fused one takes the elements in
        the order of memory.
        """
        for adam in states:
            for group in adam["param_groups"]:
                group.update(fused=True, foreach=None)
                for i, parameter in zip(group["params"], self.network.parameters(), strict=True):
                    state = adam["state"].get(i, {})  # empty before the first step
                    state |= {k: torch.empty_like(parameter).detach().copy_(state[k]) for k in MOMENTS if k in state}

    def _addressed_dropout(self, step: int, batch_idx: int) -> AbstractContextManager[None]:
        """Seed what torch's dropout draws from by (seed, step, micro-batch, process)."""
        if not getattr(self.spec.network_spec, "dropout", 0):
            return nullcontext()
        trainer = self.trainer
        micro = batch_idx % trainer.accumulate_grad_batches * trainer.world_size + trainer.global_rank
        return _seeded(int(random_words(self.seed, DROPOUT, step, [micro])), self.device)


def step_ended(trainer: Trainer, batch_idx: int, every: int = 1) -> bool:
    """Return whether micro-batch `batch_idx` completed an optimiser step, one whose number is a multiple of `every`."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and trainer.global_step % every == 0


@contextmanager
def _seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's generators of the CPU and of `device` inside the block; their state is restored afterwards."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
