"""scheduler_config.json: schedules and predictions there and here."""

import json
from pathlib import Path

import pytest
import torch
from layouts import refusal

from ddim import SamplerSpec, linear_schedule
from ddim.checkpoints.convert.diffusers import has_betas, read_sampler, read_scheduler, scheduler_config
from ddim.diffusion.schedule import NoiseSchedule, cosine_schedule, from_betas, scaled_linear_schedule

HERE = Path("folder/scheduler_config.json")
SOME_BETAS = [0.3, 0.01, 0.125, 0.4, 1e-5, 0.2]
SCHEDULES = {
    "linear": linear_schedule(),
    "linear, other betas": linear_schedule(250, 0.0004, 0.08),
    "linear, digits": linear_schedule(1000, 0.0001234567, 0.01987654321),
    "linear, thirds": linear_schedule(1000, 1 / 30_000, 1 / 30),
    "linear, one": linear_schedule(1, 0.25, 0.5),
    "scaled_linear": scaled_linear_schedule(),
    "scaled_linear, other betas": scaled_linear_schedule(100, 1e-3, 0.3),
    "cosine": cosine_schedule(),
    "cosine, short": cosine_schedule(50),
    "cosine, other offset": cosine_schedule(1000, 0.02),
    "custom": from_betas(SOME_BETAS),
    "custom, many": from_betas(1e-4 + 0.03 * torch.rand(500, generator=torch.Generator().manual_seed(0))),
    "linear by another name": NoiseSchedule(linear_schedule().alpha_bar, "custom"),
    "custom by the name of linear": NoiseSchedule(from_betas(SOME_BETAS).alpha_bar, "linear"),
}
NAMED = {  # beta_schedule, num_train_timesteps, beta_start, beta_end
    "linear": ("linear", 1000, 0.0001, 0.02),
    "linear, other betas": ("linear", 250, 0.0004, 0.08),
    "linear, digits": ("linear", 1000, 0.0001234567, 0.01987654321),
    "scaled_linear": ("scaled_linear", 1000, 0.00085, 0.012),
    "scaled_linear, other betas": ("scaled_linear", 100, 0.001, 0.3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_survives_its_config_bitwise(name):
    schedule = SCHEDULES[name]
    config = json.loads(json.dumps(scheduler_config(schedule, "eps")))
    assert config["num_train_timesteps"] == schedule.T
    back, prediction = read_scheduler(config, HERE)
    assert torch.equal(back.alpha_bar, schedule.alpha_bar)
    assert prediction == "eps"
    assert back.name == (schedule.name if config["trained_betas"] is None else "custom")


def test_betas_above_one_half_survive_to_the_last_digits():
    schedule = from_betas(torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    back, _ = read_scheduler(scheduler_config(schedule, "eps"), HERE)
    torch.testing.assert_close(back.alpha_bar, schedule.alpha_bar, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "words"), NAMED.items(), ids=NAMED)
def test_a_schedule_known_to_diffusers_is_written_by_name(name, words):
    config = scheduler_config(SCHEDULES[name], "eps")
    keys = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "trained_betas")
    assert tuple(config[key] for key in keys) == (*words, None)


def test_cosine_is_written_by_name_and_custom_as_betas():
    assert scheduler_config(cosine_schedule(), "eps")["beta_schedule"] == "squaredcos_cap_v2"
    assert scheduler_config(cosine_schedule(), "eps")["trained_betas"] is None
    assert scheduler_config(from_betas(SOME_BETAS), "eps")["trained_betas"] == pytest.approx(SOME_BETAS, abs=1e-15)


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_prediction_types_have_diffusers_names(ours, theirs):
    config = scheduler_config(linear_schedule(), ours)
    assert config["prediction_type"] == theirs
    assert read_scheduler(config, HERE)[1] == ours


def test_the_scheduler_config_samples_as_the_paper_does():
    config = scheduler_config(linear_schedule(), "eps")
    wanted = {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_a_published_scheduler_config_is_read():
    published = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    for config in (published, {"beta_schedule": "linear"}):  # the defaults of diffusers, which are DDPM's
        schedule, prediction = read_scheduler(config, HERE)
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        torch.testing.assert_close(schedule.alpha_bar[1:], (1 - betas).cumprod(0), rtol=1e-12, atol=0)
        assert (schedule.name, schedule.T, prediction) == ("linear", 1000, "eps")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prediction_type": "flow"}, "prediction_type='flow'"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "T must be at least 2"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'"),
        ({"trained_betas": [0.1, 1.0, 0.1]}, "beta_2=1.0 must lie strictly between 0 and 1"),
        ({"trained_betas": []}, "betas must be a list of at least one number"),
        ({"num_train_timesteps": 0}, "T=0 must be at least 1"),
        ({"num_train_timesteps": "many"}, "T="),
        ({"beta_end": 3}, "must lie strictly between 0 and 1"),
    ],
)
def test_unsupported_schedulers_are_refused(config, words):
    message = refusal(read_scheduler, config, HERE)
    assert str(HERE) in message
    assert words in message


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {"clip": "x0"}),
        ({"clip_sample": False, "steps_offset": 3}, {"steps_offset": 3}),
        ({"clip_sample_range": 2}, {"clip": "x0", "clip_range": 2.0}),
        ({"thresholding": True, "clip_sample": False}, {"clip": "x0", "threshold_ratio": 0.995, "threshold_max": 1.0}),
        ({"clip_sample": False, "set_alpha_to_one": False}, {"last_time": 1}),
        ({"_class_name": "PNDMScheduler", "clip_sample": False, "skip_prk_steps": True}, {}),
        ({"clip_sample": False, "timestep_spacing": "trailing", "steps_offset": 1}, {"spacing": "trailing"}),
        ({"_class_name": "DDPMScheduler"}, {"eta": 1.0, "S": 1000, "clip": "x0_and_eps"}),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "num_train_timesteps": 20},
            {"rule": "sigma_hat", "eta": None, "S": 20, "clip": "x0_and_eps"},
        ),
    ],
)
def test_a_schedulers_sampler_is_stated_by_our_options(config, fields):
    assert read_sampler(config, HERE) == SamplerSpec(**{"spacing": "leading"} | fields)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"timestep_spacing": "quadratic"}, "timestep_spacing='quadratic' is not supported; supported are leading"),
        ({"steps_offset": "one"}, "steps_offset='one' must be an integer"),
        ({"clip_sample_range": -1}, "clip_range=-1.0 must be positive"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 2}, "threshold_ratio=2.0 must lie in (0, 1]"),
    ],
)
def test_invalid_sampling_options_are_refused(config, words):
    message = refusal(read_sampler, config, HERE)
    assert str(HERE) in message
    assert words in message


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
def test_every_scheduler_of_diffusers_is_read_or_refused(hf):
    """Those with DDPM's noise levels state betas in what they save, and are read as theirs; no other one does."""
    read, refused = set(), set()
    for name in (name for name in dir(hf) if name.endswith("Scheduler") and not name.startswith("Flax")):
        try:
            theirs = getattr(hf, name)()
            config = json.loads(theirs.to_json_string())
        except (TypeError, ImportError, AttributeError):  # needs arguments or torchsde, or has no configuration
            continue
        if not has_betas(config):
            refused.add(name)
            continue
        if name.startswith("CogVideoX"):
            assert "snr_shift_scale=3.0 is not supported" in refusal(read_scheduler, config, HERE)
            config["snr_shift_scale"], theirs = 1, getattr(hf, name)(snr_shift_scale=1)
        schedule, _ = read_scheduler(config, HERE)
        torch.testing.assert_close(theirs.alphas_cumprod.double(), schedule.alpha_bar[1:], rtol=5e-5, atol=0, msg=name)
        read.add(name)
    assert {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler"} < read
    others = ("FlowMatchEulerDiscrete", "EDMEuler", "ScoreSdeVe", "CMStochasticIterative", "IPNDM")
    assert {f"{name}Scheduler" for name in others} < refused


@pytest.mark.parametrize("name", SCHEDULES)
def test_diffusers_scheduler_has_our_noise_levels(hf, name):
    schedule = SCHEDULES[name]
    theirs = hf.DDIMScheduler.from_config(json.loads(json.dumps(scheduler_config(schedule, "eps"))))
    assert theirs.config.num_train_timesteps == schedule.T
    # A float32 table: 1 - 0.999, at the end of the cosine schedule, is known to 5 digits only.
    rtol = 5e-5 if name.startswith("cosine") else 5e-6
    torch.testing.assert_close(theirs.alphas_cumprod.double(), schedule.alpha_bar[1:], rtol=rtol, atol=0)
    assert theirs.final_alpha_cumprod == 1
