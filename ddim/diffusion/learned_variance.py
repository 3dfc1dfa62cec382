"""A variance that the network predicts (Nichol and Dhariwal 2021, Improved DDPM, section 3.1).

The network has 2C output channels: the prediction, and v, which interpolates the logarithm of the variance of each
pixel between that of DDPM's posterior, β̃, and the larger one, β = 1 - a_t / a_s:

    σ² = exp(w log β + (1 - w) log β̃),    β̃ = (1 - a_s) / (1 - a_t) β,    w = (v + 1) / 2                 (their Eq. 15)

Both are those of the step from t to s at hand, so the same network samples over any times. v is not limited.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.diffusion.gaussians import discretised_log_likelihood, gaussian_kl
from ddim.diffusion.rules import DDIM, Coefficients, Rule

VARIANCES = {"fixed": 1, "learned_range": 2}  # -> output channels of the network for each channel of the image


@dataclass(frozen=True)
class LearnedVariance(Rule):
    """DDPM's step with the variance that the network predicts; the step to a_s = 1 adds no noise."""

    zero_snr = True

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the factors of Eq. 12 at η = 1, and the larger noise; there are no upward steps."""
        c = DDIM(1.0).coefficients(levels, a_s)
        return c._replace(noise_max=math.sqrt(1 - levels[0] / a_s)) if c.noise else c


def vlb_terms(alpha_bar: Tensor, t: Tensor, x0: Tensor, x0_hat: Tensor, v: Tensor | None) -> Tensor:
    """Return the term of the variational bound at each image's time, nats, (B,) (Ho et al., Eq. 5).

    It is L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and L_0 = -log p(x_0 | x_1) at t = 1. The means of q
    and p differ in x_0 and x̂0 alone, whose factor is sqrt(a_s) β / (1 - a_t) (their Eq. 7).

    Args:
        alpha_bar: float64 (T+1,), T > 1, on the device of x0.
        t: times in 1..T, int64 (B,).
        x0: pixels in [-1, 1], (B, C, H, W).
        x0_hat: x̂0, like x0.
        v: the network's, like x0; None for the variance of the posterior, β̃.
    """
    t = t.reshape(-1, *[1] * (x0.ndim - 1))
    a_t, a_s = alpha_bar[t], alpha_bar[t - 1]
    beta = 1 - a_t / a_s
    # β̃ is 0 at t = 1; as in their code, it is that of t = 2 there.
    later = t.clamp(min=2)
    posterior = (1 - alpha_bar[later - 1]) / (1 - alpha_bar[later]) * (1 - alpha_bar[later] / alpha_bar[later - 1])
    factor, std_q, ratio = (x.to(x0.dtype) for x in (a_s.sqrt() * beta / (1 - a_t), posterior.sqrt(), beta / posterior))
    std_p = std_q if v is None else std_q * ratio ** ((v + 1) / 4)
    kl = gaussian_kl(factor * x0, factor * x0_hat, std_q, std_p)
    return torch.where(t.flatten() == 1, -discretised_log_likelihood(x0, x0_hat, std_p), kl)
