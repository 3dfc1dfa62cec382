"""CSV, TensorBoard and W&B, without a network or an account."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ddim.errors import UserError
from ddim.training.checkpoints import Checkpoints
from ddim.training.module import DiffusionModule

pytestmark = pytest.mark.integration
GRID = {"every": 4, "n": 4, "sampler": {"S": 2}}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_csv_is_always_written_and_never_overwritten(run, killed_run, logged, tmp_path, accumulate):
    first = tmp_path / "run" / "csv" / "version_0" / "metrics.csv"
    trainer = {"max_steps": 7, "checkpoint_every": 4, "accumulate": accumulate}
    killed_run(6, 0, trainer=trainer)
    content = first.read_bytes()
    killed_run(4, accumulate - 1, trainer=trainer, checkpoint="last")
    run(trainer=trainer, checkpoint="last")
    assert first.read_bytes() == content
    one, three = (logged("run", "train/loss", version) for version in (0, 2))
    assert (list(one), list(three)) == ([0, 1, 2, 3, 4, 5], [4, 5, 6])
    run("uninterrupted", trainer=trainer)
    assert one | three == three | one == logged("uninterrupted", "train/loss")


def test_no_row_is_lost_by_a_kill_after_a_checkpoint(run, logged, monkeypatch):
    """Each row is in the file before the checkpoint of its step, from which the next run goes on with the next row."""
    trainer = {"max_steps": 9, "checkpoint_every": 3, "log_every": 3}
    run("uninterrupted", trainer=trainer)
    save = Checkpoints.save
    rows = {}

    def save_and_die(self, trainer):
        save(self, trainer)
        rows.update(logged("run", "train/loss", len(rows)))
        raise KeyError("killed")

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    for saved in (3, 6, 9):
        with pytest.raises(KeyError, match="killed"):
            run(trainer=trainer, checkpoint="last")
        assert list(rows) == [2, 5, 8][: saved // 3]
    assert rows == logged("uninterrupted", "train/loss")


def test_tensorboard_holds_losses_and_grids(run, logged, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(logger={"tensorboard": True}, grid=GRID)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    scalars = {e.step: e.value for e in events.Scalars("train/loss")}
    assert scalars == pytest.approx(logged("run", "train/loss"), rel=1e-6)
    (image,) = events.Images("samples")
    assert image.step == 4
    (tmp_path / "logged.png").write_bytes(image.encoded_image_string)
    image_logged, image_saved = (
        Image.open(p) for p in (tmp_path / "logged.png", tmp_path / "run/samples/step_00000004.png")
    )
    assert torch.equal(pil_to_tensor(image_logged.convert("L")), pil_to_tensor(image_saved))


@pytest.fixture
def wandb_at(tmp_path, monkeypatch):
    """W&B with all its files below tmp_path, and without an account."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "NETRC", "TMPDIR"):
        monkeypatch.setenv(name, str(home / name.lower()))
    (home / "tmpdir").mkdir()
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_MODE", "online")  # Lightning sets it when offline; monkeypatch restores it
    yield tmp_path
    wait_for_wandb()


def wait_for_wandb():
    """Wait until W&B's own process has written its files."""
    import wandb

    wandb.teardown()


def records(path):
    """Yield the records of a .wandb file: a log in LevelDB's format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, fragments = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits: the rest of the block is padding
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        fragments += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or its last fragment
            yield Record.FromString(fragments)
            fragments = b""


def history(path):
    """Return the rows of a W&B run that have a loss, by optimiser step."""
    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in r.history.item}
        for r in records(path)
        if r.HasField("history")
    ]
    return {row["trainer/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}


def runs(folder: Path):
    return sorted(folder.glob("wandb/offline-run-*"))


OFFLINE = {"wandb": True, "offline": True, "project": "p", "tags": ["a", "b"], "group": "sweep"}


def test_wandb_offline_resumes_the_same_run(run, logged, wandb_at):
    """With its configuration, losses and grids; another training in this process is another run."""
    folder = wandb_at / "run"
    before = set(Path.cwd().iterdir())
    run(logger=OFFLINE, grid=GRID, trainer={"max_steps": 4})
    run(logger=OFFLINE, grid=GRID, trainer={"max_steps": 7}, checkpoint="last")
    run("other", logger=OFFLINE, trainer={"max_steps": 2})
    wait_for_wandb()
    one, two = runs(folder)
    name = (folder / "wandb_id.txt").read_text()
    assert f"-{name}" in one.name
    assert f"-{name}" in two.name  # with a number behind it if both began in one second
    for number, path in enumerate((one, two)):
        expected = logged("run", "train/loss", number)
        assert history(path / f"run-{name}.wandb") == pytest.approx(expected, rel=1e-6)
    (image,) = (one / "files" / "media").rglob("*.png")
    assert image.read_bytes() == (folder / "samples" / "step_00000004.png").read_bytes()
    (begun,) = [r.run for r in records(one / f"run-{name}.wandb") if r.HasField("run")]
    assert (begun.project, begun.display_name, list(begun.tags)) == ("p", "run", ["a", "b"])
    assert (begun.run_group, begun.job_type) == ("sweep", "train")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["network"]["num_groups"] == 4
    assert config["seed"] == 5
    (other,) = runs(wandb_at / "other")
    other_name = (wandb_at / "other" / "wandb_id.txt").read_text()
    assert other_name != name
    assert list(history(other / f"run-{other_name}.wandb")) == [0, 1]
    assert set(Path.cwd().iterdir()) == before


def test_failed_training_ends_its_wandb_run(killed_run, run, wandb_at):
    killed_run(2, 0, logger=OFFLINE)
    run("other", logger=OFFLINE, trainer={"max_steps": 2})
    wait_for_wandb()
    for name, exit_code in (("run", 1), ("other", 0)):
        (folder,) = runs(wandb_at / name)
        (path,) = folder.glob("*.wandb")
        assert list(history(path)) == [0, 1]
        assert [r.exit.exit_code for r in records(path) if r.HasField("exit")] == [exit_code]


def test_wandb_without_an_account_is_refused_before_training(run, wandb_at, monkeypatch):
    monkeypatch.setattr(DiffusionModule, "training_step", lambda *args: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"W&B refused to start .*run `wandb login`, or choose logger=wandb_offline"):
        run(logger={"wandb": True})
