"""The score: what ε̂ is to NCSN, Langevin corrector steps, and the variance-exploding chain (paper, section 4.3).

The score is the gradient of the log density of x_t. By Eq. 4 it is

    ∇ log q(x_t) = -E[ε | x_t] / sqrt(1 - a_t),

so a network that predicts ε, x_0 or v gives it without more training, and a score network gives ε̂.

A variance-exploding chain adds noise and does not shrink the image: x̄_t = x_0 + σ̄_t ε. It is the paper's
x̄ = x / sqrt(a) with σ̄ = sqrt((1 - a) / a) (Eq. 14); NCSN is written in it. The score of x̄ is -ε̂ / σ̄, and sampling in
x̄ gives the samples of DDIM: η = 0 is Euler's step in σ̄ for the probability flow, η = 1 is NCSN's ancestral sampling.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.diffusion.prediction import PREDICTIONS
from ddim.diffusion.schedule import NoiseSchedule


def score(prediction: str, output: Tensor, x_t: Tensor, a_t: float | Tensor) -> Tensor:
    """Return the score at x_t, (B, C, H, W), from what a network returned there.

    Args:
        prediction: a key of PREDICTIONS.
        output, x_t: (B, C, H, W).
        a_t: alpha_bar at the time of x_t, in [0, 1); a float, or a tensor that broadcasts.

    Raises:
        ValueError: alpha_bar is 1, where there is no noise and no score.
    """
    return score_from_eps(PREDICTIONS[prediction].eps(output, x_t, a_t), a_t)


def score_from_eps(eps: Tensor, a_t: float | Tensor) -> Tensor:
    """Return the score -ε̂ / sqrt(1 - a_t), (B, C, H, W); arguments and errors as in `score`."""
    return -eps / _noise_std(a_t, eps.dtype)


def eps_from_score(score: Tensor, a_t: float | Tensor) -> Tensor:
    """Return ε̂ = -sqrt(1 - a_t) ∇ log q(x_t), (B, C, H, W); arguments and errors as in `score`."""
    return -score * _noise_std(a_t, score.dtype)


def _noise_std(a_t: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    if bool(torch.as_tensor(a_t == 1).any()):
        raise ValueError("there is no score at alpha_bar=1, where x is data without noise; take a time from 1 on.")
    return (1 - a_t).sqrt().to(dtype) if isinstance(a_t, Tensor) else math.sqrt(1 - a_t)


# ---------------------------------------------------------------- corrector


@dataclass(frozen=True)
class Corrector:
    """Langevin steps at one noise level (Song et al. 2021, Algorithm 5, for a variance-preserving chain).

    Each is x + δ ∇ log q(x) + sqrt(2 δ) z with δ = 2 (1 - β_t) (r |z| / |∇ log q(x)|)². The norms are those of each
    image, where the authors' code takes their means over the batch: an image must not depend on its batch. Small steps
    leave the distribution of x as it is. These change it a little: on Gaussian data of d values, many steps end at a
    variance that is larger by about r² + 4 / d, since δ is finite and depends on x and z.

    Attributes:
        steps: M, after each step but the last; 0 to 1023.
        snr: the signal-to-noise ratio r, above 0; 0.16 is the authors' for CIFAR-10.

    Raises:
        ValueError: a number out of range.
    """

    steps: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= 1023:
            raise ValueError(f"corrector_steps={self.steps} must lie in 0..1023; 0 is none.")
        if not 0 < self.snr < math.inf:
            raise ValueError(f"corrector_snr={self.snr} must be positive and finite, such as 0.16.")

    def step(self, x: Tensor, eps: Tensor, z: Tensor, a_t: float, one_minus_beta: float) -> Tensor:
        """Return x at time t after one step, (B, C, H, W).

        Args:
            x, eps: at time t, and ε̂ there, (B, C, H, W).
            z: standard normal noise, (B, C, H, W).
            a_t: alpha_bar at t.
            one_minus_beta: 1 - β_t, the ratio of alpha_bar at t and t - 1.
        """
        return langevin_step(x, score_from_eps(eps, a_t), z, self.snr, one_minus_beta)


def langevin_step(x: Tensor, score: Tensor, z: Tensor, snr: float, factor: float = 1.0) -> Tensor:
    """Return x + δ score + sqrt(2 δ) z with δ = 2 factor (snr |z| / |score|)², (B, C, H, W).

    `factor` is 1 - β in a variance-preserving chain (Algorithm 5) and 1 in a variance-exploding one (Algorithm 4). An
    image whose score is 0, as that of a network without training can be, stays as it is: its step has no scale.
    """
    z_norm, score_norm = (v.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1)) for v in (z, score))
    size = torch.where(score_norm > 0, 2 * factor * (snr * z_norm / score_norm) ** 2, 0)
    return x + size * score + (2 * size).sqrt() * z


# ---------------------------------------------------------------- the variance-exploding chain


def x_bar_from_x(x: Tensor, a_t: float) -> Tensor:
    """Return x̄ = x / sqrt(a_t), the state of the variance-exploding chain at noise level σ̄ (Eq. 14); a_t > 0."""
    return x / math.sqrt(a_t)


def x_from_x_bar(x_bar: Tensor, a_t: float) -> Tensor:
    """Return x = sqrt(a_t) x̄; see `x_bar_from_x`."""
    return x_bar * math.sqrt(a_t)


def exploding_schedule(sigma_bars: Sequence[float] | Tensor) -> NoiseSchedule:
    """Return the schedule with the noise levels of a variance-exploding chain: alpha_bar = 1 / (1 + σ̄²).

    Args:
        sigma_bars: σ̄ at times 1..T, increasing, above 0; `ddim.diffusion.rules.sigma_bar` gives them back.

    Raises:
        ValueError: they do not increase, or the first is not above 0.
    """
    levels = torch.cat([torch.zeros(1, dtype=torch.float64), torch.as_tensor(sigma_bars, dtype=torch.float64)])
    if not bool((levels.diff() > 0).all()):
        raise ValueError("the noise levels of a variance-exploding chain must be above 0 and increase.")
    return NoiseSchedule(1 / (1 + levels**2), "variance_exploding")


def eps_model(
    score_network: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a score network of a variance-exploding chain as a model that every rule here samples with.

    Args:
        score_network: (x̄ (B, C, H, W), σ̄ float64 (B,)) -> the score of x̄, (B, C, H, W).
        schedule: `exploding_schedule` of its noise levels.

    Returns:
        (x_t (B, C, H, W), t (B,)) -> ε̂ = -σ̄ score, (B, C, H, W).
    """

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        a_t = schedule.alpha_bar.to(t.device)[t]
        sigma_bars, root = ((1 - a_t) / a_t).sqrt(), a_t.sqrt()
        shape = (-1, *[1] * (x_t.ndim - 1))
        x_bar = x_t / root.to(x_t.dtype).reshape(shape)
        return -sigma_bars.to(x_t.dtype).reshape(shape) * score_network(x_bar, sigma_bars)

    return model


# ---------------------------------------------------------------- the forward chain between two times


def forward_kernel(a_t: float, a_s: float) -> tuple[float, float]:
    """Return (c, v) of q(x_t | x_s) = N(c x_s, v I) for s < t: c = sqrt(a_t / a_s), v = 1 - a_t / a_s.

    a_s = 1 is Eq. 4. With s = t - 1, v is DDPM's β_t.

    Raises:
        ValueError: a_t > a_s: the forward chain does not take noise away.
    """
    if a_t > a_s:
        raise ValueError(f"the forward chain goes up in time, from a_s to a_t <= a_s, not from {a_s} to {a_t}.")
    return math.sqrt(a_t / a_s), 1 - a_t / a_s
