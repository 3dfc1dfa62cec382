"""Multinomial diffusion: the family of Eq. 19 by enumeration, its losses, its samples."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddim.data import DataSpec, load_images
from ddim.data.images import normalize
from ddim.diffusion.multinomial import (
    LOSSES,
    Multinomial,
    draw,
    initial_state,
    marginal,
    mixture,
    per_sample_loss,
    posterior,
    to_categories,
    to_values,
    trajectory,
)
from ddim.diffusion.sampling import last_state
from ddim.diffusion.schedule import cosine_schedule, zero_terminal_snr
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import linear_tau

SCHEDULE = zero_terminal_snr(cosine_schedule(1000))
FRACTIONS = [0.0, 0.3, 0.9, 1.0]


def transition(a_t, a_s, fraction, x0):
    """q(x_s | x_t, x_0) as a matrix: a row of probabilities for each x_t."""
    K = len(x0)
    return posterior(mixture(a_t, a_s, fraction), torch.eye(K, dtype=torch.float64), x0.expand(K, K))


# ---------------------------------------------------------------- the family


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("times", [(1000, 700, 300, 10, 1, 0), (1000, 999, 998, 0), (1000, 500, 500, 0)])
def test_every_sigma_has_the_marginals_of_equation_17(fraction, times):
    """Exact: the sum over all states of q(x_s | x_t, x_0) q(x_t | x_0), from x_T down to x_0."""
    for K in (2, 3, 5):
        for x0 in torch.eye(K, dtype=torch.float64):
            q = marginal(x0, SCHEDULE[times[0]])
            for t, s in itertools.pairwise(times):
                q = q @ transition(SCHEDULE[t], SCHEDULE[s], fraction, x0)
                torch.testing.assert_close(q, SCHEDULE[s] * x0 + (1 - SCHEDULE[s]) / K, rtol=0, atol=1e-12)


def test_sigma_is_allowed_where_all_three_are_probabilities():
    for t, s in [(1000, 700), (700, 699), (2, 1), (1, 0)]:
        for fraction in FRACTIONS:
            row = mixture(SCHEDULE[t], SCHEDULE[s], fraction)
            assert math.isclose(sum(row), 1)
            assert min(row) >= 0
    assert mixture(0.3, 0.6, 1.001).uniform < 0
    assert mixture(0.3, 0.6, -0.001).x_t < 0
    for fraction in (-0.001, 1.001):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            Multinomial(fraction)


def bayes(a_t, a_s, K, x0):
    """q(x_s | x_t, x_0) of the Markov chain whose steps keep a category, or else draw any; Bayes' rule in numpy."""
    keep = a_t / a_s
    forward = keep * np.eye(K) + (1 - keep) / K  # (x_s, x_t)
    prior = a_s * np.eye(K)[x0] + (1 - a_s) / K
    joint = forward * prior[:, None]
    return (joint / joint.sum(0)).T  # a row for each x_t


@pytest.mark.parametrize(("a_t", "a_s"), [(0.2, 0.7), (0.69, 0.7), (1e-4, 0.9)])
def test_two_categories_have_a_markovian_sigma_more_have_none(a_t, a_s):
    two = torch.eye(2, dtype=torch.float64)
    markovian = (a_t / a_s) * (1 + a_s) / (1 + a_t)  # as a fraction of the largest σ
    assert 0 < markovian < 1
    for x0 in range(2):
        assert np.allclose(transition(a_t, a_s, markovian, two[x0]), bayes(a_t, a_s, 2, x0), rtol=0, atol=1e-12)
    three = torch.eye(3, dtype=torch.float64)[0]
    rows = [transition(a_t, a_s, f, three).numpy() - bayes(a_t, a_s, 3, 0) for f in np.linspace(0, 1, 1001)]
    assert min(np.abs(row).max() for row in rows) > 1e-5


def test_two_categories_are_those_of_diffusers_discrete_ddim():
    """Its scheduler of discrete DDIM draws from the Markov chain's posterior for a drawn x_0."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, "DiscreteDDIMScheduler"):
        pytest.skip("this version of diffusers has no DiscreteDDIMScheduler")
    scheduler = diffusers.DiscreteDDIMScheduler()
    scheduler.set_timesteps(10)  # its alpha is k / 10 in step k
    a_t, a_s, n = 0.4, 0.5, 40_000
    fraction = (a_t / a_s) * (1 + a_s) / (1 + a_t)
    generator = torch.Generator().manual_seed(0)
    for x0, x_t in itertools.product(range(2), repeat=2):
        logits = torch.tensor([30.0, 0.0] if x0 == 0 else [0.0, 30.0]).expand(1, n, 2)
        sample = scheduler.step(logits, 4, torch.full((1, n), x_t), generator=generator).prev_sample
        p = float(transition(a_t, a_s, fraction, torch.eye(2, dtype=torch.float64)[x0])[x_t, 1])
        assert float(sample.double().mean()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


# ---------------------------------------------------------------- categories and draws


def test_seventeen_categories_are_the_digits_exactly():
    from sklearn.datasets import load_digits

    x = normalize(load_images(DataSpec("digits", (8, 8), 1, flip=False), "train").batch(torch.arange(1797)))
    categories = to_categories(x, 17)
    assert (categories[:, 0].numpy() == load_digits().images).all()
    assert torch.equal(to_categories(to_values(categories, 17), 17), categories)


@pytest.mark.parametrize("K", [2, 5, 17, 256])
def test_categories_are_equal_distances_from_minus_one_to_one(K):
    values = to_values(torch.arange(K), K)
    assert torch.allclose(values, torch.linspace(-1, 1, K), atol=1e-6)
    assert to_categories(values, K).tolist() == list(range(K))
    assert to_categories(torch.tensor([-1.7, 1.7]), K).tolist() == [0, K - 1]


def test_draws_have_the_probabilities_and_never_one_of_zero():
    p = torch.tensor([0.0, 0.25, 0.0, 0.7, 0.05, 0.0], dtype=torch.float64)
    words = torch.arange(0, 1 << 32, 1 << 20)  # a grid instead of random words: frequencies are exact up to 1 / 4096
    frequencies = draw(p.expand(len(words), 6), words).bincount(minlength=6) / len(words)
    assert torch.allclose(frequencies.double(), p, atol=1 / 2048)
    assert frequencies[p == 0].sum() == 0


def test_x_T_is_uniform_over_the_categories():
    categories = to_categories(initial_state(range(2000), (1, 2, 2), seed=0, categories=5), 5)
    assert torch.allclose(categories.flatten().bincount() / 8000, torch.tensor(0.2), atol=4 * math.sqrt(0.16 / 8000))


# ---------------------------------------------------------------- losses


def made_up(K):
    """A network: logits (B, K, H, W) of one channel that depend on x, t, category and column."""

    def model(x, t):
        k = torch.arange(K, dtype=torch.float64).reshape(1, K, 1, 1)
        return torch.sin(k + 3 * x.double() + t.reshape(-1, 1, 1, 1) / 300 + torch.arange(2) / 7)

    return model


def transcribed(loss, x0, x_t, f, a_t, a_s, sigma_t):
    """The three losses of one pixel, from appendix A, in plain Python."""
    K = len(f)
    u = 1 / K

    def probability(k, x0_k):
        return sigma_t * (k == x_t) + (a_s - sigma_t * a_t) * x0_k + ((1 - a_s) - (1 - a_t) * sigma_t) * u

    if loss == "kl":
        pairs = [(probability(k, float(k == x0)), probability(k, f[k])) for k in range(K)]
        return sum(q * math.log(q / p) for q, p in pairs if q > 1e-15)
    return -math.log(f[x0]) * ((a_s - sigma_t * a_t) if loss == "bound" else 1)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_losses_equal_an_independent_transcription(loss, fraction):
    K, times = 4, torch.tensor([1, 2, 300, 1000])
    x0 = to_values(torch.arange(16).reshape(4, 1, 2, 2) % K, K)
    words = torch.arange(16).reshape(4, 1, 2, 2) * 268_435_456 + 12345
    model = made_up(K)
    values = per_sample_loss(model, SCHEDULE.alpha_bar, x0, times, words, K, loss, fraction)
    for i, t in enumerate(times.tolist()):
        a_t, a_s = SCHEDULE[t], SCHEDULE[t - 1]
        x_t = np.zeros((2, 2), dtype=int)
        for y, x in np.ndindex(2, 2):
            cumulative, true = 0.0, int(to_categories(x0[i, 0, y, x], K))
            for k in range(K):  # the quantile of the uniform number
                x_t[y, x] = k
                cumulative += a_t * (k == true) + (1 - a_t) / K
                if cumulative > (int(words[i, 0, y, x]) + 0.5) / 2**32:
                    break
        logits = model(to_values(torch.from_numpy(x_t), K)[None, None], times[i : i + 1])[0].numpy()
        f = np.exp(logits) / np.exp(logits).sum(0)
        pixels = [
            transcribed(loss, int(to_categories(x0[i, 0, y, x], K)), x_t[y, x], f[:, y, x], a_t, a_s,
                        fraction * (1 - a_s) / (1 - a_t))
            for y, x in np.ndindex(2, 2)
        ]  # fmt: skip
        assert float(values[i]) == pytest.approx(sum(pixels) / 4, rel=1e-9, abs=1e-13)


def test_the_bound_is_above_the_divergence_but_at_the_last_step():
    K, x0 = 4, to_values(torch.arange(64).reshape(4, 1, 4, 4) % 4, 4)
    words = torch.arange(64).reshape(4, 1, 4, 4) * 67_108_864
    times = torch.tensor([1, 2, 300, 1000])

    def model(x, t):
        return made_up(K)(x[..., :2], t).repeat(1, 1, 1, 2) + x.double()

    by_name = {name: per_sample_loss(model, SCHEDULE.alpha_bar, x0, times, words, K, name, 0.5) for name in LOSSES}
    assert (by_name["kl"][1:] < by_name["bound"][1:]).all()
    assert (by_name["bound"][1:] < by_name["cross_entropy"][1:]).all()
    assert float(by_name["kl"][0]) == pytest.approx(float(by_name["cross_entropy"][0]), rel=1e-12)


# ---------------------------------------------------------------- sampling

DATA = torch.tensor([0.5, 0.3, 0.0, 0.2], dtype=torch.float64)  # of one pixel with four categories


def exact(x, t):
    """The logits of q(x_0 | x_t) for a pixel of DATA: log p(x_0) + log q(x_t | x_0)."""
    a_t = SCHEDULE.alpha_bar[t].reshape(-1, 1, 1)
    q = marginal(torch.eye(4, dtype=torch.float64), a_t)  # (B, x_0, x_t)
    likelihood = q.gather(2, to_categories(x, 4).reshape(-1, 1, 1).expand(-1, 4, 1))[..., 0]
    return (DATA.log() + likelihood.log())[..., None, None]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("S", [1, 10, 100])
def test_the_exact_network_samples_the_data_for_every_sigma(S, fraction):
    """One pixel: p(x_s | x_t) is then exact, so no number of steps is too small."""
    n = 4000
    x_T = initial_state(range(n), (1, 1, 1), seed=1, categories=4)
    times = (*reversed(linear_tau(1000, S)), 0)
    states = list(trajectory(exact, SCHEDULE, x_T, times, Multinomial(fraction), seed=1))
    assert [state.k for state in states] == [state.evaluations for state in states] == list(range(1, S + 1))
    frequencies = to_categories(states[-1].x, 4).flatten().bincount(minlength=4) / n
    assert torch.allclose(frequencies.double(), DATA, atol=4.5 * math.sqrt(0.25 / n))
    assert frequencies[2] == 0


def test_the_largest_sigma_keeps_a_pixel_or_predicts_it():
    x_T = initial_state(range(500), (1, 4, 4), seed=3, categories=6)

    def certain(x, t):
        return 1e4 * F.one_hot(torch.full(x.shape, 2), 6)[:, 0].movedim(-1, 1)

    def changed(fraction):
        for state in trajectory(certain, SCHEDULE, x_T, (900, 500, 400), Multinomial(fraction)):
            x_t, x, x0 = (to_categories(v, 6) for v in (state.eps, state.x, state.x0))
            assert bool((x0 == 2).all())
            yield bool(((x != x_t) & (x != 2)).any())

    assert not any(changed(1.0))
    assert all(changed(0.9))


def test_an_image_depends_on_its_number_only():
    def walk(numbers):
        x_T = initial_state(numbers, (1, 2, 2), seed=7, categories=4)
        return last_state(
            trajectory(made_up(4), SCHEDULE, x_T, (1000, 400, 1, 0), Multinomial(0.5), seed=7, indices=numbers)
        )

    together = walk(range(10, 17))
    assert torch.equal(torch.cat([walk([i]) for i in range(10, 17)]), together)
    assert not torch.equal(walk(range(7)), together)


def test_upward_steps_are_refused():
    with pytest.raises(ValueError, match="cannot go up"):
        trajectory(exact, SCHEDULE, torch.zeros(1, 1, 1, 1), (0, 500), Multinomial())


def test_samplers_and_models_that_do_not_fit_are_refused():
    categorical = SamplerSpec(rule="multinomial", eta=None, S=10)
    categorical.check(SCHEDULE, "x0", categories=5)
    with pytest.raises(ValueError, match="pixels are numbers; take any other rule"):
        categorical.check(SCHEDULE, "x0")
    with pytest.raises(ValueError, match="one of 5 categories; take sampler=multinomial"):
        SamplerSpec().check(SCHEDULE, "x0", categories=5)
    with pytest.raises(ValueError, match="take clip=none"):
        SamplerSpec(rule="multinomial", eta=None, clip="x0").check(SCHEDULE, "x0", categories=5)
