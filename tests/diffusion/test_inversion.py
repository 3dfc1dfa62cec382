"""Inversion: which step each convention takes, what it costs, and how far images come back."""

import math
from itertools import pairwise

import pytest
import torch

from ddim import DDIM, NoiseSchedule, initial_noise, linear_schedule, linear_tau, step, zero_terminal_snr
from ddim.diffusion.inversion import BDIA, INVERSIONS, FixedPoint, Inversion
from ddim.diffusion.prediction import PREDICTIONS, x0_and_eps
from ddim.diffusion.sampling import last_state, trajectory
from ddim.diffusion.timesteps import reference_quad_tau

SCHEDULE = linear_schedule(1000)
ALL = [*map(Inversion, INVERSIONS), Inversion("fixed_point", 1), Inversion("fixed_point", 6)]


def mixture(x, t):
    """The optimal ε for values that are N(-1, 0.3²) or N(1, 0.3²): nonlinear in x."""
    a = SCHEDULE.alpha_bar[t].reshape(-1, 1, 1, 1)
    variance = a * 0.09 + 1 - a
    x0 = torch.tanh(a.sqrt() * x / variance) * (1 - a * 0.09 / variance) + a.sqrt() * 0.09 / variance * x
    return (x - a.sqrt() * x0) / (1 - a).sqrt()


def images(n=8):
    z = initial_noise(range(n), (1, 4, 4), seed=3).double()
    return z.sign() + 0.3 * z.flip(0)


def round_trip(inversion, x_0, tau, model=mixture):
    *_, before, last = inversion.encode(model, SCHEDULE, x_0, tau)
    return last_state(inversion.decode(model, SCHEDULE, last.x, tau, second=before.x))


def error_of(inversion, S):
    x_0 = images()
    return float(((round_trip(inversion, x_0, linear_tau(1000, S)) - x_0) / 2).square().mean())


def test_bdia_comes_back_exactly():
    assert error_of(Inversion("bdia"), 10) < 1e-20
    assert error_of(Inversion("bdia"), 200) < 1e-20
    assert error_of(Inversion("paper"), 10) > 1e-4


@pytest.mark.parametrize("S", [10, 20, 50])
def test_errors_are_ordered(S):
    """Each fixed-point iteration helps, the first is diffusers' convention, and bdia is below all."""
    k = [error_of(Inversion("fixed_point", k), S) for k in (1, 2, 4, 8)]
    assert all(more < fewer for fewer, more in pairwise(k))
    assert error_of(Inversion("diffusers"), S) == k[0]
    assert k[2] < error_of(Inversion("paper"), S)
    assert error_of(Inversion("bdia"), S) < k[-1] / 1e6


@pytest.mark.parametrize("method", ["paper", "diffusers", "fixed_point"])
def test_more_steps_come_back_closer(method):
    errors = [error_of(Inversion(method), S) for S in (10, 50, 200)]
    assert all(more < fewer / 3 for fewer, more in pairwise(errors))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_converged_fixed_point_is_undone_by_the_step_down(prediction):
    def model(x, t):
        a = SCHEDULE[int(t[0])]
        eps = mixture(x, t)
        return PREDICTIONS[prediction].target((x - math.sqrt(1 - a) * eps) / math.sqrt(a), eps, a)

    x_0, times = images(), (0, 20, 40)
    up = [s.x for s in trajectory(model, SCHEDULE, x_0, times, FixedPoint(60), prediction=prediction)]
    down = [s.x for s in trajectory(model, SCHEDULE, up[-1], times[::-1], prediction=prediction)]
    assert torch.allclose(down[0], up[0], atol=1e-10)
    assert torch.allclose(down[1], x_0, atol=1e-10)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_diffusers_convention_is_that_of_its_scheduler(prediction):
    diffusers = pytest.importorskip("diffusers")
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = diffusers.DDIMInverseScheduler(clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule(torch.cat([torch.ones(1), scheduler.alphas_cumprod]).double(), "theirs")
    tau = tuple(int(t) + 1 for t in scheduler.timesteps)
    states = trajectory(mixture, schedule, images(), (0, *tau), INVERSIONS["diffusers"](), prediction=prediction)
    x = images()
    for index, state in zip(scheduler.timesteps, states, strict=True):
        x = scheduler.step(mixture(x, torch.full((len(x),), int(index) + 1)), int(index), x).prev_sample
        assert torch.allclose(state.x, x, atol=1e-6, rtol=1e-6)


def test_bdia_is_the_coupled_step_of_zhang_et_al():
    """x_s = x_r + D(x_t, s) - D(x_t, r), both ways, with D the step of DDIM."""
    levels = [SCHEDULE[t] for t in (900, 700, 400)]
    for a_r, a_t, a_s in (levels, levels[::-1]):
        x_r, x_t, eps = (initial_noise([i], (1, 4, 4), 0).double() for i in range(3))
        x0, _ = x0_and_eps("eps", "none", eps, x_t, a_t)
        expected = x_r + step(DDIM(), x0, eps, a_t, a_s) - step(DDIM(), x0, eps, a_t, a_r)
        c = BDIA().coefficients((a_t, a_r), a_s)
        (factor_x0, factor_eps), *_ = c.past
        any_x0 = initial_noise([9], (1, 4, 4), 0).double()
        any_eps = (x_r - math.sqrt(a_r) * any_x0) / math.sqrt(1 - a_r)
        assert torch.allclose(c.x0 * x0 + c.eps * eps + factor_x0 * any_x0 + factor_eps * any_eps, expected, atol=1e-12)


@pytest.mark.parametrize("inversion", ALL, ids=str)
@pytest.mark.parametrize("tau", [linear_tau(1000, 7), reference_quad_tau(1000, 30)], ids=["linear", "repeated times"])
def test_the_counted_evaluations_are_the_stated_ones(inversion, tau):
    asked = []

    def model(x, t):
        asked.append(int(t[0]))
        return mixture(x, t)

    x_0 = images(2)
    encoding, decoding = inversion.evaluations(len(tau))
    *_, before, last = inversion.encode(model, SCHEDULE, x_0, tau)
    assert len(asked) == encoding == last.evaluations
    up = list(asked)
    *_, end = inversion.decode(model, SCHEDULE, last.x, tau, second=before.x)
    assert len(asked) - encoding == decoding == end.evaluations
    assert set(up) == ({1, *tau[:-1]} if inversion.method in ("paper", "bdia") else set(tau))
    assert end.k == len(tau)
    if inversion.method == "bdia":
        assert torch.allclose(end.x, x_0, atol=1e-9)


def test_the_second_state_is_used_by_bdia_only():
    x_T, tau = images(), linear_tau(1000, 5)
    for inversion in ALL:
        with_it = last_state(inversion.decode(mixture, SCHEDULE, x_T, tau, second=2 * x_T))
        without = last_state(inversion.decode(mixture, SCHEDULE, x_T, tau))
        assert torch.equal(with_it, without) == (inversion.method != "bdia")


def test_settings_make_the_same_inversion_and_state_the_default():
    assert Inversion("fixed_point").settings() == {"method": "fixed_point", "iterations": 3}
    for inversion in ALL:
        again = Inversion(**inversion.settings())
        assert (again.encoder(), again.label) == (inversion.encoder(), inversion.label)
    assert len({inversion.label for inversion in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("papr", None), "inversion='papr' is not known; allowed: paper, diffusers, fixed_point, bdia"),
        (("fixed_point", 0), "iterations=0 must be at least 1"),
        (("bdia", 2), "iterations=2 is for inversion=fixed_point"),
        (("diffusers", 2), "iterations=2 is for inversion=fixed_point"),
    ],
)
def test_unknown_inversions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Inversion(*arguments)


def test_steps_that_cannot_be_inverted_are_refused():
    for method in ("diffusers", "fixed_point", "bdia"):
        with pytest.raises(ValueError, match="do not clip x0; take clip=none"):
            Inversion(method).encode(mixture, SCHEDULE, images(), (500, 1000), clip="x0")
    with pytest.raises(ValueError, match="S=2 or more"):
        Inversion("bdia").encode(mixture, SCHEDULE, images(), (1000,))
    with pytest.raises(ValueError, match="sample with ddim"):
        trajectory(mixture, SCHEDULE, images(), (1000, 500), FixedPoint())
    for method in ("paper", "diffusers", "bdia"):
        with pytest.raises(ValueError, match="gives no ε at t=0"):
            Inversion(method).check_levels(SCHEDULE, (500, 1000), "x0")
    Inversion("fixed_point").check_levels(SCHEDULE, (500, 1000), "x0")


def test_inversions_that_fail_at_alpha_bar_zero_are_refused():
    """The fixed point is any x there; the other two come back."""
    schedule, tau = zero_terminal_snr(SCHEDULE), (250, 500, 750, 1000)
    for method in ("fixed_point", "bdia"):
        with pytest.raises(
            ValueError, match=rf"inversion={method} cannot encode to alpha_bar=0 .*take paper or diffus"
        ):
            Inversion(method).check_levels(schedule, tau, "v")
        Inversion(method).check_levels(schedule, tau[:-1], "v")
        Inversion(method).check_levels(SCHEDULE, tau, "v")
    for method in ("paper", "diffusers"):
        Inversion(method).check_levels(schedule, tau, "v")
    *_, before, last = Inversion("fixed_point").encode(
        lambda x, t: torch.sin(x), schedule, images(), tau, prediction="v"
    )
    assert torch.equal(last.x, before.x)
