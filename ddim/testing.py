"""Checks of a sampling rule, for its author's tests: the order of convergence on trajectories that are known."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddim.diffusion.rules import Rule
from ddim.diffusion.sampling import last_state, trajectory
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.solvers import DEIS

_T = 1 << 21  # fine enough for the first steps of a high order, which are small
_START, _END = 5 * _T // 8, _T // 8
_STEPS = (128, 256, 512)
_DATA_VARIANCE = 9.0


def check_order(rule: Rule, tolerance: float = 0.15) -> dict[str, float]:
    """Assert that a deterministic rule converges with the order that it claims, `rule.convergence`.

    The error is fitted over 128 to 512 steps on two kinds of data: Gaussian, where the trajectory is known, and a
    mixture of two Gaussians, where 2,048 steps of a rule of order 4 stand for it. Before the first step come smaller
    ones, so that a rule with memory does not carry the error of a first step of lower order. Takes about a second.

    Args:
        rule: with `convergence` not None.
        tolerance: on the fitted order.

    Returns:
        The fitted orders, by name of the data.

    Raises:
        AssertionError: a fitted order is not what the rule claims.
    """
    assert rule.convergence is not None, f"{rule} claims no order of convergence; set `convergence`."
    fitted = {}
    for name, model, exact in (("gaussian", _gaussian, _gaussian_end()), ("mixture", _mixture, _mixture_end())):
        logs = [math.log(float((_solve(rule, model, steps) - exact).square().mean().sqrt())) for steps in _STEPS]
        fitted[name] = -_slope([math.log(steps) for steps in _STEPS], logs)
    for name, order in fitted.items():
        assert abs(order - rule.convergence) <= tolerance, (
            f"{rule} claims order {rule.convergence}, but its error on {name} data falls with order {order:.2f}."
        )
    return fitted


@functools.cache
def _schedule() -> NoiseSchedule:
    """The variance-preserving SDE with β from 0.1 to 20 (Song et al. 2021)."""
    t = torch.linspace(0, 1, _T + 1, dtype=torch.float64)
    return NoiseSchedule(torch.exp(-(0.1 * t + 9.95 * t**2)), "vp_sde")


def _x_T() -> Tensor:
    return torch.linspace(0.2, 2.0, 10, dtype=torch.float64).reshape(10, 1, 1, 1)


def _gaussian(x: Tensor, t: Tensor) -> Tensor:
    """ε̂ of an exact network for data N(0, 9)."""
    a = _schedule()[int(t[0])]
    return x * math.sqrt(1 - a) / (_DATA_VARIANCE * a + 1 - a)


def _gaussian_end() -> Tensor:
    std = [math.sqrt(_DATA_VARIANCE * a + 1 - a) for a in (_schedule()[_START], _schedule()[_END])]
    return _x_T() * std[1] / std[0]


def _mixture(x: Tensor, t: Tensor) -> Tensor:
    """ε̂ of an exact network for data ½ N(-1, ¼) + ½ N(1, ¼)."""
    a = _schedule()[int(t[0])]
    variance = 0.25 * a + 1 - a
    mean = math.sqrt(a) * torch.tanh(math.sqrt(a) * x / variance)
    return math.sqrt(1 - a) * (x - mean) / variance


@functools.cache
def _mixture_end() -> Tensor:
    return _solve(DEIS(order=4), _mixture, 2048)


def _solve(rule: Rule, model: Callable[[Tensor, Tensor], Tensor], steps: int) -> Tensor:
    h = (_START - _END) // steps
    first = [h >> j for j in range(2 * steps.bit_length(), 0, -1)]  # h / 2^j, so that the first is of order h³ at least
    starts = sorted({d for d in first if d > 0})
    times = [_START, *(_START - d for d in starts), *(_START - h * i for i in range(1, steps + 1))]
    return last_state(trajectory(model, _schedule(), _x_T(), times, rule))


def _slope(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
