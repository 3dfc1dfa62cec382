"""Bad input is refused in one sentence before any training step."""

import re
import shutil

import pytest
import torch

from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.errors import UserError
from ddim.training.module import DiffusionModule
from ddim.training.spec import TrainSpec


@pytest.fixture
def refused(run, monkeypatch):
    """refused(...): the message of the UserError that a run ends with before it trains; one sentence."""

    def refused(*args, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(DiffusionModule, "training_step", lambda *args: pytest.fail("trained"))
            with pytest.raises(UserError) as caught:
                run(*args, **changes)
        message = str(caught.value)
        assert re.fullmatch(r"[^\n]{20,}[.!]", message), message
        assert not re.search(r"[.!?] +[A-Z]", message), f"more than one sentence: {message}"
        return message

    return refused


@pytest.fixture
def last(finished_run, tmp_path):
    """The last checkpoint of a run named "run" at step 2; copy.ckpt has the same content."""
    shutil.copytree(finished_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.unlink()
    path.hardlink_to(path.with_name("step_00000002.ckpt"))  # as training does
    shutil.copy(path, tmp_path / "copy.ckpt")
    return path


RESUMED = {"checkpoint": "last"}
OTHER_SETTINGS = [
    ({"optim": {"lr": 0.123}}, "optim.lr: "),
    ({"optim": {"warmup": 77}}, "optim.warmup: "),
    ({"objective": {"reduction": "sum"}}, "objective.reduction: mean and sum"),
    ({"seed": 99}, "seed: "),
    ({"trainer": {"batch_size": 4}}, "trainer.batch_size: "),
    ({"ema": {"decay": 0.5}}, "ema.decay: "),
    ({"ema": None}, "ema.decay: "),
]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({}, ["already holds a run at step 2; go on with checkpoint=last, or choose another name="]),
        ({"checkpoint": "copy.ckpt"}, ["already holds a run at step 2"]),
        (RESUMED | {"trainer": {"max_steps": 1}}, ["is at step 2, past trainer.max_steps=1; raise max_steps"]),
        *((RESUMED | changes, ["was trained with other settings", phrase]) for changes, phrase in OTHER_SETTINGS),
    ],
    ids=str,
)
def test_a_run_is_neither_replaced_nor_changed(refused, last, monkeypatch, tmp_path, changes, phrases):
    monkeypatch.chdir(tmp_path)
    before = last.read_bytes()
    message = refused(**changes)
    assert [phrase for phrase in phrases if phrase not in message] == []
    assert last.read_bytes() == before


@pytest.mark.integration
@pytest.mark.parametrize("where", ["last", "path"])
def test_resuming_another_model_lists_every_difference(refused, last, where):
    changes = {
        "network": {"ch": 32, "num_groups": 8, "dropout": 0.5, "init": "ddpm"},
        "schedule": {"T": 30},
        "objective": {"prediction": "v"},
        "checkpoint": "last" if where == "last" else str(last),
    }
    message = refused("run" if where == "last" else "another", **changes)
    assert "holds another model" in message
    phrases = [
        "network.ch: 16 and 32",
        "network.num_groups: 4 and 8",
        "schedule: linear with T=20 and linear with T=30",
        "prediction: eps and v",
    ]
    assert f"({'; '.join(phrases)})" in message  # but not dropout and init, which change no weight's meaning


@pytest.mark.integration
def test_dropout_and_init_may_change_on_resuming(run, last):
    path = run(trainer={"max_steps": 3}, network={"dropout": 0.5, "init": "ddpm"}, checkpoint="last")
    assert read_checkpoint(path)["global_step"] == 3


def test_missing_and_invalid_checkpoints_are_refused(refused, tmp_path):
    path = tmp_path / "x.ckpt"
    assert f"there is no checkpoint {path}" in refused(checkpoint=str(path))
    assert f"there is no checkpoint {tmp_path}" in refused(checkpoint=str(tmp_path))
    path.write_bytes(b"")
    assert f"{path} cannot be read as a checkpoint" in refused(checkpoint=str(path))
    torch.save({"state_dict": {}, "epoch": 3}, path)
    assert f"{path} is not a checkpoint of this project" in refused(checkpoint=str(path))


@pytest.mark.integration
def test_truncated_last_checkpoint_is_refused(refused, last):
    last.write_bytes(last.read_bytes()[:-100])
    for checkpoint in ("last", None):
        assert f"every checkpoint in {last.parent} is damaged" in refused(checkpoint=checkpoint)


def test_unwritable_folder_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused("file/below")
    assert "cannot write to" in message
    assert "choose another output_dir" in message


BAD_SETTINGS = {
    "channels": ({"network": {"channels": 3}}, r"images of .* \(3, 8, 8\), the data has \(1, 8, 8\)"),
    "size": ({"network": {"image_size": [16, 16]}}, r"\(1, 16, 16\), the data has \(1, 8, 8\)"),
    "network key": ({"network": {"dropuot": 0.1}}, r"unknown key network.dropuot \(did you mean dropout\?\); allowed"),
    "network name": ({"network": {"name": "unett"}}, r"unknown network 'unett' \(did you mean unet\?\); allowed: unet"),
    "network value": ({"network": {"ch": 6}}, "network: .*num_groups=4"),
    "data name": ({"data": {"name": "digit"}}, r"unknown data set 'digit' \(did you mean digits\?\); allowed"),
    "steps of the grid": ({"grid": {"sampler": {"S": 21}}}, "grid.sampler: .*S=21.*20"),
    "batch": ({"trainer": {"accumulate": 3}}, "batch_size=8 .* multiple of 3"),
    "seed": ({"seed": -1}, r"seed=-1 must lie in 0 \.\. 2\*\*64 - 1"),
    "large seed": ({"seed": 1 << 64}, "seed=18446744073709551616 must lie"),
    "grid seed": ({"grid": {"seed": -1}}, "grid: seed=-1 must lie"),
    "max_steps": ({"trainer": {"max_steps": 0}}, "trainer: max_steps=0 must be at least 1"),
    "log_every": ({"trainer": {"log_every": 0}}, "trainer: log_every=0 must be at least 1"),
    "workers": ({"trainer": {"num_workers": -1}}, "num_workers=-1 must not be negative"),
    "precision": ({"trainer": {"precision": "16-mixed"}}, "trainer.precision.*16-mixed.*allowed: .*bf16-mixed"),
    "prediction": ({"objective": {"prediction": "epsilon"}}, "objective.prediction.*epsilon.*allowed: eps"),
    "decay": ({"ema": {"decay": 1.0}}, "ema: decay=1.0 must lie in"),
    "learning rate": ({"optim": {"lr": 0.0}}, "optim: lr=0.0 must be positive"),
    "devices": ({"trainer": {"devices": 0}}, "trainer: .*devices=0"),
}


@pytest.mark.parametrize("setting", BAD_SETTINGS)
def test_bad_setting_is_refused_in_one_sentence(refused, setting):
    changes, message = BAD_SETTINGS[setting]
    assert re.search(message, refused(**changes))


@pytest.mark.parametrize("key", ["accelerator", "strategy"])
def test_unknown_accelerator_or_strategy_is_refused(run, key):
    with pytest.raises(UserError, match=f"trainer: .*invalid {key} name: `{key}='nonsense'`"):
        run(trainer={key: "nonsense"})


def test_model_spec_follows_the_configuration(config):
    spec = build(TrainSpec, config(objective={"prediction": "x0"}, schedule={"name": "cosine", "T": 30}), "")
    model = spec.model_spec()
    assert (model.image_shape, model.prediction, model.schedule.T, model.data) == ((1, 8, 8), "x0", 30, "digits")
    assert model.schedule.name == "cosine"
    assert model.network_spec.ch_mult == (1,)
