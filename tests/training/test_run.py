"""Bad input is refused in one sentence before any training step."""

import os
import re
import shutil
import signal

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from ddim.checkpoints.checksum import write_checksum
from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.errors import UserError
from ddim.training.run import lock_folder
from ddim.training.spec import TrainSpec


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
    ({"network": {"dropout": 0.5}}, "network.dropout: 0.0 and 0.5"),
    ({"data": {"flip": False}}, "data.flip: True and False"),
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
def test_init_may_change_on_resuming(run, last):
    path = run(trainer={"max_steps": 3}, network={"init": "ddpm"}, checkpoint="last")
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


def optimizer(checkpoint):
    return checkpoint["optimizer_states"][0]


def shadow(checkpoint):
    return checkpoint["callbacks"]["EMA"]["shadow"]


TWO = torch.zeros(2)
BIAS = "temb.dense.0.bias"
DAMAGE = {
    "moment of another shape": lambda c: optimizer(c)["state"][0].update(exp_avg=TWO),
    "moment is no tensor": lambda c: optimizer(c)["state"][0].update(exp_avg_sq=3),
    "moment without memory": lambda c: optimizer(c)["state"][1].update(exp_avg=torch.zeros(1).expand(5)),
    "moment lacking": lambda c: optimizer(c)["state"][0].pop("exp_avg"),
    "no moments": lambda c: optimizer(c).update(state={}),
    "Adam's step": lambda c: optimizer(c)["state"][0].update(step=TWO),
    "parameter lacking in the optimizer": lambda c: optimizer(c)["param_groups"][0]["params"].pop(),
    "no learning rate": lambda c: optimizer(c)["param_groups"][0].pop("lr"),
    "two optimizers": lambda c: c["optimizer_states"].append(optimizer(c)),
    "no optimizer": lambda c: c.pop("optimizer_states"),
    "no scheduler": lambda c: c.pop("lr_schedulers"),
    "scheduler": lambda c: c["lr_schedulers"][0].update(last_epoch="x"),
    "no loops": lambda c: c.pop("loops"),
    "loops of another kind": lambda c: c.update(loops=[5]),
    "empty loop": lambda c: c["loops"].update(fit_loop={}),
    "progress lacking": lambda c: c["loops"]["fit_loop"].pop("epoch_loop.batch_progress"),
    "other step": lambda c: c.update(global_step=1),
    "no callbacks": lambda c: c.pop("callbacks"),
    "no EMA": lambda c: c["callbacks"].pop("EMA"),
    "EMA of another shape": lambda c: shadow(c).update({BIAS: torch.zeros(1)}),
    "weight lacking in the EMA": lambda c: shadow(c).pop(BIAS),
    "EMA without its count": lambda c: c["callbacks"]["EMA"].pop("updates"),
    "weight of another shape": lambda c: c["state_dict"].update({f"network.{BIAS}": TWO}),
    "weight lacking": lambda c: c["state_dict"].pop(f"network.{BIAS}"),
    "weight unknown": lambda c: c["state_dict"].update(other=TWO),
    "skipped steps": lambda c: c["ddim_counts"].update(skipped=torch.zeros((), dtype=torch.int64)),
    "losses": lambda c: c["ddim_counts"].update(losses=TWO),
    "recipe": lambda c: c["ddim"].update(recipe=[1]),
    "Lightning's version": lambda c: c.pop("pytorch-lightning_version"),
}


@pytest.mark.integration
@pytest.mark.parametrize("damage", DAMAGE)
def test_incomplete_or_misshapen_training_state_is_refused(refused, last, damage):
    """Of a file whose checksum is right: fused Adam read outside such moments, a segmentation fault."""
    checkpoint = read_checkpoint(last)
    DAMAGE[damage](checkpoint)
    torch.save(checkpoint, last)
    write_checksum(last)
    message = refused(checkpoint="last", trainer={"max_steps": 3})
    assert message.startswith(f"{last} is not understood; it is damaged or of another kind (")


@pytest.mark.integration
def test_checkpoint_of_unfused_adam_resumes(run, same, last):
    """As code before the guard against divergence wrote them, also without counts, and without a fingerprint."""
    expected = run("expected", trainer={"max_steps": 4})
    checkpoint = read_checkpoint(last)
    optimizer(checkpoint)["param_groups"][0].update(fused=None, foreach=True)
    del checkpoint["ddim_counts"], checkpoint["ddim"]["recipe"]["data.fingerprint"], checkpoint["ddim"]["sealed"]
    torch.save(checkpoint, last)
    assert same(expected, run(checkpoint="last", trainer={"max_steps": 4}))


@pytest.mark.integration
def test_moments_follow_the_memory_format_of_the_weights(run, same, last):
    """Fused Adam takes them in the order of memory."""
    expected = run("expected", trainer={"max_steps": 4})
    resumed = run(checkpoint="last", trainer={"max_steps": 4, "channels_last": True})
    assert same(expected, resumed, atol=1e-5)


@pytest.fixture
def folder_of_images(tmp_path):
    """folder_of_images("a", seed=0): options for 20 grey images in tmp_path/a."""

    def folder_of_images(name, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        for i, pixels in enumerate(torch.randint(0, 256, (20, 8, 8), dtype=torch.uint8, generator=generator)):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(pixels.numpy()).save(tmp_path / name / f"{i}.bmp")
        return {"data": {"name": "folder", "root": str(tmp_path / name)} | options}

    return folder_of_images


@pytest.mark.integration
@pytest.mark.parametrize("in_memory", [True, False])
def test_run_resumes_on_the_same_images_only(run, refused, same, folder_of_images, tmp_path, in_memory):
    """Their folder may move; other pixels in files of the same names and sizes are other images."""
    options = folder_of_images("a", in_memory=in_memory)
    expected = run("expected", **options, trainer={"max_steps": 4})
    run(**options, trainer={"max_steps": 2})
    more = {"checkpoint": "last", "trainer": {"max_steps": 4}}
    for other in (folder_of_images("b", seed=1, in_memory=in_memory), folder_of_images("a", seed=2)):
        message = refused(**other, **more)
        assert re.search(
            r"was trained on other images or labels \(fingerprint [0-9a-f]{16}, now [0-9a-f]{16}\).*name=", message
        )
    folder_of_images("a")
    (tmp_path / "a").rename(tmp_path / "moved")
    options["data"] |= {"root": str(tmp_path / "moved"), "in_memory": not in_memory}
    assert same(expected, run(**options, **more))


@pytest.mark.integration
def test_images_of_older_checkpoints_are_not_compared(run, last, caplog):
    checkpoint = read_checkpoint(last)
    del checkpoint["ddim"]["recipe"]["data.fingerprint"]
    torch.save(checkpoint, last)
    write_checksum(last)
    run(checkpoint="last", trainer={"max_steps": 3})
    assert f"{last} is of earlier code and does not tell its training images" in caplog.text
    caplog.clear()
    run(checkpoint="last", trainer={"max_steps": 4})
    assert "earlier code" not in caplog.text


@pytest.mark.integration
def test_second_training_in_a_folder_is_refused(run, same, after_loss, tmp_path):
    expected, folder = run("expected"), tmp_path / "run"
    seen = []

    def start_another(step, *_):
        with pytest.raises(UserError, match=rf"^another training is running in {folder}; .*name=.*[^.\n]*$"):
            run(optim={"lr": 0.5})
        seen.append(step)

    after_loss(start_another)
    assert same(expected, run())
    assert seen == list(range(6))


def test_lock_ends_with_the_process_and_is_of_the_main_one(tmp_path, monkeypatch):
    ready, write = os.pipe()
    holder = os.fork()
    if not holder:
        with lock_folder(tmp_path):
            os.write(write, b"1")
            signal.pause()
    assert os.read(ready, 1) == b"1"
    with pytest.raises(UserError, match="another training is running"), lock_folder(tmp_path):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(rank_zero_only, "rank", 1)
        with lock_folder(tmp_path):
            pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with lock_folder(tmp_path):
        pass


def test_unwritable_folder_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(output_dir=str(tmp_path / "file" / "below"))
    assert "cannot write to" in message
    assert "choose another output_dir" in message


def test_model_spec_follows_the_configuration(config):
    spec = build(TrainSpec, config(objective={"prediction": "x0"}, schedule={"name": "cosine", "T": 30}), "")
    model = spec.model_spec()
    assert (model.image_shape, model.prediction, model.schedule.T, model.data) == ((1, 8, 8), "x0", 30, "digits")
    assert model.schedule.name == "cosine"
    assert model.network_spec.ch_mult == (1,)
