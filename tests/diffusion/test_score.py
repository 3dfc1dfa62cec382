"""The score, Langevin corrector steps, the variance-exploding chain and the forward kernel."""

import math
from itertools import pairwise

import pytest
import torch

from ddim import (
    DDIM,
    SamplerSpec,
    initial_noise,
    linear_schedule,
    q_sample,
    sample,
    step_noise,
    trajectory,
)
from ddim.diffusion.noise import corrector_noise
from ddim.diffusion.prediction import PREDICTIONS
from ddim.diffusion.registry import RULES
from ddim.diffusion.sampling import last_state
from ddim.diffusion.score import (
    Corrector,
    eps_from_score,
    eps_model,
    exploding_schedule,
    forward_kernel,
    langevin_step,
    score,
    score_from_eps,
    x_bar_from_x,
    x_from_x_bar,
)
from ddim.diffusion.solvers import Heun

SCHEDULE = linear_schedule(1000)
SHAPE = (3, 4, 4)
NAMES = sorted(RULES.keys() - {"analytic", "learned_variance", "multinomial"})  # others need a file, or another network


def network(x, t):
    """A made-up network: depends on x nonlinearly and on t."""
    return torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000) + 0.1 * x.flip(-1)


# ---------------------------------------------------------------- score


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [1, 300, 1000])
def test_score_is_autograds_of_the_log_density_of_a_mixture(prediction, t):
    """Data ⅓ N(m_1, ¼ I) + ⅔ N(m_2, ¼ I); the network is E[x_0 | x_t], from which each type follows."""
    means, weights = initial_noise([3, 4], (1, 2, 2), 0).double(), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    a_t = SCHEDULE[t]
    variance = 0.25 * a_t + 1 - a_t
    x = initial_noise(range(6), (1, 2, 2), 1).double().requires_grad_()

    def log_terms(x):  # log w_i N(x_t; sqrt(a_t) m_i, variance I), up to a constant; (B, 2)
        return weights.log() - (x[:, None] - math.sqrt(a_t) * means).square().flatten(2).sum(-1) / (2 * variance)

    (expected,) = torch.autograd.grad(log_terms(x).logsumexp(1).sum(), x)
    x = x.detach()
    conditional = means + 0.25 * math.sqrt(a_t) / variance * (x[:, None] - math.sqrt(a_t) * means)
    x0 = (log_terms(x).softmax(1)[..., None, None, None] * conditional).sum(1)
    eps = (x - math.sqrt(a_t) * x0) / math.sqrt(1 - a_t)
    output = PREDICTIONS[prediction].target(x0, eps, a_t)
    assert torch.allclose(score(prediction, output, x, a_t), expected, rtol=1e-9, atol=1e-9)
    levels = torch.full((6, 1, 1, 1), a_t, dtype=torch.float64)
    assert torch.allclose(score(prediction, output, x, levels), expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(eps_from_score(expected, a_t), eps, rtol=1e-9, atol=1e-9)


def test_there_is_no_score_of_data_without_noise():
    eps = torch.zeros(2, *SHAPE)
    for level in (1.0, torch.tensor([0.5, 1.0]).reshape(2, 1, 1, 1)):
        with pytest.raises(ValueError, match="no score at alpha_bar=1"):
            score_from_eps(eps, level)


# ---------------------------------------------------------------- corrector


def test_a_corrector_step_is_song_et_als_algorithm_5():
    """Term by term, of each image: δ = 2 α (r |z| / |g|)², x + δ g + sqrt(2 δ) z."""
    x, eps, z = (initial_noise(range(i, i + 3), SHAPE, 0).double() for i in (0, 3, 6))
    made = Corrector(snr=0.2).step(x, eps, z, 0.6, 0.9)
    for i in range(3):
        g = -eps[i] / math.sqrt(0.4)
        delta = 2 * 0.9 * (0.2 * math.sqrt(float((z[i] ** 2).sum())) / math.sqrt(float((g**2).sum()))) ** 2
        assert torch.allclose(made[i], x[i] + delta * g + math.sqrt(2 * delta) * z[i], atol=1e-12)


def test_an_image_whose_score_is_zero_stays_as_it_is():
    x, z = initial_noise(range(2), SHAPE, 0), initial_noise(range(2, 4), SHAPE, 0)
    eps = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)])
    made = Corrector().step(x, eps, z, 0.6, 0.9)
    assert made[0].equal(x[0])
    assert torch.isfinite(made).all()
    assert not torch.allclose(made[1], x[1])


STD, MEAN, T_TEST = 0.5, 0.3, 400


def errors_of_the_marginal(factor):
    """How many standard errors mean and variance at T_TEST are off after 60 corrector steps with factor · ε̂.

    Every step of the trajectory is between equal times, so that the corrector alone changes x. Its steps are small
    (r = 0.05) and its images large: what r and the size change is below half a standard error.
    """
    a_t = SCHEDULE[T_TEST]
    variance, mean = a_t * STD**2 + 1 - a_t, math.sqrt(a_t) * MEAN

    def model(x, t):  # E[ε | x_t] for data N(MEAN, STD² I)
        return factor * math.sqrt(1 - a_t) * (x - mean) / variance

    x = mean + math.sqrt(variance) * initial_noise(range(8), (1, 64, 64), 0)
    x = last_state(trajectory(model, SCHEDULE, x, [T_TEST] * 62, DDIM(1.0), corrector=Corrector(1, 0.05)))
    n = x.numel()
    return float(x.mean() - mean) / math.sqrt(variance / n), (float(x.var()) / variance - 1) / math.sqrt(2 / n)


def test_corrector_steps_keep_the_marginal_of_gaussian_data():
    assert all(abs(off) < 4 for off in errors_of_the_marginal(1.0))


@pytest.mark.parametrize("factor", [-1.0, 0.8])
def test_steps_with_a_wrong_score_change_the_marginal(factor):
    assert max(abs(off) for off in errors_of_the_marginal(factor)) > 10


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_loop_corrects_between_steps_and_not_after_the_last(eta):
    """Against a loop of its own: after each step but the last, M steps with the noise (seed, image, step, number)."""
    indices, times, M = [4, 7], (900, 500, 200, 0), 2
    x = x_T = initial_noise(indices, SHAPE, 3).double()
    for k, (t, s) in enumerate(pairwise(times), start=1):
        a_t, a_s = SCHEDULE[t], SCHEDULE[s]
        eps = network(x, torch.full((2,), t))
        std = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
        x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
        z = step_noise(indices, SHAPE, 3, k).double()
        x = math.sqrt(a_s) * x0 + math.sqrt(max(0, 1 - a_s - std**2)) * eps + std * z
        for j in range(1, M + 1 if s else 1):
            g = -network(x, torch.full((2,), s)) / math.sqrt(1 - a_s)
            x = langevin_step(x, g, corrector_noise(indices, SHAPE, 3, k, j).double(), 0.1, a_s / SCHEDULE[s - 1])
    made = trajectory(network, SCHEDULE, x_T, times, DDIM(eta), seed=3, indices=indices, corrector=Corrector(M, 0.1))
    assert torch.allclose(last_state(made), x, atol=1e-12)
    spec = SamplerSpec(eta=eta, S=None, spacing="explicit", times=(200, 500, 900), corrector_steps=M, corrector_snr=0.1)
    assert torch.allclose(last_state(spec.trajectory(network, SCHEDULE, x_T, seed=3, indices=indices)), x, atol=1e-12)


def test_noise_of_corrector_steps_has_addresses_of_its_own():
    base = step_noise([0], (64,), 0, 1)
    others = [corrector_noise([i], (64,), 0, k, j) for i, k, j in ((0, 1, 1), (0, 1, 2), (0, 2, 1), (1, 1, 1))]
    others.append(step_noise([0], (64,), 0, 1 << 10 | 1))
    for i, one in enumerate([base, *others]):
        for other in others[i:]:
            assert abs(torch.corrcoef(torch.cat([one, other]))[0, 1]) < 0.5


def sampler(name, **fields):
    return SamplerSpec(**{"rule": name, "eta": 0.5 if name == "ddim" else None, "S": 6} | fields)


@pytest.mark.parametrize("name", NAMES)
def test_evaluations_with_a_corrector_are_what_a_counter_sees(name):
    asked = []

    def model(x, t):
        asked.append(int(t[0]))
        return network(x, t)

    x_T = initial_noise(range(1), SHAPE, 0)
    for fields in ({}, {"last_time": 1}, {"spacing": "quad", "S": 60}, {"corrector_steps": 3}):
        spec = sampler(name, **{"corrector_steps": 1} | fields)
        asked.clear()
        assert torch.isfinite(last_state(spec.trajectory(model, SCHEDULE, x_T))).all()
        assert len(asked) == spec.evaluations(SCHEDULE)
        expected = 1 + (spec.S - 1) * (1 + (RULES[name] is Heun) + spec.corrector_steps)
        assert len(asked) == expected - (spec.S - len(set(spec.tau(1000)))) * (RULES[name] is Heun)
        assert 0 not in asked


@pytest.mark.parametrize("name", NAMES)
def test_corrected_samples_do_not_depend_on_the_batch(name):
    spec, x_T = sampler(name, corrector_steps=2), initial_noise(range(5), SHAPE, 0)
    together = last_state(spec.trajectory(network, SCHEDULE, x_T, seed=1))
    assert together[3:4].equal(last_state(spec.trajectory(network, SCHEDULE, x_T[3:4], seed=1, indices=[3])))
    assert not torch.allclose(together, last_state(sampler(name).trajectory(network, SCHEDULE, x_T, seed=1)), atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_no_corrector_steps_change_no_bit(name):
    spec, x_T = sampler(name), initial_noise(range(2), SHAPE, 0)
    rule, tau = spec.build_rule(), spec.tau(1000)
    x_0 = sample(network, SCHEDULE, x_T, tau, rule, seed=1)
    assert x_0.equal(last_state(spec.trajectory(network, SCHEDULE, x_T, seed=1)))
    assert x_0.equal(sample(network, SCHEDULE, x_T, tau, rule, seed=1, corrector=Corrector(0, 0.5)))
    assert not {"corrector_steps", "corrector_snr"} & spec.settings().keys()


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_every_prediction_type_is_corrected_alike(prediction):
    def model(x, t):
        a_t, eps = SCHEDULE[int(t[0])], network(x, t)
        return PREDICTIONS[prediction].target((x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t), eps, a_t)

    x_T = initial_noise(range(2), SHAPE, 0).double()
    spec = sampler("ddim", corrector_steps=1)
    expected = last_state(spec.trajectory(network, SCHEDULE, x_T))
    assert torch.allclose(last_state(spec.trajectory(model, SCHEDULE, x_T, prediction=prediction)), expected, atol=1e-9)


@pytest.mark.parametrize("times", [(0, 10, 20), (20, 10, 15, 0), (20, 0, 0)])
def test_a_corrector_is_refused_where_there_is_no_score(times):
    def model(x, t):
        raise AssertionError("asked")

    x = torch.zeros(1, *SHAPE)
    with pytest.raises(ValueError, match="a corrector is for sampling, over descending times"):
        trajectory(model, SCHEDULE, x, times, corrector=Corrector())
    trajectory(model, SCHEDULE, x, times, corrector=Corrector(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corrector_steps": -1}, r"corrector_steps=-1 must lie in 0\.\.1023"),
        ({"corrector_steps": 1024}, r"corrector_steps=1024 must lie in"),
        ({"corrector_steps": 1, "corrector_snr": 0.0}, "corrector_snr=0.0 must be positive and finite"),
        ({"corrector_steps": 1, "corrector_snr": math.inf}, "corrector_snr=inf must be positive and finite"),
        ({"corrector_snr": 0.1}, "corrector_snr=0.1 needs corrector_steps"),
        ({"S": None, "nfe": 10, "corrector_steps": 1}, "nfe=10 is not possible .* whose 5 steps take 9"),
        (
            {"rule": "diffusers", "eta": None, "spacing": "scheduler", "scheduler": "X", "corrector_steps": 1},
            "the defaults of everything else",
        ),
    ],
)
def test_wrong_correctors_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerSpec(**fields).tau(1000)


def test_nfe_counts_the_corrector():
    for name, M, S in (("ddim", 1, 10), ("ddim", 2, 7), ("heun", 1, 7), ("unipc", 1, 10)):
        spec = sampler(name, S=None, nfe=19, corrector_steps=M)
        assert (len(spec.tau(1000)), spec.evaluations(SCHEDULE)) == (S, 19)


def test_a_corrector_makes_a_sampler_stochastic():
    assert SamplerSpec().deterministic
    assert not SamplerSpec(corrector_steps=1).deterministic
    assert not SamplerSpec(eta=0.5).deterministic


# ---------------------------------------------------------------- the variance-exploding chain

SIGMA_BARS = torch.logspace(-2, math.log10(50), 60, dtype=torch.float64)  # NCSN: geometric, 0.01 to 50


def score_network(x_bar, sigma_bars):
    """A made-up score network of NCSN."""
    s = sigma_bars.reshape(-1, 1, 1, 1).to(x_bar.dtype)
    return -torch.tanh(x_bar - 0.3) / (0.5 + s**2) + 0.1 * x_bar.flip(-1) / (1 + s**2)


def exploding_chain(x_bar, sigma_bars, eta, seed):
    """NCSN's chain as Song et al. (2021) write it: η = 1 ancestral (their Eq. 47), η = 0 Euler's in σ̄."""
    levels = [*reversed(sigma_bars.tolist()), 0.0]
    for k, (s_t, s_s) in enumerate(pairwise(levels), start=1):
        g = score_network(x_bar, torch.full((len(x_bar),), s_t, dtype=torch.float64))
        if eta:
            z = step_noise(range(len(x_bar)), SHAPE, seed, k).double()
            std = math.sqrt(s_s**2 * (s_t**2 - s_s**2) / s_t**2)
            x_bar = x_bar + (s_t**2 - s_s**2) * g + std * z
        else:
            x_bar = x_bar + (s_s - s_t) * (-s_t * g)
    return x_bar


@pytest.mark.parametrize("eta", [0, 1])
def test_an_exploding_chain_gives_the_samples_of_ddim(eta):
    schedule = exploding_schedule(SIGMA_BARS)
    x_bar_T = SIGMA_BARS[-1] * initial_noise(range(3), SHAPE, 0).double()
    expected = exploding_chain(x_bar_T, SIGMA_BARS, eta, seed=5)
    x_T = x_from_x_bar(x_bar_T, schedule[60])
    assert torch.allclose(x_bar_from_x(x_T, schedule[60]), x_bar_T)
    x_0 = sample(eps_model(score_network, schedule), schedule, x_T, range(1, 61), DDIM(float(eta)), seed=5)
    assert torch.allclose(x_0, expected, atol=1e-9)  # at alpha_bar = 1, x̄ is x
    assert not torch.allclose(x_0, exploding_chain(x_bar_T, SIGMA_BARS, 1 - eta, seed=5), atol=0.1)


def test_every_state_of_a_ddim_trajectory_is_euler_in_x_bar():
    """Eq. 14 with the noise levels of DDPM: x̄ + (σ̄_s - σ̄_t) ε̂ at each time, sampling and encoding."""
    for times in ((1000, 700, 300, 1), (1, 300, 700, 1000)):
        x = initial_noise(range(2), SHAPE, 1).double()
        for state, t in zip(trajectory(network, SCHEDULE, x, times), times, strict=False):
            a_t, a_s = SCHEDULE[t], SCHEDULE[state.t]
            change = math.sqrt((1 - a_s) / a_s) - math.sqrt((1 - a_t) / a_t)
            assert torch.allclose(x_bar_from_x(state.x, a_s), x_bar_from_x(x, a_t) + change * state.eps, atol=1e-9)
            x = state.x


def test_algorithm_4_in_x_bar_is_the_corrector_without_beta():
    """A Langevin step of the variance-exploding chain, δ = 2 (r |z| / |g|)², is the same step in x."""
    a_t = 0.3
    x, g, z = (initial_noise(range(i, i + 3), SHAPE, 0).double() for i in (0, 3, 6))
    in_x_bar = langevin_step(x_bar_from_x(x, a_t), math.sqrt(a_t) * g, z, 0.16)  # the gradient by x̄
    assert torch.allclose(x_from_x_bar(in_x_bar, a_t), langevin_step(x, g, z, 0.16), atol=1e-12)


@pytest.mark.parametrize("levels", [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [-1.0, 1.0]])
def test_levels_that_do_not_explode_are_refused(levels):
    with pytest.raises(ValueError, match="must be above 0 and increase"):
        exploding_schedule(levels)


# ---------------------------------------------------------------- the forward kernel


@pytest.mark.parametrize(("r", "s", "t"), [(0, 1, 2), (1, 300, 1000), (0, 500, 501)])
def test_forward_kernels_compose(r, s, t):
    (c_1, v_1), (c_2, v_2) = (forward_kernel(SCHEDULE[up], SCHEDULE[down]) for up, down in ((s, r), (t, s)))
    assert forward_kernel(SCHEDULE[t], SCHEDULE[r]) == pytest.approx((c_1 * c_2, c_2**2 * v_1 + v_2), rel=1e-12)


def test_forward_kernel_is_equation_4_and_beta_in_one_step():
    x_0, z = initial_noise([0], SHAPE, 0).double(), initial_noise([1], SHAPE, 0).double()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for t in (1, 2, 1000):
        c, v = forward_kernel(SCHEDULE[t], 1.0)
        assert torch.allclose(c * x_0 + math.sqrt(v) * z, q_sample(x_0, z, SCHEDULE.alpha_bar[t]), atol=1e-12)
        one = forward_kernel(SCHEDULE[t], SCHEDULE[t - 1])
        assert one == pytest.approx((math.sqrt(1 - betas[t - 1]), float(betas[t - 1])), rel=1e-9)
    with pytest.raises(ValueError, match="the forward chain goes up in time"):
        forward_kernel(0.6, 0.5)
