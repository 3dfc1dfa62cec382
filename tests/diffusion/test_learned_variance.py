"""The learned variance of Improved DDPM: its step, the terms of the bound, and the losses."""

import math

import numpy as np
import pytest
import torch

from ddim import DDIM, NoiseSchedule, SigmaHat, linear_schedule, per_sample_loss, sample
from ddim.diffusion.learned_variance import LearnedVariance, vlb_terms
from ddim.diffusion.objective import q_sample
from ddim.diffusion.sampling import last_state, trajectory
from ddim.diffusion.spec import SamplerSpec

SCHEDULE = linear_schedule(1000)


def cdf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)))(x)


def draw(*counts):
    return torch.randn(*counts, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("t", "s"), [(1000, 999), (1000, 700), (300, 20), (20, 1), (2, 1)])
@pytest.mark.parametrize("clip", ["none", "x0_and_eps"])
def test_step_interpolates_the_log_variances_of_its_pair(t, s, clip):
    x_t, eps, v, z = draw(4, 2)
    a_t, a_s = (float(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[i - 1]) for i in (t, s))
    beta = 1 - a_t / a_s
    w = (v + 1) / 2
    log_variance = w * np.log(beta) + (1 - w) * np.log((1 - a_s) / (1 - a_t) * beta)
    x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    x0 = x0.clamp(-1, 1) if clip != "none" else x0
    mean = a_s**0.5 * beta / (1 - a_t) * x0 + (a_t / a_s) ** 0.5 * (1 - a_s) / (1 - a_t) * x_t
    expected = mean + (0.5 * log_variance).exp() * z
    model = lambda x, t: torch.cat([eps, v], 1)  # noqa: E731
    state = next(trajectory(model, SCHEDULE, x_t, (t, s), LearnedVariance(), clip=clip, noise=[z]))
    assert torch.allclose(state.x, expected, rtol=1e-6, atol=1e-9)


def test_the_ends_of_the_range_are_both_fixed_variances():
    x_T = draw(2).float()

    def samples(rule, v=None):
        def model(x, t):
            return 0.1 * x if v is None else torch.cat([0.1 * x, torch.full_like(x, v)], 1)

        return sample(model, SCHEDULE, x_T, (1, 300, 700, 1000), rule)

    assert torch.allclose(samples(LearnedVariance(), -1.0), samples(DDIM(1.0)), atol=1e-5)
    assert torch.allclose(samples(LearnedVariance(), 1.0), samples(SigmaHat()), atol=1e-5)
    assert torch.equal(samples(DDIM(0.5), 1.0), samples(DDIM(0.5)))  # v does not matter to other rules


def test_variance_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    betas = (1 - SCHEDULE.alpha_bar[1:] / SCHEDULE.alpha_bar[:-1]).tolist()
    theirs = diffusers.DDPMScheduler(trained_betas=betas, variance_type="learned_range", clip_sample=False)
    x, v, z = draw(3, 1).float()
    zero = torch.zeros_like(x)
    for t, s in ((1000, 999), (500, 499), (2, 1), (901, 801), (101, 1)):
        if t == 901:
            theirs.set_timesteps(10)
        model = lambda x_t, t: torch.cat([zero, v], 1)  # noqa: E731
        with_noise, without = (
            last_state(trajectory(model, SCHEDULE, x, (t, s), LearnedVariance(), noise=[noise])) for noise in (z, zero)
        )
        std = (0.5 * theirs._get_variance(t - 1, predicted_variance=v)).exp()
        assert torch.allclose(with_noise - without, std * z, rtol=1e-3, atol=1e-6)


def test_a_rule_without_the_predicted_variance_is_refused():
    sampler = SamplerSpec(rule="learned_variance", eta=None, S=4)
    sampler.check(SCHEDULE, "eps", "learned_range")
    with pytest.raises(ValueError, match="needs a network that predicts the variance"):
        sampler.check(SCHEDULE, "eps")
    with pytest.raises(ValueError, match="this network predicts none"):
        sample(lambda x, t: x, SCHEDULE, draw(1), (1, 1000), LearnedVariance())
    with pytest.raises(ValueError, match="cannot go up"):
        LearnedVariance().coefficients((0.9,), 0.5)


# ---------------------------------------------------------------- the bound

NOISY = NoiseSchedule(torch.cat([torch.ones(1).double(), (1 - torch.linspace(0.05, 0.6, 8).double()).cumprod(0)]))


def test_terms_of_the_true_posterior_are_the_closed_form():
    """Data N(0, s²): the true reverse step is a Gaussian, and the bound is then the entropy of the pixels."""
    s, n = 0.2, 200_000
    generator = torch.Generator().manual_seed(0)
    x0 = s * torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator)
    total = 0.0
    for t in range(1, 9):
        a_t, a_s = NOISY[t], NOISY[t - 1]
        beta = 1 - a_t / a_s
        spread = s**2 * (1 - a_t) / (a_t * s**2 + 1 - a_t)  # the variance of x_0 given x_t
        posterior = (1 - a_s) / (1 - a_t) * beta
        true = posterior + a_s * (beta / (1 - a_t)) ** 2 * spread
        low = posterior if t > 1 else (1 - a_t) / (1 - NOISY[2]) * (1 - NOISY[2] / a_t)
        v = 2 * math.log(true / low) / math.log(beta / low) - 1
        eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
        x_t = q_sample(x0, eps, torch.tensor(a_t).double())
        x0_hat = a_t**0.5 * s**2 / (a_t * s**2 + 1 - a_t) * x_t
        terms = vlb_terms(NOISY.alpha_bar, torch.full((n,), t), x0, x0_hat, torch.full_like(x0, v))
        if t > 1:
            assert float(terms.mean()) == pytest.approx(0.5 * math.log(true / posterior), abs=0.01)
        total += float(terms.mean())
    a_T = NOISY[8]
    total += 0.5 * (a_T * s**2 + 1 - a_T - 1 - math.log(1 - a_T))
    entropy = 0.5 * math.log(2 * math.pi * math.e * s**2) - math.log(2 / 255)
    gap = 0.5 * (a_T * s**2 - a_T - math.log(1 - a_T + a_T * s**2))  # KL(q(x_T) || N(0, 1))
    assert total == pytest.approx(entropy + gap, abs=0.01)


def transcription(alpha_bar, t, x0, x_t, eps_hat, v):
    """L_{t-1} or L_0 of one image in bits per dimension, as Nichol and Dhariwal write it; numpy, float64."""
    a_t, a_s = alpha_bar[t], alpha_bar[t - 1]
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    variances = betas * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    low = np.log(np.append(variances[1], variances[1:]))[t - 1]
    high = np.log(betas)[t - 1]
    log_variance = low if v is None else (v + 1) / 2 * high + (1 - (v + 1) / 2) * low
    x0_hat = np.sqrt(1 / a_t) * x_t - np.sqrt(1 / a_t - 1) * eps_hat
    means = [
        betas[t - 1] * np.sqrt(a_s) / (1 - a_t) * x + (1 - a_s) * np.sqrt(1 - betas[t - 1]) / (1 - a_t) * x_t
        for x in (x0, x0_hat)
    ]
    if t > 1:
        squares = (means[0] - means[1]) ** 2 * np.exp(-log_variance)
        return np.mean(0.5 * (-1 + log_variance - low + np.exp(low - log_variance) + squares)) / np.log(2)
    std = np.exp(0.5 * log_variance)
    upper = np.where(x0 > 0.999, 1.0, cdf((x0 + 1 / 255 - means[1]) / std))
    lower = np.where(x0 < -0.999, 0.0, cdf((x0 - 1 / 255 - means[1]) / std))
    return np.mean(-np.log(np.maximum(upper - lower, 1e-12))) / np.log(2)


@pytest.mark.parametrize("weight", ["hybrid", "vlb", "vlb, fixed variance"])
def test_losses_equal_a_transcription_in_float64(weight):
    learned, t = "fixed" not in weight, torch.tensor([1, 1, 2, 3, 500, 1000])
    x0, eps, error, v = (x.float() for x in draw(4, 6))
    x0 = (x0 * 70 + 127).round().clamp(0, 255) / 127.5 - 1  # with some black and white pixels
    assert x0.abs().max() == 1
    eps_hat = eps + 0.1 * error
    model = lambda x, t: torch.cat([eps_hat, v], 1) if learned else eps_hat  # noqa: E731
    loss = per_sample_loss(model, SCHEDULE.alpha_bar, x0, t, eps, weight=weight.split(",")[0])
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])
    for i, time in enumerate(t.tolist()):
        one = [x[i].double().numpy() for x in (x0, eps, eps_hat, v)]
        x_t = np.sqrt(alpha_bar[time]) * one[0] + np.sqrt(1 - alpha_bar[time]) * one[1]
        bits = transcription(alpha_bar, time, one[0], x_t, one[2], one[3] if learned else None)
        simple = np.mean((one[1] - one[2]) ** 2)
        expected = simple + 0.001 * 1000 * bits if weight == "hybrid" else 1000 * bits
        assert float(loss[i]) == pytest.approx(expected, rel=2e-4), time


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_hybrid_trains_the_mean_by_the_simple_loss_alone(prediction):
    x0, eps, output, v = (x.float().clamp(-2, 2) for x in draw(4, 3))
    x0, t = x0 / 2, torch.tensor([1, 30, 900])

    def gradients(weight):
        halves = [output.clone().requires_grad_(), v.clone().requires_grad_()]
        loss = per_sample_loss(
            lambda x, t: torch.cat(halves, 1), SCHEDULE.alpha_bar, x0, t, eps, prediction=prediction, weight=weight
        )
        return torch.autograd.grad(loss.sum(), halves, allow_unused=True, materialize_grads=True)

    simple, hybrid, vlb = (gradients(weight) for weight in ("simple", "hybrid", "vlb"))
    assert torch.equal(hybrid[0], simple[0])
    assert (simple[1] == 0).all()
    assert torch.allclose(hybrid[1], 0.001 * vlb[1], rtol=1e-4, atol=1e-7)
    assert bool((hybrid[1].abs().amax((1, 2, 3)) > 0).all())
    assert not torch.allclose(vlb[0], simple[0])
    assert vlb[0].isfinite().all()
