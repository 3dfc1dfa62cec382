"""The search for times: dynamic programming against brute force, and what it gains on images it has not seen."""

import dataclasses
from itertools import combinations

import pytest
import torch

from ddim import DDIM, initial_noise, linear_schedule, quadratic_tau
from ddim.diffusion.rules import Estimate, apply
from ddim.diffusion.sampling import rows
from ddim.diffusion.solvers import AdamsBashforth, DPMSolverPP, Heun, UniPC
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.tau_search import (
    STRIDES,
    descend,
    end_error,
    fine_trajectory,
    least_deviation_tau,
    named_spacings,
    search_tau,
)

SCHEDULE = linear_schedule(200, 5e-4, 0.1)
SHAPE = (1, 4, 4)


def mixture(x, t):
    """ε̂ of an exact network for pixels ½ N(-1, ¼) + ½ N(1, ¼)."""
    a = SCHEDULE[int(t[0])]
    variance = 0.25 * a + 1 - a
    mean = a**0.5 * torch.tanh(a**0.5 * x / variance)
    return (1 - a) ** 0.5 * (x - mean) / variance


def x_T(first: int, count: int) -> torch.Tensor:
    return initial_noise(range(first, first + count), SHAPE, seed=0).double()


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(("S", "last_time"), [(1, 0), (2, 0), (4, 0), (3, 1)])
@pytest.mark.parametrize("rule", [DDIM(), AdamsBashforth(2), DPMSolverPP(2), UniPC(2), UniPC(1, "B1"), Heun()], ids=str)
def test_dynamic_programming_equals_brute_force(rule, S, last_time):
    """Over all choices of S times, each step taken with the states and predictions of the fine trajectory."""
    candidates = (5, 20, 45, 80, 110, 150, 200)
    start = x_T(0, 3)
    states, estimates, x, t = {}, {}, start, 200
    every = SamplerSpec("adams_bashforth", None, order=3, S=3, last_time=last_time).at_times(range(last_time + 1, 201))
    for state in every.trajectory(mixture, SCHEDULE, start):
        states[t], estimates[t] = x, Estimate(SCHEDULE[t], state.x0, state.eps)
        x, t = state.x, state.t
    states[last_time] = x

    def deviation(tau):
        times = (*reversed(tau), last_time)
        total = rms(start - states[times[0]])
        for k, row in enumerate(rows(rule, SCHEDULE, times)):
            known = [estimates[t] for t in reversed(times[: k + 1])][: rule.memory]
            if row.correction is not None:
                end = apply(row.correction, [estimates[row.s], *known])
            else:
                end = apply(row.step, known)
            total += rms(end - states[row.s])
        return total

    sums = {tau: deviation(tau) for tau in combinations(candidates, S)}
    fine = fine_trajectory(mixture, SCHEDULE, start, SamplerSpec(last_time=last_time), candidates, "eps")
    tau, total = least_deviation_tau(fine, rule, S)
    assert torch.equal(fine.end, states[last_time])
    assert total == pytest.approx(min(sums.values()), rel=1e-6)
    assert sums[tau] == pytest.approx(min(sums.values()), rel=1e-6)


@pytest.mark.parametrize("clip", [{"clip_range": 0.5}, {"threshold_ratio": 0.9, "threshold_max": 2.0}], ids=str)
def test_the_fine_trajectory_has_the_clip_policy_of_the_sampler(clip):
    start = x_T(0, 3)
    every = SamplerSpec("adams_bashforth", None, order=3, S=200, clip="x0_and_eps", **clip)
    *_, last = every.trajectory(mixture, SCHEDULE, start)
    fine = fine_trajectory(mixture, SCHEDULE, start, SamplerSpec(clip="x0_and_eps", **clip), (50, 100), "eps")
    assert torch.equal(fine.end, last.x)
    assert rms(fine.end - fine_trajectory(mixture, SCHEDULE, start, SamplerSpec(), (50, 100), "eps").end) > 0.01


def test_an_offset_of_the_spacing_does_not_count():
    plain, offset = SamplerSpec(S=4), SamplerSpec(S=4, spacing="leading", steps_offset=1)
    candidates, start = (20, 50, 100, 150), x_T(0, 2)
    taus = [search_tau(mixture, SCHEDULE, start, spec, candidates, "eps")[0] for spec in (plain, offset)]
    assert taus[0] == taus[1]


def test_more_steps_than_candidates_are_refused():
    fine = fine_trajectory(mixture, SCHEDULE, x_T(0, 1), SamplerSpec(), (50, 100), "eps")
    assert least_deviation_tau(fine, DDIM(), 3)[0] == (50, 100, 200)
    with pytest.raises(ValueError, match=r"S=4 .* 3 candidate times"):
        least_deviation_tau(fine, DDIM(), 4)


def test_descent_reaches_a_separable_minimum_in_few_trials():
    least, trials = (13, 40, 77), []

    def error(tau):
        trials.append(tau)
        return sum(abs(a - b) for a, b in zip(tau, least, strict=True))

    assert descend((25, 31, 90), range(1, 101), error) == least
    assert all(a < b < c for a, b, c in trials)
    assert len(trials) <= 1 + 2 * len(STRIDES) * 3


@pytest.mark.parametrize("S", [5, 10])
@pytest.mark.parametrize(("rule", "eta"), [("ddim", 0.0), ("dpm_solver_pp", None), ("unipc", None)])
def test_searched_times_beat_every_spacing_on_unseen_images(rule, eta, S):
    sampler = SamplerSpec(rule, eta, S=S)
    tau, _ = search_tau(mixture, SCHEDULE, x_T(0, 16), sampler, quadratic_tau(200, 20), "eps")
    assert len(tau) == S
    unseen = x_T(100, 64)
    exact = fine_trajectory(mixture, SCHEDULE, unseen, sampler, (), "eps").end
    errors = {
        name: end_error(mixture, SCHEDULE, unseen, spec, exact, "eps")
        for name, spec in named_spacings(sampler, 200).items()
    }
    assert {"linear", "quadratic", "cosine", "uniform", "quad"} <= set(errors)
    assert end_error(mixture, SCHEDULE, unseen, sampler.at_times(tau), exact, "eps") < 0.8 * min(errors.values())


def test_named_spacings_take_exactly_S_steps():
    for S in (7, 150, 200):  # uniform takes more than 7, and quad repeats times
        specs = named_spacings(SamplerSpec(S=S), 200)
        taus = [spec.tau(200) for spec in specs.values()]
        assert all(len(tau) == S for tau in taus)
        assert len(set(taus)) == len(taus)
    assert "uniform" not in named_spacings(SamplerSpec(S=7), 200)


@pytest.mark.parametrize("changes", [{"last_time": 1}, {"clip": "x0"}, {"clip": "x0_and_eps", "last_time": 1}])
def test_the_search_keeps_the_end_and_the_clip_policy(changes):
    """The exact trajectories are those of the same clip policy that stop at the same time."""
    start, sampler = x_T(0, 4), dataclasses.replace(SamplerSpec(S=3), **changes)
    tau, end = search_tau(mixture, SCHEDULE, start, sampler, quadratic_tau(200, 12), "eps")
    fine = sampler.at_times(range(1 + sampler.last_time, 201))
    assert end_error(mixture, SCHEDULE, start, fine, end, "eps") < 0.02
    assert end_error(mixture, SCHEDULE, start, sampler.at_times(tau), end, "eps") > 0.02
