"""Noise that the caller gives, and schedules that end at alpha_bar = 0."""

import math

import pytest
import torch
from torch import Tensor

from ddim import (
    DDIM,
    SamplerSpec,
    SigmaHat,
    encode,
    initial_noise,
    linear_schedule,
    linear_tau,
    sample,
    step_noise,
    trajectory,
    zero_terminal_snr,
)
from ddim.diffusion.registry import RULES

SCHEDULE = linear_schedule(1000)
PLAIN = [name for name in RULES if name not in ("analytic", "learned_variance", "multinomial")]
SHAPE = (3, 4, 4)


def wobbly(x: Tensor, t: Tensor) -> Tensor:
    """A made-up network."""
    return torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000)


def test_given_noise_takes_the_place_of_the_addressed():
    tau, rule, x_T = linear_tau(1000, 5), DDIM(1.0), initial_noise(range(2), SHAPE, 2)
    expected = sample(wobbly, SCHEDULE, x_T, tau, rule, seed=4)
    noise = [step_noise(range(2), SHAPE, 4, k) for k in range(1, 6)]
    spec = SamplerSpec(eta=1.0, S=5)
    for given in (noise, torch.stack(noise).double(), lambda k: noise[k - 1]):
        assert torch.equal(sample(wobbly, SCHEDULE, x_T, tau, rule, noise=given), expected)
        assert torch.equal(list(spec.trajectory(wobbly, SCHEDULE, x_T, noise=given))[-1].x, expected)
    with pytest.raises(ValueError, match="noise of step 1 has the shape"):  # not repeated for both images
        sample(wobbly, SCHEDULE, x_T, tau, rule, noise=[z[:1] for z in noise])
    asked = []
    sample(wobbly, SCHEDULE, x_T, tau, rule, noise=lambda k: asked.append(k) or noise[k - 1])
    assert asked == [1, 2, 3, 4]  # the last step adds none


@pytest.mark.parametrize("prediction", ["x0", "v"])
@pytest.mark.parametrize("rule", [DDIM(0.0), DDIM(0.5), DDIM(1.0), SigmaHat()])
def test_the_step_from_alpha_bar_zero_is_exact(prediction, rule):
    """From x_T = ε alone: the marginal at s of the image that the network predicts, whatever x_T is."""
    schedule, x_T = zero_terminal_snr(SCHEDULE), initial_noise(range(2000), (1, 2, 2), 3).double()
    image = torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(1, 1, 2, 2).expand_as(x_T)

    def model(x, t):
        a_t = schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
        return image if prediction == "x0" else (a_t.sqrt() * x - image) / (1 - a_t).sqrt()

    state = next(trajectory(model, schedule, x_T, (1000, 400, 0), rule, prediction=prediction))
    assert torch.allclose(state.x0, image)
    assert torch.allclose(state.eps, x_T)
    noise = (state.x - math.sqrt(schedule[400]) * image) / math.sqrt(1 - schedule[400])
    assert float(noise.std()) == pytest.approx(1 if rule != SigmaHat() else 1 / math.sqrt(1 - schedule[400]), rel=0.03)
    assert torch.allclose(sample(model, schedule, x_T, (400, 1000), rule, prediction=prediction), image)


def test_encoding_to_alpha_bar_zero_asks_no_network_there():
    """With ε, too: the network is asked at the lower time of each step."""
    schedule, x_0 = zero_terminal_snr(SCHEDULE), initial_noise(range(2), SHAPE, 1)
    asked = []

    def model(x, t):
        asked.append(int(t[0]))
        return wobbly(x, t)

    assert torch.isfinite(encode(model, schedule, x_0, (1, 500, 1000))).all()
    assert asked == [1, 1, 500]


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("ddim", "sigma_hat")])
def test_other_rules_refuse_the_step_from_alpha_bar_zero(name):
    """Their variables are infinite there; from the time before T on they work."""
    schedule = zero_terminal_snr(SCHEDULE)
    with pytest.raises(ValueError, match=r"no step from alpha_bar=0 .*take ddim"):
        SamplerSpec(rule=name, eta=None, S=8).check(schedule, "v")
    SamplerSpec(rule=name, eta=None, S=8, spacing="leading").check(schedule, "v")


@pytest.mark.parametrize(
    "name", [name for name in RULES if name not in ("analytic", "learned_variance", "multinomial")]
)
def test_rules_that_combine_predictions_refuse_clip_x0(name):
    """They rebuild x_t from x̂0 and ε̂, which have to agree; with one prediction a step, x̂0 is clipped alone."""
    eta = 0.0 if name == "ddim" else None
    for clip in ("none", "x0_and_eps"):
        SamplerSpec(name, eta, S=5, clip=clip).check(SCHEDULE, "eps")
    clipped = SamplerSpec(name, eta, S=5, clip="x0")
    if name in ("ddim", "sigma_hat", "probability_flow"):
        clipped.check(SCHEDULE, "eps")
        return
    with pytest.raises(ValueError, match=f"rule={name} takes x̂0 and ε̂ that agree; set clip=none or clip=x0_and_eps"):
        clipped.check(SCHEDULE, "eps")
    if name not in ("heun", "bdia", "unipc"):  # of order 1 they are ddim or ddpm
        SamplerSpec(name, eta, S=5, clip="x0", order=1).check(SCHEDULE, "eps")
