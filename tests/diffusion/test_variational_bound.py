"""The variational bound: an independent transcription in float64, and Gaussian data, whose likelihood is known."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddim.diffusion.gaussians import PIXEL, discretised_log_likelihood, gaussian_kl
from ddim.diffusion.learned_variance import LearnedVariance, vlb_terms
from ddim.diffusion.likelihood import bits_per_dim, dequantise, draw_probes, fixed_steps
from ddim.diffusion.objective import q_sample
from ddim.diffusion.rules import DDIM, Rule, SigmaHat
from ddim.diffusion.schedule import NoiseSchedule, linear_schedule
from ddim.diffusion.solvers import AdamsBashforth
from ddim.diffusion.variational_bound import BOUND_NOISE, bound_terms
from ddim.random import SAMPLING, gaussian

SCHEDULE = linear_schedule(20, 5e-3, 0.5)
PIXELS = (gaussian(1, SAMPLING, 0, range(3), (2, 4, 4)) * 80 + 128).clamp(0, 255).round() / 127.5 - 1
RULES: dict[str, Rule] = {"small": DDIM(1.0), "large": SigmaHat()}


def network(x: Tensor, t: Tensor) -> Tensor:
    return 0.6 * x + 0.5 * torch.sin(3 * x + t[:, None, None, None])


def cdf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)))(x)


def transcribed(tau: tuple[int, ...], variance: str, clip: bool) -> np.ndarray:
    """The terms as OpenAI's GaussianDiffusion computes them (calc_bpd_loop), in float64 and nats, (B, S + 1)."""
    kept = SCHEDULE.alpha_bar[[0, *tau]].numpy()
    betas = 1 - kept[1:] / kept[:-1]
    alphas_cumprod, alphas_cumprod_prev = kept[1:], kept[:-1]
    posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
    if variance == "small":
        log_variances = np.log(np.append(posterior_variance[1], posterior_variance[1:]))
    else:
        log_variances = np.log(np.append(posterior_variance[1], betas[1:]))
    x_start, terms = PIXELS.double().numpy(), []
    for i, t in enumerate(tau):
        noise = gaussian(4, BOUND_NOISE, t, range(3), (2, 4, 4)).double().numpy()
        x_t = np.sqrt(alphas_cumprod[i]) * x_start + np.sqrt(1.0 - alphas_cumprod[i]) * noise
        eps = network(torch.from_numpy(x_t).float(), torch.full((3,), t)).double().numpy()
        pred_xstart = np.sqrt(1.0 / alphas_cumprod[i]) * x_t - np.sqrt(1.0 / alphas_cumprod[i] - 1) * eps
        pred_xstart = pred_xstart.clip(-1, 1) if clip else pred_xstart
        coef1 = betas[i] * np.sqrt(alphas_cumprod_prev[i]) / (1.0 - alphas_cumprod[i])
        coef2 = (1.0 - alphas_cumprod_prev[i]) * np.sqrt(1.0 - betas[i]) / (1.0 - alphas_cumprod[i])
        mean = coef1 * pred_xstart + coef2 * x_t
        if i == 0:
            inv_std = np.exp(-0.5 * log_variances[0])
            cdf_plus, cdf_min = (cdf(inv_std * (x_start - mean + side / 255.0)) for side in (1, -1))
            inner = np.maximum(cdf_plus - cdf_min, 1e-12)
            edges = np.where(x_start > 0.999, np.maximum(1 - cdf_min, 1e-12), inner)
            term = -np.log(np.where(x_start < -0.999, np.maximum(cdf_plus, 1e-12), edges))
        else:
            true_mean, logvar1, logvar2 = coef1 * x_start + coef2 * x_t, np.log(posterior_variance[i]), log_variances[i]
            term = 0.5 * (
                -1 + logvar2 - logvar1 + np.exp(logvar1 - logvar2) + (true_mean - mean) ** 2 / np.exp(logvar2)
            )
        terms.append(term.reshape(3, -1).sum(1))
    qt_mean, qt_variance = np.sqrt(alphas_cumprod[-1]) * x_start, 1 - alphas_cumprod[-1]
    terms.append(0.5 * (-1 - np.log(qt_variance) + qt_variance + qt_mean**2).reshape(3, -1).sum(1))
    return np.stack(terms, 1)


@pytest.mark.parametrize("clip", ["none", "x0_and_eps"])
@pytest.mark.parametrize("variance", RULES)
@pytest.mark.parametrize("tau", [tuple(range(1, 21)), (1, 4, 5, 13, 20)])
def test_the_terms_are_those_of_openais_code(tau: tuple[int, ...], variance: str, clip: str) -> None:
    ours = bound_terms(network, SCHEDULE, PIXELS, tau, RULES[variance], clip=clip, seed=4, indices=range(3))
    np.testing.assert_allclose(ours.numpy(), transcribed(tau, variance, clip != "none"), rtol=1e-8, atol=1e-9)


def test_a_learned_variance_has_the_terms_that_train_it() -> None:
    def doubled(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([network(x, t), torch.cos(2 * x)], 1)

    ours = bound_terms(doubled, SCHEDULE, PIXELS, range(1, 21), LearnedVariance(), seed=4, indices=range(3))
    for t in range(1, 21):
        level = SCHEDULE.alpha_bar[t]
        eps = gaussian(4, BOUND_NOISE, t, range(3), (2, 4, 4)).double()
        x_t, times = q_sample(PIXELS.double(), eps, level), torch.full((3,), t)
        output, v = doubled(x_t.float(), times).double().chunk(2, 1)
        x0_hat = (x_t - (1 - level).sqrt() * output) / level.sqrt()
        trained = vlb_terms(SCHEDULE.alpha_bar, times, PIXELS.double(), x0_hat, v)
        torch.testing.assert_close(ours[:, t - 1], trained, rtol=1e-9, atol=1e-9)
    fixed = bound_terms(doubled, SCHEDULE, PIXELS, range(1, 21), DDIM(1.0), seed=4, indices=range(3))
    alone = bound_terms(network, SCHEDULE, PIXELS, range(1, 21), DDIM(1.0), seed=4, indices=range(3))
    assert torch.equal(fixed, alone)


def test_a_term_is_a_function_of_seed_time_and_image() -> None:
    def terms(indices: range, seed: int = 0) -> Tensor:
        pixels = PIXELS[indices.start : indices.stop]
        return bound_terms(network, SCHEDULE, pixels, (1, 10, 20), DDIM(1.0), seed=seed, indices=indices)

    assert torch.equal(terms(range(3))[1:], terms(range(1, 3)))
    assert not torch.allclose(terms(range(3))[:, :-1], terms(range(3), seed=1)[:, :-1])
    assert torch.equal(terms(range(3))[:, -1], terms(range(3), seed=1)[:, -1])


def test_kl_of_gaussians_is_torchs() -> None:
    q, p = (gaussian(seed, SAMPLING, 0, range(3), (2, 2, 2)).double() for seed in (0, 1))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(q, 0.7), normal(p, 1.9)).flatten(1).sum(1)
    assert torch.allclose(gaussian_kl(q, p, 0.7, 1.9), expected)


def test_the_decoder_is_a_distribution_over_grey_levels() -> None:
    levels = (torch.arange(256).double() / 127.5 - 1).reshape(-1, 1, 1, 1)
    for mean, std in ((-3.0, 0.5), (-1.0, 0.01), (0.1234, 0.003), (0.5, 1.0), (1.2, 0.05)):
        log_p = discretised_log_likelihood(levels, torch.full_like(levels, mean), std)
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
        assert float(log_p.min()) >= math.log(1e-12)


def test_rules_and_times_without_a_bound_are_refused() -> None:
    for rule in (DDIM(0.0), AdamsBashforth(2)):
        with pytest.raises(ValueError, match="the bound needs the noise of ddim with eta > 0, of sigma_hat"):
            bound_terms(network, SCHEDULE, PIXELS, (1, 20), rule, indices=range(3))
    for tau in ((20,), (1, 1, 20)):
        with pytest.raises(ValueError, match="two or more times that increase"):
            bound_terms(network, SCHEDULE, PIXELS, tau, DDIM(1.0), indices=range(3))


VARIANCE = 0.1
# Equal steps of log SNR, after a first step that is small against the second: the decoder then has the right variance.
LEVELS = torch.sigmoid(torch.linspace(-math.log(4e-3), math.log(1e-4), 400, dtype=torch.float64))
GAUSSIAN = NoiseSchedule(torch.cat([torch.tensor([1.0, 1 - 3e-4], dtype=torch.float64), LEVELS]))


def exact(x: Tensor, t: Tensor) -> Tensor:
    """The network without an error for data N(0, VARIANCE I)."""
    a = GAUSSIAN[int(t[0])]
    return x * math.sqrt(1 - a) / (VARIANCE * a + 1 - a)


def test_both_ways_give_the_likelihood_of_gaussian_data() -> None:
    """Within 0.01 bits per dimension of the truth for pixels, the bound above the number of the equation."""
    shape, count = (3, 24, 24), 16
    D = math.prod(shape)
    x = math.sqrt(VARIANCE) * gaussian(2, SAMPLING, 0, range(count), shape)
    pixels = ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
    truth = -discretised_log_likelihood(pixels.double(), torch.zeros(()), math.sqrt(VARIANCE)).sum()
    tau = range(1, GAUSSIAN.T + 1)
    bound = bound_terms(exact, GAUSSIAN, pixels, tau, SigmaHat(), indices=range(count)).sum()
    continuous = dequantise(pixels, 0, range(count))
    probes = draw_probes("rademacher", 1, continuous, 0, range(count))
    solved = fixed_steps(exact, GAUSSIAN, continuous, tau[::4], AdamsBashforth(3), probes)
    ode = -(solved.log_likelihood + D * math.log(PIXEL)).sum()
    bits = [float(bits_per_dim(-nats, D * count)) for nats in (truth, ode, bound)]
    assert abs(bits[1] - bits[0]) < 0.01
    assert bits[0] < bits[2] < bits[0] + 0.01
    assert bits[1] < bits[2]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_tails_of_pixels_are_there_in_float32(sign: int) -> None:
    """Six standard deviations off, with their gradient, which a training follows."""
    x0 = torch.full((1, 1, 1, 1), 0.5 * sign)
    values = []
    for dtype in (torch.float32, torch.float64):
        mean = (x0 - 0.061 * sign).to(dtype).requires_grad_()
        value = discretised_log_likelihood(x0.to(dtype), mean, 0.01)
        values.append((value.double(), *torch.autograd.grad(value.sum(), mean)))
    (value, gradient), (exact, expected) = values
    torch.testing.assert_close(value, exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=0)
