"""Full and read-only file systems, for real; only root can mount them."""

import os
import shutil
import subprocess

import pytest

from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.errors import UserError

pytestmark = pytest.mark.integration


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


GOES_ON = r"the checkpoints before are intact\. Make {} and go on with checkpoint=last\.$"
TRAINER = {"max_steps": 8, "checkpoint_every": 2}


def test_read_only_folder_is_refused_before_work(run, file_system, tmp_path, monkeypatch):
    folder = file_system(tmp_path / "there")
    (folder / "made" / "checkpoints").mkdir(parents=True)
    read_only(folder)
    monkeypatch.setattr("ddim.training.run.build_module", lambda *args: pytest.fail("work began"))
    for name in ("made", "new"):
        with pytest.raises(
            UserError, match=r"^cannot write to .*checkpoints \(Read-only file system\); choose another o"
        ):
            run(output_dir=str(folder / name), trainer=TRAINER)


@pytest.mark.parametrize("name", ["checkpoints", "csv"])
def test_folder_made_read_only_keeps_older_checkpoints(run, same, file_system, after_loss, tmp_path, monkeypatch, name):
    """The folder of the checkpoints fails at step 6, that of the metrics at the step before."""
    expected = run("expected", trainer={"max_steps": 4, "checkpoint_every": 2})
    uninterrupted = run("uninterrupted", trainer=TRAINER)
    folder = file_system(tmp_path / "run" / name)
    after_loss(lambda step, *_: read_only(folder) if step == 4 else None)
    what = "the checkpoint .*step_00000006.ckpt of step 6" if name == "checkpoints" else ".*metrics.csv"
    with pytest.raises(
        UserError,
        match=rf"^{what} cannot be written \(Read-only file system\); " + GOES_ON.format("the folder writable"),
    ):
        run(trainer=TRAINER)
    monkeypatch.undo()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["last.ckpt", "step_00000002.ckpt", "step_00000004.ckpt"]
    assert same(expected, checkpoints / "last.ckpt")
    # A read-only checkpoint is enough to sample from, and for another run to resume from.
    assert load_model(checkpoints / "last.ckpt").step == 4
    assert same(uninterrupted, run("elsewhere", trainer=TRAINER, checkpoint=str(checkpoints / "last.ckpt")))
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    assert same(uninterrupted, run(trainer=TRAINER, checkpoint="last"))


def test_full_disk_keeps_older_checkpoints(run, same, file_system, tmp_path):
    """There is room for two checkpoints of about 300 KiB, not for a third."""
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
    assert same(run("uninterrupted", trainer=TRAINER), run(trainer=TRAINER | {"keep_last": 1}, checkpoint="last"))


def test_run_resumes_from_a_read_only_file(run, same, tmp_path):
    last = run(trainer={"max_steps": 4})
    last.chmod(0o444)
    uninterrupted = run("uninterrupted", trainer={"max_steps": 6})
    assert same(uninterrupted, run("elsewhere", trainer={"max_steps": 6}, checkpoint=str(last)))
    assert same(uninterrupted, run(trainer={"max_steps": 6}, checkpoint="last"))
    assert read_checkpoint(last.parent / "step_00000004.ckpt")["global_step"] == 4
