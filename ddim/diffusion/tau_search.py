"""A tau for one network and one rule: the times whose steps leave a fine trajectory least (as GITS, Chen et al. 2024).

Along a trajectory of many steps, the states and predictions at all candidate times are known. A step of the rule
between two candidates, with the predictions that it remembers, needs no network then: its deviation is the distance of
where it leads to the state of the fine trajectory there. Dynamic programming finds the S steps with the least sum of
deviations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.diffusion.rules import Rule
from ddim.diffusion.sampling import Model, trajectory
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.solvers import AdamsBashforth


@dataclass(frozen=True, eq=False)
class FineTrajectory:
    """What the deviations of steps between candidate times follow from.

    Attributes:
        times: the candidates, descending; the last one is where sampling ends.
        levels: alpha_bar at each.
        gram: float64 (3 N, 3 N): the mean products of x, x̂0 and ε̂ (in this order) at the N candidates.
    """

    times: tuple[int, ...]
    levels: tuple[float, ...]
    gram: Tensor


def fine_trajectory(
    model: Model,
    schedule: NoiseSchedule,
    x_T: Tensor,
    candidates: Sequence[int],
    *,
    last_time: int = 0,
    prediction: str = "eps",
    clip: str = "none",
) -> FineTrajectory:
    """Follow the deterministic trajectories of x_T, (B, C, H, W), through every time 1..T with a rule of order 3.

    Args:
        model, schedule, prediction, clip: as in `trajectory`.
        x_T: the starting points; more of them estimate the deviations better.
        candidates: increasing times in 1..T; T is added.
        last_time: where sampling ends, 0 or 1.
    """
    wanted = sorted({*candidates, schedule.T}, reverse=True)
    times = (*(t for t in wanted if t > last_time), last_time)
    x = x_T
    states: list[Tensor] = []
    x0: list[Tensor] = []
    eps: list[Tensor] = []
    fine = range(schedule.T, last_time - 1, -1)
    steps = trajectory(model, schedule, x_T, fine, AdamsBashforth(3), prediction=prediction, clip=clip)
    for t, state in zip(fine[:-1], steps, strict=True):
        if t in times:
            for kept, value in ((states, x), (x0, state.x0), (eps, state.eps)):
                kept.append(value.double().flatten())
        x = state.x
    states.append(x.double().flatten())
    nothing = torch.zeros_like(states[0])  # no prediction is made at the end
    vectors = torch.stack([*states, *x0, nothing, *eps, nothing])
    return FineTrajectory(times, tuple(schedule[t] for t in times), vectors @ vectors.T / vectors.shape[1])


def search_tau(fine: FineTrajectory, rule: Rule, S: int) -> tuple[tuple[int, ...], float]:
    """Return the increasing times of S steps with the least sum of deviations, and that sum.

    Predictions older than the last two are left out, so that a rule of order 3 is searched as one of order 2.

    Raises:
        ValueError: S is not in 1..number of candidates.
    """
    N = len(fine.times)
    if not 1 <= S < N:
        raise ValueError(f"S={S} steps cannot be chosen from {N - 1} candidate times; S must lie in 1..{N - 1}.")
    first, later = _deviations(fine, rule, S)
    # best[i, j]: least sum of deviations after some steps, of which the last goes from candidate i to j
    best = torch.full((N, N), math.inf, dtype=torch.float64)
    best[0] = first
    choices: list[Tensor] = []
    for _ in range(S - 1):
        best, choice = (best[:, :, None] + later).min(dim=0)
        choices.append(choice)
    end = N - 1
    total, i = best[:, end].min(dim=0)
    path = [end, int(i)]
    for choice in reversed(choices):
        path.append(int(choice[path[-1], path[-2]]))
    return tuple(fine.times[i] for i in path[1:]), float(total)


def _deviations(fine: FineTrajectory, rule: Rule, S: int) -> tuple[Tensor, Tensor]:
    """Return the deviation of a first step to each candidate, (N,), and of the step j to k after i to j, (N, N, N)."""
    N = len(fine.times)
    first = torch.full((N,), math.inf, dtype=torch.float64)
    later = torch.full((N, N, N), math.inf, dtype=torch.float64)
    for k in range(1, N):
        first[k] = _deviation(fine, rule, (0,), k, S)
    for j in range(1, N):
        for k in range(j + 1, N):
            if rule.memory == 1:
                later[:j, j, k] = _deviation(fine, rule, (j,), k, S)
            else:
                for i in range(j):
                    later[i, j, k] = _deviation(fine, rule, (j, i), k, S)
    return first, later


def _deviation(fine: FineTrajectory, rule: Rule, remembered: tuple[int, ...], k: int, S: int) -> float:
    """Return the root mean square of what the step to candidate k misses; predictions at `remembered`, newest first."""
    is_last = k == len(fine.times) - 1
    used = remembered[:1] if is_last and rule.lower_order_below > S else remembered
    levels = [fine.levels[i] for i in used]
    row, at = rule.coefficients(levels, fine.levels[k]), used
    if not is_last and (correction := rule.correction((fine.levels[k], *levels))) is not None:
        row, at = correction, (k, *used)
    N = len(fine.times)
    terms = {k: -1.0}
    for i, (x0, eps) in zip(at, ((row.x0, row.eps), *row.past), strict=False):
        terms[N + i], terms[2 * N + i] = x0, eps
    index, factors = list(terms), torch.tensor(list(terms.values()), dtype=torch.float64)
    squared = factors @ fine.gram[index][:, index] @ factors
    return math.sqrt(max(0.0, float(squared)))
