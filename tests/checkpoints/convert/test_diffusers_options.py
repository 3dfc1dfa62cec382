"""Each option of diffusers' DDIMScheduler and DDPMScheduler over whole trajectories, and where theirs is wrong.

Their float32 tables are replaced by ours, so that what is compared is the method, to the last digits of float64.
"""

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ddim import (
    SPACINGS,
    SamplerSpec,
    add_noise,
    initial_noise,
    linear_schedule,
    scaled_linear_schedule,
    velocity,
    zero_terminal_snr,
)
from ddim.checkpoints.convert.diffusers import read_sampler, read_scheduler, scheduler_config

pytestmark = pytest.mark.integration

LINEAR, ZERO_SNR = linear_schedule(), zero_terminal_snr(linear_schedule())
STEPS = (5, 7, 10, 15, 50, 300)
ETAS = (0.0, 0.3, 1.0)
SHAPE = (3, 4, 4)
X_T = initial_noise(range(2), SHAPE, seed=5).double()
HERE = Path("scheduler_config.json")

# What is set there -> (schedule, prediction, entries of the configuration, use_clipped_model_output).
OPTIONS = {
    "defaults": (LINEAR, "eps", {}, False),
    "nothing clipped": (LINEAR, "eps", {"clip_sample": False}, False),
    "clip range": (LINEAR, "eps", {"clip_sample_range": 2.5}, False),
    "derived again": (LINEAR, "eps", {"clip_sample_range": 1.5}, True),
    "thresholding": (LINEAR, "eps", {"thresholding": True, "sample_max_value": 1.6}, False),
    "thresholding, ratio": (LINEAR, "v", {"thresholding": True, "dynamic_thresholding_ratio": 0.7}, False),
    "thresholding, derived": (
        LINEAR,
        "x0",
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 9.0},
        True,
    ),
    "offset": (LINEAR, "eps", {"steps_offset": 1}, False),
    "last alpha": (LINEAR, "eps", {"set_alpha_to_one": False, "clip_sample": False}, False),
    "last alpha, offset": (LINEAR, "v", {"set_alpha_to_one": False, "steps_offset": 2}, False),
    "x0": (LINEAR, "x0", {"clip_sample": False}, False),
    "v": (scaled_linear_schedule(), "v", {"clip_sample": False}, False),
    "zero SNR, v": (ZERO_SNR, "v", {"clip_sample": False}, False),
    "zero SNR, x0": (ZERO_SNR, "x0", {"clip_sample": False, "timestep_spacing": "trailing"}, False),
    "zero SNR from T, v": (ZERO_SNR, "v", {"timestep_spacing": "trailing"}, True),
}


def network(x, t):
    """A made-up network: depends on x nonlinearly, on t, and mixes pixels."""
    return torch.tanh(x) * (0.5 + t.reshape(-1, 1, 1, 1).to(x.dtype) / 1000) + 0.1 * x.flip(-1)


@cache
def z(k):
    """The noise of step k, on both sides."""
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(k), dtype=torch.float64)


def scheduler_of(hf, schedule, prediction, entries, kind="DDIMScheduler"):
    config = scheduler_config(schedule, prediction) | {"clip_sample": True} | entries
    scheduler = getattr(hf, kind).from_config({**config, "_class_name": kind})
    scheduler.alphas_cumprod = schedule.alpha_bar[1:]
    scheduler.final_alpha_cumprod = schedule.alpha_bar[0 if config["set_alpha_to_one"] else 1]
    return scheduler


def states_there(scheduler, S, right_ends=False, **options):
    """The states of diffusers' own loop; with `right_ends` each step goes to the time that is asked for after it."""
    scheduler.set_timesteps(S)
    times, x, states = scheduler.timesteps.tolist(), X_T, []
    for k, (t, s) in enumerate(pairwise([*times, -1]), start=1):
        if right_ends:  # their end of a step is t - num_train_timesteps // num_inference_steps
            scheduler.register_to_config(num_train_timesteps=(t - s) * S)
        noise = {"variance_noise": z(k)} if options.get("eta") else {}
        x = scheduler.step(network(x, torch.full((2,), t + 1)), t, x, **options, **noise).prev_sample
        states.append(x)
    return states


def states_here(sampler, schedule, prediction, noise=z):
    return [state.x for state in sampler.trajectory(network, schedule, X_T, prediction=prediction, noise=noise)]


def difference(ours, theirs):
    """The largest difference over whole trajectories, relative to the size of the state."""
    assert len(ours) == len(theirs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def same_sampler(scheduler, S, eta, rederive=False):
    """Our sampler as their configuration is imported."""
    spec = read_sampler(dict(scheduler.config), HERE)
    fields = {name: getattr(spec, name) for name in spec.__dataclass_fields__} | {"S": S, "eta": eta}
    return SamplerSpec(**fields | ({"clip": "x0_and_eps"} if rederive and spec.clip == "x0" else {}))


def grid(complete):
    """(S, η); the longest trajectory with one η only, but for complete grids."""
    return [(S, eta) for S in STEPS for eta in ETAS if complete or S < 300 or eta == 0.3]


@pytest.mark.parametrize("case", OPTIONS)
def test_each_option_of_ddim_makes_diffusers_trajectory(hf, case):
    schedule, prediction, entries, rederive = OPTIONS[case]
    for S, eta in grid(case in ("defaults", "nothing clipped")):
        if entries.get("timestep_spacing") == "trailing" and 1000 % S:  # theirs is wrong there, see below
            continue
        scheduler = scheduler_of(hf, schedule, prediction, entries)
        theirs = states_there(scheduler, S, eta=eta, use_clipped_model_output=rederive)
        ours = states_here(same_sampler(scheduler, S, eta, rederive), schedule, prediction)
        assert difference(ours, theirs) < 1e-9, (S, eta)


def test_the_options_make_different_images(hf):
    """So that an option which is ignored on both sides would show."""
    images = {}
    for case, (schedule, prediction, entries, rederive) in OPTIONS.items():
        sampler = same_sampler(scheduler_of(hf, schedule, prediction, entries), 10, 0.3, rederive)
        images[case] = states_here(sampler, schedule, prediction)[-1]
    assert len({float(x.sum()) for x in images.values()}) == len(OPTIONS)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_the_wrong_step_end_is_their_only_difference(hf, spacing):
    """Their step ends at t - T // S whatever the next time is: right for trailing where S divides T, else wrong."""
    entries = {"timestep_spacing": spacing, "clip_sample": False}
    for S, eta in grid(complete=False):
        scheduler = scheduler_of(hf, LINEAR, "eps", entries)
        ours = states_here(same_sampler(scheduler, S, eta), LINEAR, "eps")
        error = difference(ours, states_there(scheduler, S, eta=eta))
        assert error < 1e-9 if spacing == "trailing" and 1000 % S == 0 else error > 1e-3
        assert difference(ours, states_there(scheduler, S, right_ends=True, eta=eta)) < 1e-9


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_times_are_diffusers_for_every_S(hf, spacing):
    scheduler = scheduler_of(hf, LINEAR, "eps", {"timestep_spacing": spacing})
    surplus = []
    for S in range(1, 1001):
        scheduler.set_timesteps(S)
        theirs = [t + 1 for t in reversed(scheduler.timesteps.tolist())]
        if theirs[0] == 0:  # their index -1, which is no time, from rounding T / S
            surplus.append(S)
            theirs = theirs[1:]
        assert tuple(theirs) == SPACINGS[spacing](1000, S)
    assert surplus[:3] == ([61, 103, 121] if spacing == "trailing" else [])


DDPM = {
    "small": ({"variance_type": "fixed_small"}, "eps", STEPS),
    "large": ({"variance_type": "fixed_large"}, "eps", STEPS),
    "large, not clipped": ({"variance_type": "fixed_large", "clip_sample": False}, "v", STEPS),
    "large, thresholding": (
        {"variance_type": "fixed_large", "thresholding": True, "sample_max_value": 2.0},
        "x0",
        (7,),
    ),
    "small, trailing": ({"variance_type": "fixed_small", "timestep_spacing": "trailing"}, "eps", (7, 50)),
    "small, linspace": ({"variance_type": "fixed_small", "timestep_spacing": "linspace"}, "v", (7, 50)),
}


@pytest.mark.parametrize("case", DDPM)
def test_each_option_of_ddpm_makes_diffusers_trajectory(hf, case):
    entries, prediction, steps = DDPM[case]
    scheduler = scheduler_of(hf, LINEAR, prediction, entries, "DDPMScheduler")
    sampler = read_sampler({**scheduler.config, "_class_name": "DDPMScheduler"}, HERE)
    assert sampler.S == 1000
    for S in steps:
        draws = [torch.Generator().manual_seed(S) for _ in range(2)]
        ours = states_here(
            SamplerSpec(**{name: getattr(sampler, name) for name in sampler.__dataclass_fields__} | {"S": S}),
            LINEAR,
            prediction,
            lambda k, draw=draws[0]: torch.randn(X_T.shape, generator=draw, dtype=torch.float64),
        )
        # With trailing times their last step adds noise of std 1e-10.
        assert difference(ours, states_there(scheduler, S, generator=draws[1])) < 1e-8, S


def test_noise_after_the_last_step_is_ddpms_only_difference(hf):
    """Their DDPM adds noise in every step but one from index 0, with which trailing times do not end."""
    entries = {"variance_type": "fixed_large", "timestep_spacing": "trailing"}
    scheduler, seed = scheduler_of(hf, LINEAR, "eps", entries, "DDPMScheduler"), torch.Generator().manual_seed(0)
    theirs = states_there(scheduler, 7, generator=torch.Generator().manual_seed(0))
    noise = [torch.randn(X_T.shape, generator=seed, dtype=torch.float64) for _ in range(7)]
    sampler = SamplerSpec("sigma_hat", None, S=7, spacing="trailing", clip="x0_and_eps")
    ours = states_here(sampler, LINEAR, "eps", noise)
    assert difference(ours[:-1], theirs[:-1]) < 1e-9
    std = (1 - LINEAR[sampler.tau(1000)[0]]) ** 0.5
    assert std > 0.4
    assert torch.allclose(theirs[-1] - ours[-1], std * noise[-1])


def test_add_noise_and_velocity_are_diffusers(hf):
    x0, eps = z(1), z(2)
    scheduler = scheduler_of(hf, LINEAR, "v", {})
    for t in ([1, 1000], [500, 2]):
        theirs = torch.tensor(t) - 1
        assert torch.allclose(add_noise(LINEAR, x0, eps, torch.tensor(t)), scheduler.add_noise(x0, eps, theirs))
        assert torch.allclose(velocity(LINEAR, x0, eps, torch.tensor(t)), scheduler.get_velocity(x0, eps, theirs))
    for t in (-1, 1001):
        with pytest.raises(ValueError, match=r"in 0\.\.1000"):
            add_noise(LINEAR, x0, eps, torch.tensor([1, t]))


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_zero_terminal_snr_is_diffusers_rescaling(hf, schedule):
    config = {"beta_schedule": schedule, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    ours, _ = read_scheduler(config, HERE)
    theirs = hf.DDIMScheduler(**config)
    assert torch.allclose(ours.alpha_bar[1:], theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-9)
    assert ours[1000] == 0
    exported = hf.DDIMScheduler.from_config(scheduler_config(ours, "v"))
    assert torch.allclose(exported.alphas_cumprod.double(), ours.alpha_bar[1:], rtol=2e-4, atol=1e-9)
    assert exported.alphas_cumprod[-1] == 0
    back, _ = read_scheduler(dict(exported.config), HERE)
    assert torch.allclose(back.alpha_bar, ours.alpha_bar, rtol=1e-12, atol=0)
