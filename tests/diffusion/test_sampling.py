import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from ddim import (
    DDIM,
    SPACINGS,
    SigmaHat,
    encode,
    from_betas,
    initial_noise,
    linear_schedule,
    linear_tau,
    reference_quad_tau,
    reference_uniform_tau,
    sample,
    step,
    step_noise,
    trajectory,
    zero_terminal_snr,
)
from ddim.diffusion.registry import RULES
from ddim.diffusion.timesteps import quadratic_tau

SCHEDULE = linear_schedule(1000)
SHAPE = (3, 4, 4)
PAIRS = [(1000, 999), (1000, 900), (500, 100), (21, 1), (2, 1), (1000, 0), (1, 0)]


def wobbly(x, t):
    """A made-up network: depends on x nonlinearly, on t, and keeps the dtype."""
    return torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000) + 0.1 * x.flip(-1)


# ---------------------------------------------------------------- the step, against independent transcriptions


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_step_is_equations_12_and_16(t, s, eta):
    x_t, eps, z = np.random.default_rng(t + s).standard_normal((3, 2, *SHAPE))
    a = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
    # term by term as printed
    predicted_x0 = (x_t - np.sqrt(1 - a[t]) * eps) / np.sqrt(a[t])
    std = eta * np.sqrt((1 - a[s]) / (1 - a[t])) * np.sqrt(1 - a[t] / a[s])
    expected = np.sqrt(a[s]) * predicted_x0 + np.sqrt(1 - a[s] - std**2) * eps + std * z
    x0, eps, z = map(torch.from_numpy, (predicted_x0, eps, z))
    assert np.allclose(step(DDIM(eta), x0, eps, SCHEDULE[t], SCHEDULE[s], z).numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_direction_and_noise_have_the_variance_of_the_marginal(t, s):
    for eta in (0.0, 0.3, 1.0):
        c = DDIM(eta).coefficients((SCHEDULE[t],), SCHEDULE[s])
        assert c.x0**2 == pytest.approx(SCHEDULE[s])
        assert c.eps**2 + c.noise**2 == pytest.approx(1 - SCHEDULE[s], abs=1e-15)


def test_noise_is_linear_in_eta():
    noise = [DDIM(eta).coefficients((SCHEDULE[700],), SCHEDULE[300]).noise for eta in (0.25, 0.5, 1.0)]
    assert noise[2] == pytest.approx(2 * noise[1])
    assert noise[1] == pytest.approx(2 * noise[0])


def test_eta_one_on_consecutive_times_is_ddpms_posterior():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    x_t, x0, z = torch.randn(3, 2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in (2, 10, 500, 1000):
        beta, a_t, a_s = float(betas[t - 1]), SCHEDULE[t], SCHEDULE[t - 1]
        mean = math.sqrt(a_s) * beta / (1 - a_t) * x0 + math.sqrt(1 - beta) * (1 - a_s) / (1 - a_t) * x_t
        std = math.sqrt((1 - a_s) / (1 - a_t) * beta)  # DDPM, Eq. 6 and 7
        eps = (x_t - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
        assert torch.allclose(step(DDIM(1.0), x0, eps, a_t, a_s, z), mean + std * z, atol=1e-10)


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_sigma_hat_keeps_the_direction_of_eta_one(t, s):
    hat, one = (rule.coefficients((SCHEDULE[t],), SCHEDULE[s]) for rule in (SigmaHat(), DDIM(1.0)))
    assert (hat.x0, hat.eps) == (one.x0, one.eps)
    assert hat.noise == (pytest.approx(math.sqrt(1 - SCHEDULE[t] / SCHEDULE[s])) if s else 0)
    assert hat.noise >= one.noise


@pytest.mark.parametrize("rule", [DDIM(1.0), SigmaHat()])
def test_rounding_does_not_make_a_radicand_negative(rule):
    for a_s in np.random.default_rng(0).uniform(0.01, 1, 200):
        assert rule.coefficients((1e-20,), float(a_s)).eps < 1e-7


def test_a_repeated_time_is_no_step():
    x, eps = initial_noise([0, 1], SHAPE, 0).double(), initial_noise([2, 3], SHAPE, 0).double()
    a = SCHEDULE[400]
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    for rule in (DDIM(0.0), DDIM(1.0), SigmaHat()):
        assert torch.allclose(step(rule, x0, eps, a, a), x, atol=1e-12)


def test_stochastic_rules_need_noise_and_descend():
    x = torch.zeros(1, *SHAPE)
    for rule in (DDIM(0.5), SigmaHat()):
        with pytest.raises(ValueError, match="encoding is deterministic"):
            next(trajectory(wobbly, SCHEDULE, x, (0, 10, 20), rule))
        with pytest.raises(ValueError, match="adds noise"):
            step(rule, x, x, 0.5, 0.6)


# ----------------------------------------------------------- complete trajectories, against the official implementation


def released_generalized_steps(x, seq, eta, noises):
    """DDIM as released, in the code's own indices; float64."""
    betas = np.linspace(1e-4, 0.02, 1000)
    padded = np.cumprod(np.concatenate([[1.0], 1 - betas]))
    for k, (i, j) in enumerate(zip(reversed(seq), reversed([-1, *list(seq[:-1])]), strict=True)):
        at, an = padded[i + 1], padded[j + 1]
        et = wobbly(x, torch.full((len(x),), i + 1))
        x0 = (x - et * (1 - at) ** 0.5) / at**0.5
        c1 = eta * ((1 - at / an) * (1 - an) / (1 - at)) ** 0.5
        c2 = ((1 - an) - c1**2) ** 0.5
        x = an**0.5 * x0 + c1 * noises[k] + c2 * et
    return x


def released_ddpm_steps(x, seq, noises):
    """The σ̂ sampler as released, `ddpm_noisy`: clamped x0, posterior mean, no noise from index 0."""
    betas = np.linspace(1e-4, 0.02, 1000)
    padded = np.cumprod(np.concatenate([[1.0], 1 - betas]))
    for k, (i, j) in enumerate(zip(reversed(seq), reversed([-1, *list(seq[:-1])]), strict=True)):
        at, an = padded[i + 1], padded[j + 1]
        beta = 1 - at / an
        e = wobbly(x, torch.full((len(x),), i + 1))
        x0 = torch.clamp((1 / at) ** 0.5 * x - (1 / at - 1) ** 0.5 * e, -1, 1)
        mean = (an**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - an) * x) / (1 - at)
        x = mean + (i != 0) * beta**0.5 * noises[k]
    return x


@pytest.mark.parametrize(
    "tau", [reference_uniform_tau(1000, 10), reference_quad_tau(1000, 50), reference_uniform_tau(1000, 15)]
)
def test_trajectories_equal_the_released_code(tau):
    indices = [3, 8, 1000]
    x_T = initial_noise(indices, SHAPE, seed=5).double()
    noises = [step_noise(indices, SHAPE, 5, k).double() for k in range(1, len(tau) + 1)]
    seq = [t - 1 for t in tau]
    for eta in (0.0, 0.5, 1.0):
        x_0 = sample(wobbly, SCHEDULE, x_T, tau, DDIM(eta), seed=5, indices=indices)
        assert torch.allclose(x_0, released_generalized_steps(x_T, seq, eta, noises), atol=1e-9)
    x_0 = sample(wobbly, SCHEDULE, x_T, tau, SigmaHat(), clip="x0_and_eps", seed=5, indices=indices)
    assert torch.allclose(x_0, released_ddpm_steps(x_T, seq, noises), atol=1e-9)


def test_the_model_is_asked_at_the_papers_times():
    asked = []

    def model(x, t):
        asked.append(t.tolist())
        return torch.zeros_like(x)

    x = torch.zeros(2, *SHAPE)
    times = [(s.k, s.t) for s in trajectory(model, SCHEDULE, x, (1000, 500, 1, 0))]
    assert asked == [[1000] * 2, [500] * 2, [1] * 2]
    assert times == [(1, 500), (2, 1), (3, 0)]
    asked.clear()
    encode(model, SCHEDULE, x, (1, 500, 1000))
    assert asked == [[1] * 2, [1] * 2, [500] * 2]  # at t = 0 the nearest time a network knows


def test_sampling_ends_at_x0_hat_or_at_the_first_noise_level():
    x_T = initial_noise(range(2), SHAPE, 0)
    last = list(trajectory(wobbly, SCHEDULE, x_T, (*reversed(linear_tau(1000, 5)), 0), DDIM(1.0)))[-1]
    assert torch.equal(last.x, last.x0)  # alpha_bar[0] = 1: no noise is left, none is added
    stopped = sample(wobbly, SCHEDULE, x_T, linear_tau(1000, 5), DDIM(1.0), last_time=1)
    c = DDIM(1.0).coefficients((SCHEDULE[200],), SCHEDULE[1])
    expected = c.x0 * last.x0 + c.eps * last.eps + c.noise * step_noise(range(2), SHAPE, 0, step=5)
    assert torch.allclose(stopped, expected, atol=1e-6)
    assert c.noise > 0


def test_the_noise_of_an_image_does_not_depend_on_its_batch():
    tau, rule = linear_tau(1000, 7), DDIM(1.0)
    x_T = initial_noise(range(9), SHAPE, 2)
    expected = sample(wobbly, SCHEDULE, x_T, tau, rule, seed=2)
    images = [sample(wobbly, SCHEDULE, x_T[i : i + 1], tau, rule, seed=2, indices=[i]) for i in range(9)]
    assert torch.allclose(expected, torch.cat(images), atol=1e-6)
    assert not torch.allclose(expected, sample(wobbly, SCHEDULE, x_T, tau, rule, seed=3))


def test_state_keeps_its_dtype_and_the_gradient_mode():
    def half(x, t):
        return wobbly(x, t).bfloat16()

    state = next(trajectory(half, SCHEDULE, torch.zeros(1, *SHAPE), (10, 0)))
    assert state.x.dtype == torch.float32
    assert torch.is_grad_enabled()
    assert not state.x.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"times": (1001, 0)}, r"t=1001 lies outside 0\.\.1000"),
        ({"times": (5,)}, "a start and an end"),
        ({"times": (5, 0), "clip": "always"}, "allowed: none, x0, x0_and_eps"),
        ({"times": (5, 0), "prediction": "score"}, "one of eps, x0, v"),
        ({"times": (0, 5), "prediction": "x0"}, "start encoding at t=1"),
        ({"times": (5, 3, 0), "noise": [torch.zeros(1, *SHAPE)] * 3}, "given for 3 steps, but the trajectory has 2"),
        ({"times": (1000, 0), "schedule": zero_terminal_snr(SCHEDULE)}, r"no x0 at alpha_bar=0 .*prediction=v or x0"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_asked(arguments, message):
    def model(x, t):
        raise AssertionError("asked")

    with pytest.raises(ValueError, match=message):
        trajectory(model, x=torch.zeros(1, *SHAPE), **{"schedule": SCHEDULE} | arguments)


# ---------------------------------------------------------------- against exact solutions

STD = 0.3


def gaussian_eps(x, t):
    """The optimal ε for data N(0, STD²): linear in x."""
    a = SCHEDULE.alpha_bar[t].reshape(-1, 1, 1, 1)
    return x * (1 - a).sqrt() / (a * STD**2 + 1 - a)


def gaussian_solution(x_T):
    """The ODE's exact solution on that data: x keeps its quantile."""
    a = SCHEDULE[1000]
    return x_T * STD / math.sqrt(a * STD**2 + 1 - a)


def error_of(tau_rule, S):
    x_T = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return abs(float(sample(gaussian_eps, SCHEDULE, x_T, tau_rule(1000, S)) - gaussian_solution(x_T)))


@pytest.mark.parametrize("tau_rule", [linear_tau, quadratic_tau], ids=["linear", "quadratic"])
def test_ddim_converges_with_order_one(tau_rule):
    """Eq. 14: DDIM is Euler's method, so the error falls like 1/S (a finer schedule than T=1000 cannot be asked)."""
    steps = [25, 50, 100, 200]
    errors = [error_of(tau_rule, S) for S in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.9


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_reaches_the_variance_of_gaussian_data(eta):
    x_T = initial_noise(range(1000), (1, 4, 4), seed=0)
    x_0 = sample(gaussian_eps, SCHEDULE, x_T, quadratic_tau(1000, 250), DDIM(eta))
    assert float(x_0.std()) == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize(
    "name", [name for name in RULES if name not in ("analytic", "learned_variance", "multinomial")]
)
def test_every_rule_reaches_the_variance_of_gaussian_data(name):
    x_T = initial_noise(range(2000), (1, 2, 2), seed=1)
    x_0 = sample(gaussian_eps, SCHEDULE, x_T, linear_tau(1000, 1000), RULES[name]())
    assert float(x_0.std()) == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize(
    ("tau_rule", "stds"),
    [
        (reference_uniform_tau, {10: 0.294, 20: 0.158, 50: 0.074, 100: 0.049}),
        (reference_quad_tau, {10: 0.061, 20: 0.043, 50: 0.035, 100: 0.033}),
        (linear_tau, {10: 0.0050, 20: 0.0099, 50: 0.0195, 100: 0.0265}),
    ],
    ids=["uniform", "quad", "linear"],
)
def test_times_decide_on_the_noise_that_sigma_hat_leaves(tau_rule, stds):
    """Computed independently for data of std .0316: the last step, without noise, is short but with `linear` times."""

    def optimal(x, t):
        a = SCHEDULE.alpha_bar[t].reshape(-1, 1, 1, 1)
        return x * (1 - a).sqrt() / (a * 0.0316**2 + 1 - a)

    x_T = initial_noise(range(2000), (1, 2, 2), seed=0)
    for S, std in stds.items():
        x_0 = sample(optimal, SCHEDULE, x_T, tau_rule(1000, S), SigmaHat())
        assert float(x_0.std()) == pytest.approx(std, rel=0.04)


def test_an_exact_denoiser_of_three_images_samples_those_images():
    images = initial_noise(range(3), (1, 3, 3), seed=9).double()

    def exact(x, t):
        a = SCHEDULE.alpha_bar[t[0]]
        distances = ((x[:, None] - a.sqrt() * images[None]) ** 2).flatten(2).sum(-1)
        weights = torch.softmax(-distances / (2 * (1 - a)), dim=1)
        x0 = torch.einsum("bn,nchw->bchw", weights, images)
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    x_T = initial_noise(range(60), (1, 3, 3), seed=0).double()
    for rule in (DDIM(0.0), DDIM(1.0)):
        x_0 = sample(exact, SCHEDULE, x_T, linear_tau(1000, 100), rule)
        distance = torch.cdist(x_0.flatten(1), images.flatten(1))
        assert distance.min(1).values.max() < 1e-3
        assert len(set(distance.argmin(1).tolist())) == 3


def test_reconstruction_error_falls_with_the_steps():
    x_0 = 0.3 * initial_noise(range(16), (1, 4, 4), seed=4).double()
    errors = []
    for S in (10, 20, 50, 100, 200):
        tau = linear_tau(1000, S)
        x_T = encode(gaussian_eps, SCHEDULE, x_0, tau)
        errors.append(float(((sample(gaussian_eps, SCHEDULE, x_T, tau) - x_0) ** 2).mean()))
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < errors[0] / 100


def test_encoding_inverts_one_step_exactly_for_a_constant_eps():
    eps = initial_noise([7], SHAPE, 0).double()
    x_0 = initial_noise([8], SHAPE, 0).double()
    x_T = encode(lambda x, t: eps, SCHEDULE, x_0, (1, 300, 1000))
    assert torch.allclose(x_T, math.sqrt(SCHEDULE[1000]) * x_0 + math.sqrt(1 - SCHEDULE[1000]) * eps, atol=1e-12)
    assert torch.allclose(sample(lambda x, t: eps, SCHEDULE, x_T, (1, 300, 1000)), x_0, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_samples_on_a_short_schedule(spacing):
    schedule = from_betas([0.1] * 20)
    eps = torch.ones(1, *SHAPE, dtype=torch.float64)
    tau = SPACINGS[spacing](20, 5)
    x_0 = torch.full((1, *SHAPE), 0.25, dtype=torch.float64)
    x_T = math.sqrt(schedule[tau[-1]]) * x_0 + math.sqrt(1 - schedule[tau[-1]]) * eps
    assert torch.allclose(sample(lambda x, t: eps, schedule, x_T, tau), x_0, atol=1e-12)
