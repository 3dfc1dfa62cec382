"""A tau for one network and one rule: dynamic programming (as GITS, Chen et al. 2024), then coordinate descent.

Along a trajectory of many steps, the states and predictions at all candidate times are known. A step of the rule
between two candidates, with the predictions that it remembers, needs no network then: its deviation is the distance of
where it leads to the state of the fine trajectory there. Dynamic programming finds the S steps with the least sum of
deviations. The sum ignores how errors grow or shrink until the end; descent on the error at the end makes up for that.
"""

import functools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ddim.diffusion.rules import Rule
from ddim.diffusion.sampling import Model, last_state
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import SPACINGS

STRIDES = (8, 4, 2, 1, 1)  # how many candidates a time moves by, in each pass of the descent
IMAGES = 32  # whose states are kept for the deviations, to bound memory


@dataclass(frozen=True, eq=False)
class FineTrajectory:
    """What deviations and errors are measured against.

    Attributes:
        times: the candidates, descending from T; the last one is where sampling ends.
        levels: alpha_bar at each.
        gram: float64 (3 N, 3 N): mean products of x, x̂0 and ε̂ (in this order) at the N candidates.
        end: the state at the last of `times`, (B, C, H, W).
    """

    times: tuple[int, ...]
    levels: tuple[float, ...]
    gram: Tensor
    end: Tensor


def search_tau(
    model: Model, schedule: NoiseSchedule, x_T: Tensor, sampler: SamplerSpec, candidates: Sequence[int], prediction: str
) -> tuple[tuple[int, ...], Tensor]:
    """Return S increasing times whose trajectories from x_T end near the fine ones, and where those end.

    Descends from two taus: the one of least deviation, and the best of the named spacings.

    Args:
        model, schedule, prediction: as in `trajectory`.
        x_T: (B, C, H, W); the more, the less the times fit these alone.
        sampler: deterministic, with S; its spacing does not count.
        candidates: increasing times, at least S of them above `last_time`.
    """
    assert sampler.S is not None
    fine = fine_trajectory(model, schedule, x_T, sampler, candidates, prediction)

    @functools.cache
    def error(tau: tuple[int, ...]) -> float:
        return end_error(model, schedule, x_T, sampler.at_times(tau), fine.end, prediction)

    named = [spec.tau(schedule.T) for spec in named_spacings(sampler, schedule.T).values()]
    starts = [
        least_deviation_tau(fine, sampler.build_rule(), sampler.S)[0],
        min((tau for tau in named if len(set(tau)) == sampler.S), key=error),
    ]
    return min((descend(tau, candidates, error) for tau in starts), key=error), fine.end


def named_spacings(sampler: SamplerSpec, T: int) -> dict[str, SamplerSpec]:
    """Return the sampler with each named spacing that takes exactly S steps; one of those with the same times."""
    assert sampler.S is not None
    taus = {SPACINGS[name](T, sampler.S): name for name in reversed(SPACINGS)}
    names = [name for tau, name in reversed(taus.items()) if len(tau) == sampler.S]
    return {name: replace(sampler, spacing=name, times=None, steps_offset=None) for name in names}


def exact_sampler(sampler: SamplerSpec, T: int) -> SamplerSpec:
    """Return what stands for exact trajectories: order 3 over all times 1..T, with a sampler's clip policy and end."""
    policy = ("clip", "clip_range", "threshold_ratio", "threshold_max", "last_time")
    return SamplerSpec("adams_bashforth", None, order=3, S=T, **{name: getattr(sampler, name) for name in policy})


def fine_trajectory(
    model: Model, schedule: NoiseSchedule, x_T: Tensor, sampler: SamplerSpec, candidates: Sequence[int], prediction: str
) -> FineTrajectory:
    """Follow the deterministic trajectories of x_T, (B, C, H, W), through every time 1..T with a rule of order 3.

    Args:
        model, schedule, prediction: as in `trajectory`.
        x_T: the starting points.
        sampler: its clip policy and `last_time` count; its rule and times do not.
        candidates: times in 1..T; T is added.
    """
    last = sampler.last_time
    times = (*sorted({t for t in candidates if t > last} | {schedule.T}, reverse=True), last)
    t, x, kept = schedule.T, x_T, list[Tensor]()

    def keep(*values: Tensor) -> None:
        kept.append(torch.stack([value[:IMAGES].double().flatten() for value in values]).cpu())

    exact = exact_sampler(sampler, schedule.T).at_times(range(last + 1, schedule.T + 1))
    for state in exact.trajectory(model, schedule, x_T, prediction=prediction):
        if t in times:
            keep(x, state.x0, state.eps)
        t, x = state.t, state.x
    keep(x, torch.zeros_like(x), torch.zeros_like(x))  # no prediction is made at the end
    vectors = torch.stack(kept, dim=1).flatten(0, 1)
    return FineTrajectory(times, tuple(schedule[t] for t in times), vectors @ vectors.T / vectors.shape[1], x)


def least_deviation_tau(fine: FineTrajectory, rule: Rule, S: int) -> tuple[tuple[int, ...], float]:
    """Return the increasing times of S steps with the least sum of deviations, and that sum.

    A tau that starts below T deviates by what x_T differs from the state there. Predictions older than the last two
    are left out, so that a rule of order 3 is searched as one of order 2.

    Raises:
        ValueError: S is not in 1..number of candidates.
    """
    N = len(fine.times)
    if not 1 <= S < N:
        raise ValueError(f"S={S} steps cannot be chosen from {N - 1} candidate times; S must lie in 1..{N - 1}.")
    start, first, later = _deviations(fine, rule, S)
    # best[i, j]: least sum of deviations after some steps, of which the last goes from candidate i to j
    best = start[:, None] + first
    choices: list[Tensor] = []
    for _ in range(S - 1):
        best, choice = (best[:, :, None] + later).min(dim=0)
        choices.append(choice)
    total, i = best[:, N - 1].min(dim=0)
    path = [N - 1, int(i)]
    for choice in reversed(choices):
        path.append(int(choice[path[-1], path[-2]]))
    return tuple(fine.times[i] for i in path[1:]), float(total)


def _deviations(fine: FineTrajectory, rule: Rule, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what single steps deviate by, as root mean squares; infinite where there is no step.

    Returns:
        (N,): taking x_T for the state at i; (N, N): a first step from i to j; (N, N, N): the step to k after i and j.
    """
    N = len(fine.times)
    x = fine.gram[:N, :N]
    start = (x.diagonal() + x[0, 0] - 2 * x[0]).clamp(min=0).sqrt()
    steps: list[Tensor] = []
    for count in (2, 3):
        candidates = torch.combinations(torch.arange(N), count)
        deviations = torch.full((N,) * count, math.inf, dtype=torch.float64)
        deviations[tuple(candidates.T)] = _rms(fine, rule, S, candidates.tolist())
        steps.append(deviations)
    return start, steps[0], steps[1]


def _rms(fine: FineTrajectory, rule: Rule, S: int, steps: list[list[int]]) -> Tensor:
    """Return the root mean square of what each step misses, (len(steps),); a step is candidates [..., from, to]."""
    N = len(fine.times)
    index, factors = [], []
    for *visited, k in steps:
        is_last = k == N - 1
        used = visited[::-1][: 1 if is_last and rule.lower_order_below > S else rule.memory]
        levels = [fine.levels[i] for i in used]
        row, at = rule.coefficients(levels, fine.levels[k]), used
        if not is_last and (correction := rule.correction((fine.levels[k], *levels))) is not None:
            row, at = correction, [k, *used]
        terms = list(zip(at, ((row.x0, row.eps), *row.past), strict=False))
        terms += [(k, (0.0, 0.0))] * (3 - len(terms))
        index.append([k, *(N + i for i, _ in terms), *(2 * N + i for i, _ in terms)])
        factors.append([-1.0, *(c for _, (c, _) in terms), *(c for _, (_, c) in terms)])
    i, c = torch.tensor(index), torch.tensor(factors, dtype=torch.float64)
    squared = torch.einsum("ma,mab,mb->m", c, fine.gram[i[:, :, None], i[:, None, :]], c)
    return squared.clamp(min=0).sqrt()


def end_error(
    model: Model, schedule: NoiseSchedule, x_T: Tensor, sampler: SamplerSpec, exact: Tensor, prediction: str
) -> float:
    """Return the root mean square distance of the ends of the sampler's trajectories from x_T to `exact`."""
    end = last_state(sampler.trajectory(model, schedule, x_T, prediction=prediction))
    return float((end - exact).double().square().mean().sqrt())


def descend(
    tau: tuple[int, ...], candidates: Sequence[int], error: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...]:
    """Move single times to other candidates as long as the error falls: at most 1 + 2 len(STRIDES) len(tau) trials."""
    least, grid = error(tau), sorted({*candidates, *tau})
    for stride in STRIDES:
        for i in range(len(tau)):
            for move in (-stride, stride):
                at = bisect_left(grid, tau[i]) + move
                if not 0 <= at < len(grid):
                    continue
                trial = (*tau[:i], grid[at], *tau[i + 1 :])
                if all(a < b for a, b in pairwise(trial)) and (value := error(trial)) < least:
                    tau, least = trial, value
    return tau
