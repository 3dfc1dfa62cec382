"""What the network predicts, and how x̂0 and ε̂ follow from it.

For each prediction type, at noise level a_t = alpha_bar[t]:

    eps   the noise ε                                              (paper, Eq. 9 gives x̂0)
    x0    the image x_0
    v     sqrt(a_t) ε - sqrt(1 - a_t) x_0                          (Salimans and Ho 2022)
"""

import math
from collections.abc import Callable
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


def x0_and_eps(prediction: str, clip: str, output: Tensor, x_t: Tensor, a_t: float) -> tuple[Tensor, Tensor]:
    """Return x̂0 and ε̂ for one network output under a clip policy.

    Args:
        prediction: a key of PREDICTIONS.
        clip: one of CLIP_POLICIES. `none`: the formulas of the paper, and the official implementation. `x0`: x̂0 is
            clipped to [-1, 1], ε̂ stays the network's (diffusers' default). `x0_and_eps`: x̂0 is clipped and ε̂ is
            derived again from it (OpenAI's code; the official σ̂ code, written there as a posterior mean).
        output, x_t: (B, C, H, W).
        a_t: alpha_bar at the time of x_t, in (0, 1].
    """
    rule = PREDICTIONS[prediction]
    x0 = rule.x0(output, x_t, a_t)
    if clip == "none":
        return x0, rule.eps(output, x_t, a_t)
    x0 = x0.clamp(-1, 1)
    # At a_t = 1 there is no noise to derive: x_t is the image itself.
    rederive = clip == "x0_and_eps" and a_t < 1
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
