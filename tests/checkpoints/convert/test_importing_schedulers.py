"""Import: what the scheduler_config.json of a folder of diffusers says, and what is assumed without one."""

import json
import shutil

import pytest
import torch
from layouts import WEIGHTS_FILE, bring, edit, import_refusal, same

from ddim.checkpoints import read_model
from ddim.diffusion.schedule import ScheduleSpec, cosine_schedule, scaled_linear_schedule

pytestmark = pytest.mark.integration


def test_the_schedule_of_a_folder_is_that_of_its_scheduler(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    edit(path, beta_schedule="scaled_linear", beta_start=0.001, beta_end=0.01, num_train_timesteps=30)
    done = bring(folder)
    assert torch.equal(done.model.spec.schedule.alpha_bar, scaled_linear_schedule(30, 0.001, 0.01).alpha_bar)


@pytest.mark.parametrize("clip", [True, None, False])
def test_a_clipping_scheduler_is_noted(folder, clip):
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=clip)  # without the entry it does, too
    note = "its scheduler clips the predicted x0, which the paper does not; sampler.clip=x0 does the same"
    assert bring(folder, weights="ema").warnings == ([] if clip is False else [note])


@pytest.mark.parametrize(
    ("entries", "sampler", "clips"),
    [
        ({}, "sampler.spacing=leading", ""),
        ({"clip_sample": True}, "sampler.spacing=leading sampler.clip=x0", "sampler.clip=x0"),
        (
            {"clip_sample_range": 2.0, "clip_sample": True, "timestep_spacing": "trailing", "set_alpha_to_one": False},
            "sampler.spacing=trailing sampler.clip=x0 sampler.clip_range=2.0 sampler.last_time=1",
            "sampler.clip=x0 sampler.clip_range=2.0",
        ),
        ({"rescale_betas_zero_snr": True, "steps_offset": 1}, "sampler.spacing=leading sampler.steps_offset=1", ""),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"},
            "sampler.rule=sigma_hat sampler.eta=null sampler.S=1000 sampler.spacing=leading",
            "",
        ),
    ],
)
def test_how_a_scheduler_samples_is_stated_and_kept(folder, entries, sampler, clips):
    edit(folder / "scheduler" / "scheduler_config.json", **entries)
    done = bring(folder, weights="ema")
    assert done.lines[3].endswith(f"; as its scheduler samples: {sampler}")
    assert read_model(done.path).origin["sampler"] == sampler
    assert [warning.endswith(f"; {clips} does the same") for warning in done.warnings] == [True] * bool(clips)
    schedule = read_model(done.path).spec.schedule
    assert (schedule[schedule.T] == 0) == ("rescale_betas_zero_snr" in entries)


def test_a_missing_scheduler_is_noted_or_replaced(folder):
    shutil.rmtree(folder / "scheduler")
    done = bring(folder, weights="ema")
    assert done.warnings == [
        f"no scheduler_config.json belongs to {folder / WEIGHTS_FILE}: "
        "a linear schedule and noise prediction are assumed"
    ]
    spec = done.model.spec
    assert (spec.schedule.name, spec.schedule.T, spec.prediction) == ("linear", 1000, "eps")
    options = {"schedule": ScheduleSpec("cosine", T=20), "prediction": "x0"}
    for given, assumed in (("schedule", "noise prediction is assumed"), ("prediction", "a linear schedule is assumed")):
        done = bring(folder, weights="ema", overwrite=True, **{given: options[given]})
        assert [warning.partition(": ")[2] for warning in done.warnings] == [assumed]
    done = bring(folder, weights="ema", overwrite=True, **options)
    spec = done.model.spec
    assert done.warnings == []
    assert torch.equal(spec.schedule.alpha_bar, cosine_schedule(20).alpha_bar)
    assert spec.prediction == "x0"


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
        {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0, "prediction_type": "epsilon"},
        {"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000, "trained_betas": None},
        {},
    ],
)
def test_a_scheduler_without_betas_is_not_taken_for_ddpm(folder, state, config):
    path, options = folder / "scheduler" / "scheduler_config.json", {"schedule": ScheduleSpec("cosine", T=20)}
    path.write_text(json.dumps(config))
    for given in ({}, options, {"prediction": "v"}):
        name = config.get("_class_name", "a scheduler without a name")
        assert import_refusal(folder, **given) == (
            f"{path} is of {name}, which has no betas as DDPM has, so schedule and prediction of the model are "
            "unknown; state both, schedule=... and prediction=..."
        )
    done = bring(folder, weights="ema", prediction="v", **options)
    assert same(done.model.state, state)
    assert (done.model.spec.schedule.T, done.model.spec.prediction, done.warnings) == (20, "v", [])
    assert "sampler" not in done.model.origin
