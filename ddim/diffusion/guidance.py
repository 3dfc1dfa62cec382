"""Classifier-free guidance (Ho and Salimans 2022, Eq. 6): what a conditional network predicts for a label.

    ε̂ = (1 + w) ε_θ(x_t, t, label) - w ε_θ(x_t, t, no label)

w = 0 is the conditional network and w = -1 the unconditional one; what other code bases call the guidance scale is
1 + w. At a given x_t, x̂0, ε̂ and v are affine in each other and the two weights sum to 1, so the outputs of the network
are combined as they are, whatever it predicts. A learned variance is that of the label.

The loop, the rules and the solvers know of no labels: they get a `GuidedModel`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddim.diffusion.prediction import split_output
from ddim.diffusion.sampling import Model, State, last_state

ConditionalModel = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t (B,C,H,W), t (B,), y (B,) int64) -> as a Model
ALL, OWN = "all", "own"  # labels in turn: image i has label i mod K; labels that come with the images


@dataclass(frozen=True)
class GuidanceSpec:
    """How strongly a label is asked for.

    Attributes:
        w: the weight of Eq. 6; 0 is none, and other code bases' scale is 1 + w.
        interval: guide at the times lo <= t <= hi only, and take the conditional network at others (Kynkäänniemi et
            al. 2024); null for all times.

    Raises:
        ValueError: w is not finite, or the interval does not rise or starts below 1.
    """

    w: float = 0.0
    interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.w):
            raise ValueError(f"w={self.w} must be a finite number.")
        if self.interval is not None and not 1 <= self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval={list(self.interval)} must be two times lo <= hi of 1..T.")

    def w_at(self, t: float) -> float:
        """Return w at a time of the network."""
        return self.w if self.interval is None or self.interval[0] <= t <= self.interval[1] else 0.0

    def evaluations(self, t: float = 1.0) -> int:
        """Return the network evaluations that a prediction at time t takes: two where both are needed."""
        return 1 if self.w_at(t) in (0, -1) else 2

    @property
    def most_evaluations(self) -> int:
        """Network evaluations of a prediction, at the times where these are most."""
        return 1 if self.w in (0, -1) else 2


class GuidedModel:
    """A conditional network with labels and guidance: model(x_t, t), as the loop calls one.

    Args:
        model: conditional.
        y: labels of the images, int64 (B,) on their device.
        no_label: the number that stands for "no label", K of K classes.
        guidance: how strongly.

    Attributes:
        evaluations: network evaluations of an image so far (NFE).
    """

    def __init__(self, model: ConditionalModel, y: Tensor, no_label: int, guidance: GuidanceSpec | None = None) -> None:
        self.model, self.y, self.guidance = model, y, guidance or GuidanceSpec()
        self.without = torch.full_like(y, no_label)
        self.evaluations = 0

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the guided prediction for x_t (B, C, H, W) at a time t, (B,), the same for all images."""
        # The time is read from the device only where it matters.
        w = self.guidance.w if self.guidance.interval is None else self.guidance.w_at(float(t[0]))
        self.evaluations += 1
        if w in (0, -1):
            return self.model(x_t, t, self.without if w else self.y)
        self.evaluations += 1
        both = self.model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([self.y, self.without])).to(x_t.dtype)
        with_label, without = both.chunk(2)
        conditional, v = split_output(with_label, x_t)
        unconditional, _ = split_output(without, x_t)
        guided = (1 + w) * conditional - w * unconditional
        return guided if v is None else torch.cat([guided, v], dim=1)

    def counted(self, states: Iterator[State]) -> Iterator[State]:
        """Yield the states of a trajectory of this model with its own number of network evaluations."""
        for state in states:
            yield state._replace(evaluations=self.evaluations)


@dataclass(frozen=True)
class Condition:
    """What the images of a conditional network are to show.

    Attributes:
        classes: names, in the order of the labels 0..K-1.
        label: of all images; None for no label; ALL for labels in turn, image i having label i mod K; OWN for `own`.
        guidance: how strongly.
        own: the label of image i, for each i.

    Raises:
        ValueError: guidance without a label.
    """

    classes: tuple[str, ...]
    label: int | str | None
    guidance: GuidanceSpec = GuidanceSpec()
    own: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.label is None and self.guidance != GuidanceSpec():
            raise ValueError("guidance needs a label; give label=all, a name or a number.")

    def labels(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Return the labels of images by number, int64 (B,)."""
        numbers, K = torch.as_tensor(indices, dtype=torch.int64), len(self.classes)
        if self.label == ALL:
            return numbers % K
        if self.label == OWN:
            return torch.tensor(self.own)[numbers.cpu()]
        return torch.full_like(numbers, K if self.label is None else int(self.label))

    def bind(self, model: ConditionalModel, indices: Sequence[int] | Tensor, device: torch.device) -> GuidedModel:
        """Return the model of the images of these numbers."""
        return GuidedModel(model, self.labels(indices).to(device), len(self.classes), self.guidance)

    def evaluations(self, walk: Callable[[Model, Tensor], Iterator[State]], count: int, skipped: int = 0) -> int:
        """Return the network evaluations of an image (NFE) under this guidance.

        Args:
            walk: the trajectory from a state, of a model.
            count: evaluations without guidance.
            skipped: how many of them, the first ones, are not made.
        """
        if self.guidance.interval is None:
            return self.guidance.most_evaluations * (count - skipped)
        return sum(map(self.guidance.evaluations, evaluation_times(walk)[skipped:]))

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as records and files state it."""
        interval = None if self.guidance.w == 0 else self.guidance.interval
        return {"label": self.label, "w": self.guidance.w} | ({"interval": list(interval)} if interval else {})

    @property
    def suffix(self) -> str:
        """What tables add to the name of a sampler: ", cat, w=1"."""
        if self.label is None:
            return ", no label"
        return guidance_suffix(self.classes[self.label] if isinstance(self.label, int) else self.label, self.guidance)


def guidance_suffix(label: int | str | None, guidance: GuidanceSpec) -> str:
    """Return what tables and titles add to the name of a sampler: the label unless it is ALL, and w; "" without one."""
    if label is None:
        return ""
    interval = f" in {list(guidance.interval)}" if guidance.interval is not None and guidance.w else ""
    shown = {ALL: "", OWN: ", own labels"}.get(str(label), f", {label}")
    return f"{shown}, w={guidance.w:g}{interval}"


def evaluation_times(walk: Callable[[Model, Tensor], Iterator[State]]) -> list[float]:
    """Return the times at which a trajectory evaluates its model, in order: those of a walk with a single pixel."""
    times: list[float] = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        return torch.zeros_like(x_t).repeat(1, 2, 1, 1)  # with a learned variance, for the rules that need one

    last_state(walk(model, torch.zeros(1, 1, 1, 1)))
    return times
