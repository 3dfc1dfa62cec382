"""The method: one step between two noise levels, one loop over times, for sampling and for encoding.

Descending times sample; ascending times encode (paper, Eq. 14). What a step does is a row of coefficients that its rule
(`rules.py`, `solvers.py`) gives; the loop evaluates the network and remembers what the rule needs of earlier steps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ddim.diffusion.noise import corrector_noise, step_noise
from ddim.diffusion.prediction import (
    PREDICTIONS,
    Clip,
    as_clip,
    check_level,
    eps_from_x0,
    split_output,
    x0_and_eps,
    x0_from_eps,
)
from ddim.diffusion.rules import DDIM, Coefficients, Estimate, Rule, apply
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.score import Corrector

Model = Callable[[Tensor, Tensor], Tensor]  # (x_t (B,C,H,W), t (B,) int64 in 1..T) -> (B,C,H,W); (B,2C,H,W) with v
Noise = Callable[[int], Tensor] | Sequence[Tensor]  # of step k = 1, 2, ...: by number, or one for each step


def step(rule: Rule, x0: Tensor, eps: Tensor, a_t: float, a_s: float, noise: Tensor | None = None) -> Tensor:
    """Go from the noise level a_t to a_s (Eq. 12).

    Args:
        rule: the choice of σ.
        x0, eps: x̂0 and ε̂ at a_t, (B, C, H, W).
        a_t, a_s: alpha_bar at both ends of the step, in [0, 1].
        noise: z, (B, C, H, W); needed when the rule's factor of it is not 0.

    Raises:
        ValueError: the step needs noise and got none, or goes up under a stochastic rule.
    """
    return apply(rule.coefficients((a_t,), a_s), [Estimate(a_t, x0, eps)], noise)


class State(NamedTuple):
    """Where a trajectory stands after a step.

    Attributes:
        k: the number of this step, 1, 2, ...
        t: the time that x has now.
        x: the state, (B, C, H, W).
        x0: x̂0 as predicted at the start of the step.
        eps: ε̂, likewise.
        evaluations: how often the network was called so far (NFE).
    """

    k: int
    t: int
    x: Tensor
    x0: Tensor
    eps: Tensor
    evaluations: int


class Row(NamedTuple):
    """A step of a trajectory, as it is known before any network evaluation.

    Attributes:
        t, s: its times.
        step: the coefficients.
        correction: those of the correction, where the rule makes one.
    """

    t: int
    s: int
    step: Coefficients
    correction: Coefficients | None


def rows(rule: Rule, schedule: NoiseSchedule, times: Sequence[int]) -> list[Row]:
    """Return the steps of a trajectory through `times`.

    Raises:
        ValueError: a time outside 0..T, or a step that the rule cannot take.
    """
    result: list[Row] = []
    levels: list[float] = []
    # How many steps are left, at each; a repeated time is none.
    left = [*accumulate(schedule[t] != schedule[s] for s, t in pairwise(times[::-1]))][::-1]
    for k, (t, s) in enumerate(pairwise(times)):
        a_t, a_s = schedule[t], schedule[s]
        if a_t == 0 and not rule.zero_snr:
            raise ValueError(f"{rule} has no step from alpha_bar=0 (zero terminal SNR); take ddim, or times below T.")
        levels = [a_t, *(a for a in levels if a != a_t)][: rule.memory]
        used = levels[: max(1, left[k])] if left[0] < rule.lower_order_below else levels
        corrects = left[k] > 1 and a_s != a_t
        result.append(Row(t, s, rule.coefficients(used, a_s), rule.correction((a_s, *used)) if corrects else None))
    return result


def count_evaluations(rule: Rule, schedule: NoiseSchedule, times: Sequence[int], corrector_steps: int = 0) -> int:
    """Return how often a trajectory evaluates the network (NFE), for each image."""
    steps = rows(rule, schedule, times)
    corrections = sum(row.correction is not None for row in steps) * rule.two_evaluations
    return len(steps) * max(1, rule.implicit) + corrections + (len(steps) - 1) * corrector_steps


def check_levels(rule: Rule, schedule: NoiseSchedule, times: Sequence[int], prediction: str) -> None:
    """Refuse times at which what the network predicts gives no x̂0 or ε̂; see `check_level`."""
    for t in times[1:] if rule.implicit and not rule.shifted else times[:-1]:
        check_level(prediction, schedule[t])


def trajectory(
    model: Model,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[int],
    rule: Rule | None = None,
    *,
    prediction: str = "eps",
    clip: str | Clip = "none",
    seed: int = 0,
    indices: Sequence[int] | Tensor | None = None,
    noise: Noise | None = None,
    corrector: Corrector | None = None,
    second: Tensor | None = None,
) -> Iterator[State]:
    """Walk x through `times` and yield the state after each step; a step costs one network evaluation, or two (Heun).

    A corrector takes its steps after each step but the last; each costs one evaluation more.

    Args:
        model: called as model(x_t, t) with paper times t in 1..T, shape (B,). At t = 0, where encoding starts, no
            network was trained; it is asked at t = 1, its nearest time.
        schedule: the noise levels the network was trained with.
        x: the state at times[0], (B, C, H, W); keeps its dtype and device.
        times: descending to sample, (*reversed(tau), 0); ascending to encode, (0, *tau).
        rule: DDIM(eta=0) by default.
        prediction: what the model returns, a key of PREDICTIONS.
        clip: a clip policy, or its name, one of CLIP_POLICIES.
        seed, indices: decide the noise: image `indices[i]` gets the noise (seed, indices[i], k) at step k.
            The indices default to 0..B-1, as in `initial_noise(range(B), ...)`.
        noise: the fresh noise instead, z of step k with the shape of x: noise(k), or noise[k - 1]; a step that adds
            none does not ask for it. That of the corrector always follows from the seed and the indices.
        corrector: Langevin steps; for descending times only.
        second: the state at times[1], where it is known; then the first step is not computed (see `inversion.py`).

    Raises:
        ValueError: an unknown name, a time outside 0..T, a step that the rule cannot take, a noise level at which the
            prediction gives no x̂0 or ε̂, a corrector on the way up, or noise for another number of steps; before the
            first network evaluation. Noise of another shape than x, when its step comes.
    """
    rule, corrector = rule or DDIM(), corrector or Corrector(steps=0)
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction={prediction!r} must be one of {', '.join(PREDICTIONS)}.")
    if len(times) < 2:
        raise ValueError(f"times={list(times)} must hold at least a start and an end.")
    check_levels(rule, schedule, times, prediction)
    if corrector.steps and not all(0 < t >= s for t, s in pairwise(times)):
        raise ValueError("a corrector is for sampling, over descending times; encoding is deterministic: leave it out.")
    steps = rows(rule, schedule, times)
    draw = _noise(noise, len(steps), x, seed, range(len(x)) if indices is None else indices)
    past: list[Estimate] = []
    if second is not None:  # any x̂0 and ε̂ that make up x serve as the prediction that led from there
        past = [Estimate(a_t := schedule[times[0]], torch.zeros_like(x), x / math.sqrt(1 - a_t))]
        x, steps = second, steps[1:]
    return _walk(model, schedule, x, steps, rule, prediction, as_clip(clip), draw, corrector, past)


def _noise(
    noise: Noise | None, steps: int, x: Tensor, seed: int, indices: Sequence[int] | Tensor
) -> Callable[[int, int], Tensor]:
    """Return the noise of step k, or of corrector step j = 1, 2, ... after it, as a function of k and j."""
    if noise is not None and not callable(noise) and len(noise) != steps:
        raise ValueError(f"noise is given for {len(noise)} steps, but the trajectory has {steps}.")
    addresses = torch.as_tensor(indices, dtype=torch.int64, device=x.device)

    def draw(k: int, j: int) -> Tensor:
        if j:
            z = corrector_noise(addresses, x.shape[1:], seed, k, j)
        elif noise is None:
            z = step_noise(addresses, x.shape[1:], seed, k)
        else:
            z = noise(k) if callable(noise) else noise[k - 1]
        if z.shape != x.shape:
            raise ValueError(f"the noise of step {k} has the shape {tuple(z.shape)}, x {tuple(x.shape)}.")
        return z.to(x.dtype)

    return draw


def _walk(
    model: Model,
    schedule: NoiseSchedule,
    x: Tensor,
    steps: Sequence[Row],
    rule: Rule,
    prediction: str,
    clip: Clip,
    noise: Callable[[int, int], Tensor],
    corrector: Corrector,
    estimates: list[Estimate],
) -> Iterator[State]:
    evaluations, total = 0, len(estimates) + len(steps)

    def estimate(x: Tensor, t: int, level: float) -> Estimate:
        nonlocal evaluations
        evaluations += 1
        output, v = split_output(model(x, torch.full((len(x),), max(t, 1), device=x.device)).to(x.dtype), x)
        return Estimate(level, *x0_and_eps(prediction, clip, output, x, level), v)

    def solve(x: Tensor, t: int, s: int, row: Coefficients) -> Estimate:
        x_s = x
        for _ in range(rule.implicit):  # fixed-point iterations for the x_s whose step down ends at x
            eps = estimate(x_s, s, schedule[t if rule.shifted else s]).eps
            newest = Estimate(schedule[t], x0_from_eps(eps, x, schedule[t]), eps)
            x_s = apply(row, [newest])
        return newest

    corrected: Estimate | None = None  # the one at x, where a correction has made it
    for k, (t, s, row, correction) in enumerate(steps, start=1 + len(estimates)):
        with torch.no_grad():  # around the step only: the caller's own gradient mode holds between steps
            newest = corrected or (solve(x, t, s, row) if rule.implicit else estimate(x, t, schedule[t]))
            corrected = None
            estimates = [newest, *(e for e in estimates if e.level != newest.level)][: rule.memory]
            x = apply(row, estimates, noise(k, 0) if row.noise else None)
            if correction is not None:
                ahead = estimate(x, s, schedule[s])
                x = apply(correction, [ahead, *estimates])
                if not rule.two_evaluations:  # x̂0 stays, ε̂ is derived again so that both make up the corrected x
                    corrected = ahead._replace(eps=eps_from_x0(ahead.x0, x, ahead.level))
            for j in range(1, corrector.steps + 1 if k < total else 1):  # between two steps: not after the last
                at, corrected = corrected or estimate(x, s, schedule[s]), None
                x = corrector.step(x, at.eps, noise(k, j), schedule[s], schedule[s] / schedule[s - 1])
        yield State(k, s, x, newest.x0, newest.eps, evaluations)


def sample(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    tau: Sequence[int],
    rule: Rule | None = None,
    *,
    last_time: int = 0,
    prediction: str = "eps",
    clip: str | Clip = "none",
    seed: int = 0,
    indices: Sequence[int] | Tensor | None = None,
    noise: Noise | None = None,
    corrector: Corrector | None = None,
) -> Tensor:
    """Return x_0, (B, C, H, W), for the starting points x_T over the increasing times tau; see `trajectory`.

    `last_time` = 0 ends at alpha_bar = 1, as the paper does; 1 ends at alpha_bar[1], as some code bases do.
    """
    times = (*reversed(tau), last_time)
    states = trajectory(
        model,
        schedule,
        x_T,
        times,
        rule,
        prediction=prediction,
        clip=clip,
        seed=seed,
        indices=indices,
        noise=noise,
        corrector=corrector,
    )
    return last_state(states)


def encode(
    model: Model,
    schedule: NoiseSchedule,
    x_0: Tensor,
    tau: Sequence[int],
    *,
    prediction: str = "eps",
    clip: str | Clip = "none",
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
