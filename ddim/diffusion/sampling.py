"""The method: one step between two noise levels, one loop over times, for sampling and for encoding.

From time t to time s, with a_t = alpha_bar[t] and a_s = alpha_bar[s] (paper, Eq. 12):

    x_s = sqrt(a_s) x̂0 + sqrt(1 - a_s - σ²) ε̂ + σ z,     z ~ N(0, I)

What differs between DDPM, DDIM and everything between is σ. Descending times sample; ascending times encode (Eq. 14).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddim.diffusion.noise import step_noise
from ddim.diffusion.prediction import CLIP_POLICIES, PREDICTIONS, x0_and_eps
from ddim.diffusion.schedule import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t (B,C,H,W), t (B,) int64 in 1..T) -> (B,C,H,W)


class Coefficients(NamedTuple):
    """The factors of x̂0, of ε̂ and of fresh noise in one step."""

    x0: float
    eps: float
    noise: float


class Rule(Protocol):
    """A choice of σ: from the two noise levels of a step to its three factors."""

    def coefficients(self, a_t: float, a_s: float) -> Coefficients:
        """Return the factors of the step from the level a_t to a_s; ValueError where the rule has no such step."""


@dataclass(frozen=True)
class DDIM:
    """The paper's family: σ = η sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s) (Eq. 16).

    Attributes:
        eta: η in [0, 1]. 0 is DDIM, deterministic; 1 is DDPM with the posterior variance. σ is linear in it.

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie in [0, 1]: 0 is DDIM, 1 is DDPM.")

    def coefficients(self, a_t: float, a_s: float) -> Coefficients:
        """Return the factors of Eq. 12; upward steps (a_s < a_t) exist for eta = 0 only."""
        noise = self.eta * _posterior_std(a_t, a_s, f"eta={self.eta}") if self.eta else 0.0
        return Coefficients(math.sqrt(a_s), _direction(a_s, noise), noise)


@dataclass(frozen=True)
class SigmaHat:
    """The larger DDPM noise of section D.3: the fresh noise has std σ̂ = sqrt(1 - a_t / a_s), ε̂ keeps the σ of η = 1.

    The total variance then exceeds that of the marginal. The last step, to a_s = 1, adds no noise. The official
    implementation adds none from its first time, index 0, with which both of its spacings end; so with `uniform` and
    `quad` both agree in every step. It also clips x̂0 and derives ε̂ again: the clip policy `x0_and_eps`.
    """

    def coefficients(self, a_t: float, a_s: float) -> Coefficients:
        """Return the factors of section D.3; there are no upward steps."""
        posterior_std = _posterior_std(a_t, a_s, "sigma_hat")
        sigma_hat = math.sqrt(1 - a_t / a_s) if a_s < 1 else 0.0
        return Coefficients(math.sqrt(a_s), _direction(a_s, posterior_std), sigma_hat)


def _posterior_std(a_t: float, a_s: float, name: str) -> float:
    if a_s < a_t:
        raise ValueError(f"{name} cannot go up from alpha_bar={a_t} to {a_s}: encoding is deterministic, use eta=0.")
    return math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s) if a_s > a_t else 0.0


def _direction(a_s: float, std: float) -> float:
    # For std up to that of η = 1 the radicand is not negative, but it can be rounded to just below 0 when a_t << a_s.
    return math.sqrt(max(0.0, 1 - a_s - std**2))


def step(rule: Rule, x0: Tensor, eps: Tensor, a_t: float, a_s: float, noise: Tensor | None = None) -> Tensor:
    """Go from the noise level a_t to a_s (Eq. 12).

    Args:
        rule: the choice of σ.
        x0, eps: x̂0 and ε̂ at a_t, (B, C, H, W).
        a_t, a_s: alpha_bar at both ends of the step, in (0, 1].
        noise: z, (B, C, H, W); needed when the rule's factor of it is not 0.

    Raises:
        ValueError: the step needs noise and got none, or goes up under a stochastic rule.
    """
    c = rule.coefficients(a_t, a_s)
    x_s = c.x0 * x0 + c.eps * eps
    if c.noise == 0:
        return x_s
    if noise is None:
        raise ValueError(f"{rule} adds noise in this step, but none was given.")
    return x_s + c.noise * noise


class State(NamedTuple):
    """Where a trajectory stands after a step.

    Attributes:
        k: the number of this step, 1, 2, ...
        t: the time that x has now.
        x: the state, (B, C, H, W).
        x0: x̂0 as predicted at the start of the step.
        eps: ε̂, likewise.
    """

    k: int
    t: int
    x: Tensor
    x0: Tensor
    eps: Tensor


def trajectory(
    model: Model,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    rule: Rule | None = None,
    *,
    prediction: str = "eps",
    clip: str = "none",
    seed: int = 0,
    indices: Sequence[int] | Tensor | None = None,
) -> Iterator[State]:
    """Walk x through `times`, one network evaluation a step, and yield the state after each step.

    Args:
        model: called as model(x_t, t) with paper times t in 1..T, shape (B,). At t = 0, where encoding starts, no
            network was trained; it is asked at t = 1, its nearest time.
        schedule: the noise levels the network was trained with.
        x: the state at times[0], (B, C, H, W); keeps its dtype and device.
        times: descending to sample, (*reversed(tau), 0); ascending to encode, (0, *tau).
        rule: DDIM(eta=0) by default.
        prediction: what the model returns, a key of PREDICTIONS.
        clip: one of CLIP_POLICIES.
        seed, indices: decide the noise: image `indices[i]` gets the noise (seed, indices[i], k) at step k.
            The indices default to 0..B-1, as in `initial_noise(range(B), ...)`.

    Raises:
        ValueError: an unknown name, a time outside 0..T, or a step that the rule cannot take; before the first
            network evaluation.
    """
    rule = rule or DDIM()
    indices = range(len(x)) if indices is None else indices
    _check(schedule, times, rule, prediction, clip)
    return _walk(model, schedule, x, times, rule, prediction, clip, seed, indices)


def _check(schedule: NoiseSchedule, times: Sequence[int], rule: Rule, prediction: str, clip: str) -> None:
    if prediction not in PREDICTIONS or clip not in CLIP_POLICIES:
        raise ValueError(
            f"prediction={prediction!r} must be one of {', '.join(PREDICTIONS)}, "
            f"and clip={clip!r} one of {', '.join(CLIP_POLICIES)}."
        )
    if len(times) < 2:
        raise ValueError(f"times={list(times)} must hold at least a start and an end.")
    if prediction == "x0" and 0 in times[:-1]:
        raise ValueError("a network that predicts x0 gives no ε at t=0; start encoding at t=1.")
    for t, s in pairwise(times):
        rule.coefficients(schedule[t], schedule[s])


def _walk(
    model: Model,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    rule: Rule,
    prediction: str,
    clip: str,
    seed: int,
    indices: Sequence[int] | Tensor,
) -> Iterator[State]:
    indices = torch.as_tensor(indices, dtype=torch.int64, device=x.device)
    for k, (t, s) in enumerate(pairwise(times), start=1):
        a_t, a_s = schedule[t], schedule[s]
        with torch.no_grad():  # around the step only: the caller's own gradient mode holds between steps
            output = model(x, torch.full((len(x),), max(t, 1), device=x.device)).to(x.dtype)
            x0, eps = x0_and_eps(prediction, clip, output, x, a_t)
            noisy = rule.coefficients(a_t, a_s).noise != 0
            noise = step_noise(indices, x.shape[1:], seed, k).to(x.dtype) if noisy else None
            x = step(rule, x0, eps, a_t, a_s, noise)
        yield State(k, s, x, x0, eps)


def sample(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    tau: Sequence[int],
    rule: Rule | None = None,
    *,
    last_time: int = 0,
    prediction: str = "eps",
    clip: str = "none",
    seed: int = 0,
    indices: Sequence[int] | Tensor | None = None,
) -> Tensor:
    """Return x_0, (B, C, H, W), for the starting points x_T over the increasing times tau; see `trajectory`.

    `last_time` = 0 ends at alpha_bar = 1, as the paper does; 1 ends at alpha_bar[1], as some code bases do.
    """
    times = (*reversed(tau), last_time)
    states = trajectory(model, schedule, x_T, times, rule, prediction=prediction, clip=clip, seed=seed, indices=indices)
    return last_state(states)


def encode(
    model: Model,
    schedule: NoiseSchedule,
    x_0: Tensor,
    tau: Sequence[int],
    *,
    prediction: str = "eps",
    clip: str = "none",
) -> Tensor:
    """Return the x_T that deterministic sampling over the same tau leads back to x_0 (section 5.4), (B, C, H, W).

    The sampler's update with the ends of each step swapped: ε̂ comes from the lower time (issue 9 of the official
    repository).
    """
    return last_state(trajectory(model, schedule, x_0, (0, *tau), DDIM(), prediction=prediction, clip=clip))


def last_state(states: Iterator[State]) -> Tensor:
    """Walk to the end of a trajectory and return x, (B, C, H, W); no earlier state is kept."""
    for state in states:  # noqa: B007 - only the last one is wanted
        pass
    return state.x
