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
    """The rate of the average.

    Attributes:
        decay: μ in shadow <- μ shadow + (1 - μ) weights, once an optimiser step.
        warmup: use min(μ, (1 + k) / (10 + k)) at step k, so that a short run does not keep its first weights.

    Raises:
        ValueError: decay outside [0, 1).
    """

    decay: float = 0.9999
    warmup: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie in [0, 1).")


class EMA(Callback):
    """Averages the parameters of `module.network`.

    Parameters only: a schedule kept in a buffer must not drift. The average starts at the initial weights, steps once
    an optimiser step whatever the accumulation, and is stored in the checkpoint beside the raw weights.
    """

    def __init__(self, spec: EMASpec) -> None:
        self.spec = spec
        self.shadow: dict[str, Tensor] = {}
        self.updates = 0

    @property
    def state_key(self) -> str:
        """The name of this callback's entry in a checkpoint."""
        return EMA_STATE

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the initial weights, or move a restored average to the device."""
        for name, parameter in _parameters(pl_module):
            source = self.shadow.get(name, parameter.detach())
            self.shadow[name] = torch.empty_like(parameter).copy_(source).detach()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move the average, if this batch ended an optimiser step."""
        if trainer.global_step <= self.updates:
            return
        self.updates = trainer.global_step
        decay = self.spec.decay
        if self.spec.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        weights = [parameter.detach() for _, parameter in _parameters(pl_module)]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Put the average into `module.network` and take it out again.

        The raw weights come back bitwise, also after an exception.
        """
        raw = {name: parameter.detach().clone() for name, parameter in _parameters(module)}
        try:
            _copy(self.shadow, module)
            yield
        finally:
            _copy(raw, module)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"decay": self.spec.decay, "updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        self.updates = state_dict["updates"]
        self.shadow = dict(state_dict["shadow"])


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    network: nn.Module = module.network  # type: ignore[assignment]
    return list(network.named_parameters())


@torch.no_grad()
def _copy(values: dict[str, Tensor], module: nn.Module) -> None:
    for name, parameter in _parameters(module):
        parameter.copy_(values[name])
