"""What the network predicts, and how x̂0 and ε̂ follow from it.

For each prediction type, at noise level a_t = alpha_bar[t]:

    eps   the noise ε                                              (paper, Eq. 9 gives x̂0)
    x0    the image x_0
    v     sqrt(a_t) ε - sqrt(1 - a_t) x_0                          (Salimans and Ho 2022)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Prediction(NamedTuple):
    """How to train towards one prediction type and how to read it; `a_t` is a float, or a tensor that broadcasts.

    Attributes:
        target: (x0, eps, a_t) -> what the network should return.
        x0: (output, x_t, a_t) -> x̂0.
        eps: (output, x_t, a_t) -> ε̂.
    """

    target: Callable[[Tensor, Tensor, float | Tensor], Tensor]
    x0: Callable[[Tensor, Tensor, float | Tensor], Tensor]
    eps: Callable[[Tensor, Tensor, float | Tensor], Tensor]


def x0_from_eps(eps: Tensor, x_t: Tensor, a_t: float | Tensor) -> Tensor:
    """x̂0 = (x_t - sqrt(1 - a_t) ε) / sqrt(a_t), the paper's f_θ (Eq. 9)."""
    return (x_t - _sqrt(1 - a_t, x_t) * eps) / _sqrt(a_t, x_t)


def eps_from_x0(x0: Tensor, x_t: Tensor, a_t: float | Tensor) -> Tensor:
    """ε = (x_t - sqrt(a_t) x_0) / sqrt(1 - a_t): Eq. 4 solved for ε; a_t < 1."""
    return (x_t - _sqrt(a_t, x_t) * x0) / _sqrt(1 - a_t, x_t)


@dataclass(frozen=True)
class Clip:
    """The clip policy: how x̂0 is limited, and whether ε̂ follows it.

    Attributes:
        policy: one of CLIP_POLICIES. `none`: the formulas of the paper, and the official implementation. `x0`: x̂0 is
            limited, ε̂ stays the network's (diffusers' default). `x0_and_eps`: x̂0 is limited and ε̂ is derived again
            from it (OpenAI's code; the official σ̂ code, written there as a posterior mean).
        clip_range: x̂0 is clipped to [-clip_range, clip_range].
        threshold_ratio: dynamic thresholding instead (Saharia et al. 2022, Imagen): s is this quantile of |x̂0| in each
            image, but at least 1; x̂0 is clipped to [-s, s] and divided by s. In (0, 1]; None for none.
        threshold_max: the largest s; None for no limit.

    Raises:
        ValueError: an unknown policy, a number out of range, or one that the policy does not use.
    """

    policy: str = "none"
    clip_range: float = 1.0
    threshold_ratio: float | None = None
    threshold_max: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in CLIP_POLICIES:
            raise ValueError(f"clip={self.policy!r} is not known; allowed: {', '.join(CLIP_POLICIES)}.")
        if not self.clip_range > 0:
            raise ValueError(f"clip_range={self.clip_range} must be positive.")
        if self.threshold_ratio is not None and not 0 < self.threshold_ratio <= 1:
            raise ValueError(f"threshold_ratio={self.threshold_ratio} must lie in (0, 1].")
        if self.threshold_max is not None and not self.threshold_max >= 1:
            raise ValueError(f"threshold_max={self.threshold_max} must be at least 1.")
        if self.policy == "none" and (self.clip_range, self.threshold_ratio, self.threshold_max) != (1.0, None, None):
            raise ValueError("clip_range and threshold_ratio need clip=x0 or x0_and_eps; clip=none limits nothing.")
        if self.threshold_ratio is None and self.threshold_max is not None:
            raise ValueError("threshold_max needs a threshold_ratio, such as 0.995.")
        if self.threshold_ratio is not None and self.clip_range != 1:
            raise ValueError("give either clip_range or threshold_ratio: dynamic thresholding ends in [-1, 1].")

    def limit(self, x0: Tensor) -> Tensor:
        """Return x̂0, (B, C, H, W), limited as the policy says; each image for itself."""
        if self.policy == "none":
            return x0
        if self.threshold_ratio is None:
            return x0.clamp(-self.clip_range, self.clip_range)
        # torch.quantile, which takes 16 million values at most: two of the sorted values and what lies between them
        ordered = x0.abs().flatten(1).sort(dim=1).values
        rank = self.threshold_ratio * (ordered.shape[1] - 1)
        low, high = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
        s = torch.lerp(low, high, rank % 1).clamp(1, self.threshold_max).reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s


def as_clip(clip: str | Clip) -> Clip:
    """Return a clip policy that is given by name or in full.

    Raises:
        ValueError: an unknown name.
    """
    return clip if isinstance(clip, Clip) else Clip(clip)


def check_level(prediction: str, a_t: float) -> None:
    """Refuse a noise level at which the network's output does not determine both x̂0 and ε̂.

    Args:
        prediction: a key of PREDICTIONS.
        a_t: alpha_bar at a time that the network is asked at, in [0, 1].

    Raises:
        ValueError: `eps` at alpha_bar = 0, or `x0` at alpha_bar = 1.
    """
    if prediction == "eps" and a_t == 0:
        raise ValueError(
            "a network that predicts ε gives no x0 at alpha_bar=0 (zero terminal SNR): x_T is all noise, and Eq. 9 "
            "divides by 0. Take prediction=v or x0, or times that do not start at T."
        )
    if prediction == "x0" and a_t == 1:
        raise ValueError("a network that predicts x0 gives no ε at t=0; start encoding at t=1.")


def split_output(output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the prediction, like x_t, and v of a learned variance: the second half of 2C channels, or None."""
    doubled = output.ndim > 1 and output.shape[1] == 2 * x_t.shape[1]
    return output.tensor_split(2, dim=1) if doubled else (output, None)  # type: ignore[return-value]


def x0_and_eps(prediction: str, clip: str | Clip, output: Tensor, x_t: Tensor, a_t: float) -> tuple[Tensor, Tensor]:
    """Return x̂0 and ε̂ for one network output under a clip policy.

    Args:
        prediction: a key of PREDICTIONS.
        clip: a policy, or one of CLIP_POLICIES.
        output, x_t: (B, C, H, W).
        a_t: alpha_bar at the time of x_t, in [0, 1]; not 0 for `eps`, not 1 for `x0`, see `check_level`.
    """
    rule, clip = PREDICTIONS[prediction], as_clip(clip)
    x0 = clip.limit(rule.x0(output, x_t, a_t))
    # At a_t = 1 there is no noise to derive: x_t is the image itself.
    rederive = clip.policy == "x0_and_eps" and a_t < 1
    return x0, eps_from_x0(x0, x_t, a_t) if rederive else rule.eps(output, x_t, a_t)


def _sqrt(a: float | Tensor, like: Tensor) -> float | Tensor:
    """The root of a noise level, taken in double; a tensor of levels is then rounded to the dtype of the images."""
    return torch.sqrt(a).to(like.dtype) if isinstance(a, Tensor) else math.sqrt(a)


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(
        target=lambda x0, eps, a_t: eps,
        x0=x0_from_eps,
        eps=lambda output, x_t, a_t: output,
    ),
    "x0": Prediction(
        target=lambda x0, eps, a_t: x0,
        x0=lambda output, x_t, a_t: output,
        eps=eps_from_x0,
    ),
    "v": Prediction(
        target=lambda x0, eps, a_t: _sqrt(a_t, eps) * eps - _sqrt(1 - a_t, x0) * x0,
        x0=lambda output, x_t, a_t: _sqrt(a_t, x_t) * x_t - _sqrt(1 - a_t, x_t) * output,
        eps=lambda output, x_t, a_t: _sqrt(1 - a_t, x_t) * x_t + _sqrt(a_t, x_t) * output,
    ),
}

CLIP_POLICIES = ("none", "x0", "x0_and_eps")
