"""Likelihood by the probability-flow equation: Gaussian data, whose likelihood is known, and Hutchinson's estimate."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.diffusion.gaussians import PIXEL
from ddim.diffusion.likelihood import (
    PROBES,
    Solved,
    adaptive_steps,
    ascending_times,
    bits_per_dim,
    dequantise,
    draw_probes,
    fixed_steps,
    hutchinson,
)
from ddim.diffusion.prediction import PREDICTIONS, x0_from_eps
from ddim.diffusion.rules import DDIM, Rule
from ddim.diffusion.schedule import from_betas, linear_schedule, zero_terminal_snr
from ddim.diffusion.solvers import AdamsBashforth, Heun
from ddim.diffusion.timesteps import quadratic_tau
from ddim.random import SAMPLING, gaussian

SCHEDULE = linear_schedule(1000)
SHAPE, D, B = (1, 2, 3), 6, 12
ROOTS = gaussian(5, SAMPLING, 0, range(D), (D,)).double() / 4
COVARIANCE = ROOTS @ ROOTS.T + 0.05 * torch.eye(D, dtype=torch.float64)
X = gaussian(6, SAMPLING, 0, range(B), (D,)).double() @ torch.linalg.cholesky(COVARIANCE).T
TRUTH = torch.distributions.MultivariateNormal(torch.zeros(D, dtype=torch.float64), COVARIANCE).log_prob(X)
IMAGES = X.reshape(B, *SHAPE)


def exact(prediction: str = "eps", schedule: Any = SCHEDULE) -> Any:
    """The network without an error for data N(0, COVARIANCE); between whole times, φ = arctan σ̄ is linear."""
    angles = torch.acos(schedule.alpha_bar.sqrt())
    values, vectors = torch.linalg.eigh(COVARIANCE)

    def model(x: Tensor, t: Tensor) -> Tensor:
        whole = t.double().floor().long().clamp(max=schedule.T - 1)
        a = torch.lerp(angles[whole], angles[whole + 1], t.double() - whole).cos().square()[:, None]
        y = x.double().flatten(1) @ vectors
        eps = (y * (1 - a).sqrt() / (a * values + 1 - a)) @ vectors.T
        eps = eps.reshape(x.shape)
        a = a.reshape(-1, 1, 1, 1)
        target = eps if prediction == "eps" else PREDICTIONS[prediction].target(x0_from_eps(eps, x.double(), a), eps, a)
        return target.to(x.dtype)

    return model


def difference(solved: Solved) -> Tensor:
    """Return bits per dimension above the truth, of each image."""
    return bits_per_dim(solved.log_likelihood, D) - bits_per_dim(TRUTH, D)


def probes(kind: str = "rademacher", count: int = 16) -> list[Tensor]:
    return draw_probes(kind, count, IMAGES, 0, range(B))


@pytest.mark.parametrize("kind", PROBES)
def test_random_probes_give_the_likelihood_of_gaussian_data(kind: str) -> None:
    solved = fixed_steps(exact("v"), SCHEDULE, IMAGES, quadratic_tau(1000, 50), Heun(), probes(kind), prediction="v")
    error = float(difference(solved).std()) / math.sqrt(B)
    assert abs(float(difference(solved).mean())) < 3 * error
    assert solved.evaluations.tolist() == [99] * B


# Each basis vector times sqrt(D): the mean over them is the trace itself.
BASIS = [(math.sqrt(D) * torch.eye(D, dtype=torch.float64)[i]).reshape(SHAPE).expand(B, *SHAPE) for i in range(D)]


@pytest.mark.parametrize(
    ("rule", "S", "bound"), [(DDIM(), 200, 0.06), (Heun(), 50, 0.01), (AdamsBashforth(3), 100, 0.01)]
)
def test_every_deterministic_rule_integrates_the_trace(rule: Rule, S: int, bound: float) -> None:
    solved = fixed_steps(exact(), SCHEDULE, IMAGES, quadratic_tau(1000, S), rule, BASIS)
    assert float(difference(solved).abs().max()) < bound


@pytest.mark.parametrize(("prediction", "first_time"), [("eps", 0), ("v", 0), ("x0", 1)])
def test_adaptive_steps_give_the_likelihood_of_gaussian_data(prediction: str, first_time: int) -> None:
    counted: list[int] = []
    kwargs: Any = {"prediction": prediction, "first_time": first_time, "after_evaluation": counted.append}
    solved = adaptive_steps(exact(prediction), SCHEDULE, IMAGES, 1e-4, BASIS, **kwargs)
    assert float(difference(solved).abs().max()) < 0.003
    assert int(solved.evaluations.sum()) == sum(counted) + B  # the first slope is asked for before the first step


def test_a_smaller_tolerance_comes_closer_and_costs_more() -> None:
    exactly, *others = (adaptive_steps(exact(), SCHEDULE, IMAGES, tol, BASIS) for tol in (1e-5, 1e-1, 1e-3))
    errors = [float((bits_per_dim(o.log_likelihood - exactly.log_likelihood, D)).abs().max()) for o in others]
    assert errors[1] < errors[0] / 10
    assert int(others[0].evaluations.sum()) < int(others[1].evaluations.sum()) < int(exactly.evaluations.sum())


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_data_stand_at_the_first_time(adaptive: bool) -> None:
    schedule = linear_schedule(1000, beta_start=0.01)
    a = schedule[1]
    noisy = torch.distributions.MultivariateNormal(torch.zeros(D).double(), a * COVARIANCE + (1 - a) * torch.eye(D))
    if adaptive:
        solved = adaptive_steps(exact("eps", schedule), schedule, IMAGES, 1e-5, BASIS, first_time=1)
    else:
        tau = (1, *quadratic_tau(1000, 100))
        solved = fixed_steps(exact("eps", schedule), schedule, IMAGES, tau, Heun(), BASIS, first_time=1)
    error = bits_per_dim(solved.log_likelihood - noisy.log_prob(X), D).abs().max()
    assert float(error) < 0.01 < float(bits_per_dim(TRUTH - noisy.log_prob(X), D).abs().mean())


def test_zero_terminal_snr_is_for_the_adaptive_rule() -> None:
    schedule = zero_terminal_snr(SCHEDULE)
    model = exact("v", schedule)
    assert float(difference(adaptive_steps(model, schedule, IMAGES, 1e-4, BASIS, prediction="v")).abs().max()) < 0.003
    with pytest.raises(ValueError, match="σ̄ is infinite at alpha_bar=0"):
        fixed_steps(model, schedule, IMAGES, (500, 1000), Heun(), BASIS, prediction="v")
    with pytest.raises(ValueError, match="divides by 0"):
        adaptive_steps(model, schedule, IMAGES, 1e-4, BASIS)


def test_steps_that_never_suffice_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddim.diffusion.likelihood.MOST_STEPS", 20)
    with pytest.raises(ValueError, match="tolerance=1e-14 is not kept in 20 steps; take a larger one"):
        adaptive_steps(exact(), SCHEDULE, IMAGES, 1e-14, BASIS)
    for tolerance in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            adaptive_steps(exact(), SCHEDULE, IMAGES, tolerance, BASIS)


WEIGHTS = gaussian(8, SAMPLING, 0, range(2 * D), (D,)).double()


def nonlinear(x: Tensor) -> Tensor:
    y = x.flatten(1) @ WEIGHTS[:D] + 0.3
    return (y.tanh() @ WEIGHTS[D:]).reshape(x.shape)


@pytest.mark.parametrize("kind", PROBES)
def test_hutchinsons_estimate_is_unbiased(kind: str) -> None:
    count = 20_000
    jacobian = torch.autograd.functional.jacobian(lambda x: nonlinear(x).flatten(), IMAGES[:1]).reshape(D, D)
    repeated = IMAGES[:1].expand(count, *SHAPE)
    y, traces = hutchinson(nonlinear, repeated, draw_probes(kind, 1, repeated, 3, range(count)))
    assert torch.allclose(y[0], nonlinear(IMAGES[:1])[0])
    error = float(traces.std()) / math.sqrt(count)
    assert abs(float(traces.mean() - jacobian.trace())) < 3 * error
    off_diagonal = (jacobian + jacobian.T)[~torch.eye(D, dtype=torch.bool)].square().sum() / 2
    diagonal = 2 * jacobian.diagonal().square().sum() * (kind == "gaussian")
    assert float(traces.var()) == pytest.approx(float(off_diagonal + diagonal), rel=0.05)  # Avron and Toledo 2011
    _, means = hutchinson(nonlinear, repeated, draw_probes(kind, 4, repeated, 3, range(count)))
    assert float(means.var()) == pytest.approx(float(traces.var()) / 4, rel=0.05)


def test_noise_is_a_function_of_seed_and_image() -> None:
    x = IMAGES.float()
    for kind in PROBES:
        together = draw_probes(kind, 2, x, 1, range(B))
        alone = draw_probes(kind, 2, x[7:8], 1, [7])
        assert [torch.equal(z[7:8], one) for z, one in zip(together, alone, strict=True)] == [True, True]
        assert not torch.equal(*together)
        assert not torch.equal(draw_probes(kind, 1, x, 2, range(B))[0], together[0])
    assert set(draw_probes("rademacher", 1, x, 0, range(B))[0].unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(dequantise(x, 1, range(B))[7:8], dequantise(x[7:8], 1, [7]))


def test_dequantisation_is_uniform_over_a_grey_level() -> None:
    black = torch.full((2000, *SHAPE), -1.0)
    u = (dequantise(black, 0, range(2000)) + 1) / PIXEL
    assert float(u.abs().max()) <= 0.5
    assert abs(float(u.mean())) < 4 * math.sqrt(1 / 12 / u.numel())
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.02)


def test_times_go_up_from_the_data() -> None:
    assert ascending_times((1, 1, 3, 10), 0) == (0, 1, 3, 10)
    assert ascending_times((1, 1, 3, 10), 1) == (1, 3, 10)


def test_the_network_is_read_at_the_level_of_the_data_first() -> None:
    """At ᾱ = 1, where v is ε; a large β_1 shows it."""
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    solved = fixed_steps(lambda x, t: 0.3 * x, from_betas([0.3]), 0.5 * z, (1,), DDIM(), [z], prediction="v")
    x_1 = 0.5 * (math.sqrt(0.7) + 0.3 * math.sqrt(0.3))
    assert solved.x_T.item() == pytest.approx(x_1, rel=1e-6)
    prior = -0.5 * (x_1**2 + math.log(2 * math.pi))
    assert solved.log_likelihood.item() == pytest.approx(prior + 0.3 * math.sqrt(0.3 / 0.7), rel=1e-6)
