"""The exponential moving average of the weights, by optimiser step."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ddim.checkpoints.model import EMA_STATE


@dataclass(frozen=True)
class EMASpec:
    """One average, or several with different rates.

    Attributes:
        decay: μ in shadow <- μ shadow + (1 - μ) weights, once per optimiser step. Of a list, the first is the one
            called ema; another is evaluated with weights=ema_RATE.
        warmup: use min(μ, (1 + k) / (10 + k)) at step k, so that a short run forgets its initial weights.
        posthoc: also keep what scripts/ema.py makes an average of any length from; it may change on resuming.

    Raises:
        ValueError: a rate outside [0, 1), no rate, or one given twice.
    """

    decay: float | tuple[float, ...] = 0.9999
    warmup: bool = False
    posthoc: bool = False

    def __post_init__(self) -> None:
        for rate in self.rates:
            if not 0 <= rate < 1:
                raise ValueError(f"decay={rate} must lie in [0, 1).")
        if len(set(self.rates)) != len(self.rates) or not self.rates:
            raise ValueError(f"decay={list(self.rates)} must hold at least one rate, and none twice.")
        if len({f"{rate:g}" for rate in self.rates}) != len(self.rates):  # which name their weights
            raise ValueError(f"decay={list(self.rates)} must hold rates that differ in their first six digits.")

    @property
    def labels(self) -> dict[str, float]:
        """Label of the weights, as in weights=ema_RATE -> rate."""
        return {self.label(rate): rate for rate in self.rates}

    def label(self, rate: float) -> str:
        """Return the label of the weights that are averaged at a rate."""
        return "ema" if rate == self.rates[0] else f"ema_{rate:g}"

    @property
    def rates(self) -> tuple[float, ...]:
        """All rates; the first is that of the average called ema."""
        return self.decay if isinstance(self.decay, tuple) else (self.decay,)


class EMA(Callback):
    """Averages the parameters of `module.network`, at one rate or several.

    Parameters only: a schedule kept in a buffer must not drift. An average starts at the initial weights, is updated
    once per optimiser step whatever the accumulation, and is stored in the checkpoint with the online weights.
    """

    def __init__(self, spec: EMASpec) -> None:
        self.spec = spec
        self.shadows: dict[float, dict[str, Tensor]] = {rate: {} for rate in spec.rates}
        self.updates = 0

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return EMA_STATE

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The first average, by the names of the network's parameters."""
        return self.shadows[self.spec.rates[0]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the initial weights, or move the restored averages to the device."""
        for shadow in self.shadows.values():
            for name, parameter in parameters(pl_module):
                source = shadow.get(name, parameter.detach())
                shadow[name] = torch.empty_like(parameter).copy_(source).detach()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update the averages if this batch ended an optimiser step."""
        if trainer.global_step <= self.updates:
            return
        self.updates = trainer.global_step
        weights = [parameter.detach() for _, parameter in parameters(pl_module)]
        for rate, shadow in self.shadows.items():
            decay = min(rate, (1 + self.updates) / (10 + self.updates)) if self.spec.warmup else rate
            torch._foreach_lerp_(list(shadow.values()), weights, 1 - decay)
            log_every = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if self.spec.warmup and self.updates % log_every == 0:  # without a warm-up it is in the configuration
                pl_module.log(f"train/{self.spec.label(rate)}_rate", decay)

    @contextmanager
    def applied(self, module: nn.Module, label: str = "ema") -> Iterator[None]:
        """Use the average of this label as the weights of `module.network` inside the block.

        The online weights are restored bitwise, also after an exception.
        """
        online = {name: parameter.detach().clone() for name, parameter in parameters(module)}
        try:
            _copy(self.shadows[self.spec.labels[label]], module)
            yield
        finally:
            _copy(online, module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        first, *others = self.spec.rates
        rest = {f"{rate:g}": self.shadows[rate] for rate in others}
        return {"decay": first, "updates": self.updates, "shadow": self.shadow, "others": rest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what a checkpoint stored."""
        first, *others = self.spec.rates
        self.updates = state_dict["updates"]
        self.shadows = {first: dict(state_dict["shadow"])}
        self.shadows |= {rate: dict(state_dict["others"][f"{rate:g}"]) for rate in others}


def parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters of `module.network`."""
    network: nn.Module = module.network  # type: ignore[assignment]
    return list(network.named_parameters())


@torch.no_grad()
def _copy(values: dict[str, Tensor], module: nn.Module) -> None:
    for name, parameter in parameters(module):
        parameter.copy_(values[name])
