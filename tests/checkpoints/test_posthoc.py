"""Post-hoc EMA: profiles and their combinations against sums over single steps, in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest

from ddim.checkpoints import posthoc
from ddim.checkpoints.posthoc import (
    LENGTHS,
    PostHocSpec,
    exponent,
    fit_profile,
    longest_from,
    relative_length,
    share_before,
    snapshot_steps,
    update_rate,
)
from ddim.config import build
from ddim.errors import UserError


def step_weights(length: float, t: int, T: int) -> np.ndarray:
    """Return how much the weights of each step 1..T count in the average at step t: the profile over one step."""
    edges = (np.arange(T + 1) / t).clip(max=1) ** (exponent(length) + 1)
    return np.diff(edges)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.15, 0.25, 0.28])
def test_updates_give_the_power_function_profile(length):
    T, weights = 60, np.zeros(60)
    for step in range(1, T + 1):
        rate = update_rate(length, step)
        weights = (1 - rate) * weights + rate * (np.arange(1, T + 1) == step)
        assert np.allclose(weights, step_weights(length, step, T), rtol=0, atol=1e-14)


@pytest.mark.parametrize("length", [1e-3, 0.01, 0.05, 0.15, 0.28])
def test_the_length_is_the_standard_deviation(length):
    gamma = exponent(length)
    assert gamma > 0
    assert math.isclose(relative_length(gamma), length, rel_tol=1e-9)
    n = 2_000_000
    u = (np.arange(n) + 0.5) / n
    p = (gamma + 1) * u**gamma / n
    mean = (p * u).sum()
    assert math.isclose(((p * (u - mean) ** 2).sum()) ** 0.5, length, rel_tol=1e-5)


def walk(T: int) -> np.ndarray:
    """Return the weights of each step: a random walk from far away, as in a training, (T, 30)."""
    generator = np.random.default_rng(0)
    steps = generator.normal(size=(T, 30)) / np.arange(1, T + 1)[:, None] ** 0.5
    return 3 * generator.normal(size=30) + steps.cumsum(0)


@pytest.mark.parametrize("T", [2000, 3001])
def test_a_combination_is_near_the_average_of_every_length(T):
    theta = walk(T)
    profiles = [(length, t) for t in (*snapshot_steps(T), T) for length in LENGTHS]
    kept = np.array([step_weights(length, t, T) @ theta for length, t in profiles])
    for length in (0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25):
        coefficients, error = fit_profile(profiles, length, T)
        exact, profile = step_weights(length, T, T) @ theta, step_weights(length, T, T)
        assert np.linalg.norm(coefficients @ kept - exact) < 1e-3 * np.linalg.norm(exact)
        assert math.isclose(sum(coefficients), 1, rel_tol=1e-12)
        made = sum(c * step_weights(own, t, T) for c, (own, t) in zip(coefficients, profiles, strict=True))
        measured = np.linalg.norm(made - profile) / np.linalg.norm(profile)
        assert error < (1e-6 if length in LENGTHS else 0.03)
        assert math.isclose(error, measured, rel_tol=0.02, abs_tol=1e-6)  # a step is not a point
        if length in LENGTHS:
            assert np.allclose(coefficients, [float(p == (length, T)) for p in profiles], atol=1e-7)


def test_short_averages_are_said_to_be_far():
    T = 2000
    profiles = [(length, t) for t in (*snapshot_steps(T), T) for length in LENGTHS]
    errors = [fit_profile(profiles, length, T)[1] for length in (0.04, 0.03, 0.02, 0.01, 0.001)]
    assert errors == sorted(errors)
    assert errors[0] < 0.02 < 0.5 < errors[-1] <= 1.5


def test_steps_of_snapshots_depend_on_nothing_else():
    steps = snapshot_steps(800_001)
    assert (steps[:3], steps[7], len(steps), len(snapshot_steps(80_001))) == ([100, 110, 121], 195, 95, 71)
    assert all(1.09 < later / step < 1.11 for step, later in pairwise(steps))
    assert snapshot_steps(100) == []
    assert snapshot_steps(121) == [100, 110]
    assert [step for step in range(1, 2000) if step in snapshot_steps(step + 1)] == snapshot_steps(2000)


def test_what_began_late_is_known():
    assert math.isclose(share_before(0.1, 300, 600), step_weights(0.1, 600, 600)[:300].sum(), rel_tol=1e-9)
    longest = longest_from(300, 600)
    assert math.isclose(share_before(longest, 300, 600), 0.01, rel_tol=1e-6)
    assert longest_from(1, 10_000) > posthoc.MAX_LENGTH


@pytest.mark.parametrize("length", [0, -0.1, 0.281, [], [0.1, 0.1], [0.1, 0.3], "long"])
def test_wrong_lengths_are_refused(length):
    with pytest.raises(UserError, match="length="):
        build(PostHocSpec, {"checkpoint": "a.ckpt", "length": length}, "")
