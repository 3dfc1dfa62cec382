"""Places that cannot be written, for real: a small or a read-only file system, which only root can mount here."""

import os
import shutil
import subprocess

import pytest

from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.errors import UserError
from ddim.training.module import DiffusionModule


@pytest.fixture
def file_system(tmp_path):
    """file_system(folder, size): mount a new file system there; remount(folder): make it read-only."""
    mounted = []

    def file_system(folder, size="64m"):
        if os.geteuid() or not shutil.which("mount"):
            pytest.skip("only root can mount a file system")
        folder.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip(f"this root cannot mount a file system: {done.stderr!r}")
        mounted.append(folder)
        return folder

    yield file_system
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def read_only(folder):
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(5, action): do something in the middle of that step."""

    def at_step(number, action):
        training_step = DiffusionModule.training_step

        def step(self, batch, batch_idx):
            if batch["step"] == number:
                action()
            return training_step(self, batch, batch_idx)

        monkeypatch.setattr(DiffusionModule, "training_step", step)

    return at_step


def never(monkeypatch):
    monkeypatch.setattr(DiffusionModule, "__init__", lambda *args, **kwargs: pytest.fail("work began"))


GOES_ON = r"the checkpoints before are intact\. Make {} and go on with ckpt_path=last\.$"
TRAINER = {"max_steps": 8, "checkpoint_every": 2}


def test_a_read_only_place_is_one_sentence_before_work(run, file_system, tmp_path, monkeypatch):
    folder = file_system(tmp_path / "there")
    (folder / "made" / "checkpoints").mkdir(parents=True)
    read_only(folder)
    never(monkeypatch)
    for name in ("there/made", "there/new"):
        with pytest.raises(
            UserError, match=r"^cannot write to .*checkpoints \(Read-only file system\); choose another o"
        ):
            run(name, trainer=TRAINER)


@pytest.mark.parametrize("part", ["checkpoints", "."])
def test_a_place_that_becomes_read_only_on_the_way_leaves_the_checkpoint_before(
    run, same, file_system, at_step, tmp_path, monkeypatch, part
):
    """The folder of the checkpoints, which is met at step 6, or that of the whole run, whose metrics are met first."""
    expected = run("expected", trainer={"max_steps": 4, "checkpoint_every": 2})
    whole = run("whole", trainer=TRAINER)
    folder = file_system(tmp_path / "run" / part)
    at_step(4, lambda: read_only(folder))
    what = "the checkpoint .*step_00000006.ckpt of step 6" if part == "checkpoints" else ".*metrics.csv"
    with pytest.raises(
        UserError,
        match=rf"^{what} cannot be written \(Read-only file system\); " + GOES_ON.format("the folder writable"),
    ):
        run(trainer=TRAINER)
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt"]
    assert same(expected, checkpoints / "last.ckpt")
    # From the place that can only be read: it is sampled from, and another run goes on from it.
    assert load_model(checkpoints / "last.ckpt").step == 4
    assert same(whole, run("elsewhere", trainer=TRAINER, ckpt_path=str(checkpoints / "last.ckpt")))
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    assert same(whole, run(trainer=TRAINER, ckpt_path="last"))


def test_a_full_disk_leaves_the_checkpoint_before(run, same, file_system, tmp_path):
    """A checkpoint of the tiny network takes some 300 KiB: two find room, a third does not."""
    expected = run("expected", trainer={"max_steps": 4, "checkpoint_every": 2})
    size = expected.stat().st_size
    folder = file_system(tmp_path / "run" / "checkpoints", size=f"{5 * size // 2 // 4096 * 4}k")
    with pytest.raises(
        UserError,
        match=r"^the checkpoint .*6.ckpt of step 6 cannot be written \(the disk is full\); " + GOES_ON.format("room"),
    ):
        run(trainer=TRAINER)
    assert sorted(p.name for p in folder.iterdir()) == ["last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt"]
    assert same(expected, folder / "last.ckpt")
    (folder / "step_00000002.ckpt").unlink()
    assert same(run("whole", trainer=TRAINER), run(trainer=TRAINER | {"keep_last": 1}, ckpt_path="last"))


def test_a_read_only_file_is_gone_on_from(run, same, tmp_path):
    last = run(trainer={"max_steps": 4})
    last.chmod(0o444)
    whole = run("whole", trainer={"max_steps": 6})
    assert same(whole, run("elsewhere", trainer={"max_steps": 6}, ckpt_path=str(last)))
    assert same(whole, run(trainer={"max_steps": 6}, ckpt_path="last"))
    assert read_checkpoint(last.parent / "step_00000004.ckpt")["global_step"] == 4
