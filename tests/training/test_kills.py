"""A training that is killed repeatedly, at any moment, ends with the same bits. DDIM_KILLS=30 tries more."""

import multiprocessing
import os
import random
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.training.run import train
from ddim.training.spec import TrainSpec

KILLS = int(os.environ.get("DDIM_KILLS", "2"))
EVERY, STEPS = 40, 120 + 40 * KILLS


@pytest.fixture
def start(config, monkeypatch):
    """start("run"): train or go on in a process of its own, which need not import everything again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["ddim.training.run"])

    def start(name):
        trainer = {"max_steps": STEPS, "checkpoint_every": EVERY, "log_every": 20}
        options = {"network": {"dropout": 0.1}, "ema": {"decay": [0.999, 0.9]}, "trainer": trainer}
        values = config(name, **options, checkpoint="last")
        process = processes.Process(target=train, args=(build(TrainSpec, values, ""), values))
        process.start()
        return process

    return start


def wait_for(process: BaseProcess, happens, seconds: float = 120.0) -> bool:
    """Return whether `happens()` became true before the process ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.0005)
    return False


def written(folder: Path) -> int:
    """Return the inode of the last checkpoint: cheaper than reading it all the time."""
    last = folder / "checkpoints" / "last.ckpt"
    return last.stat().st_ino if last.exists() else 0


def step(folder: Path) -> int:
    last = folder / "checkpoints" / "last.ckpt"
    return read_checkpoint(last)["global_step"] if last.exists() else 0


def finished(process: BaseProcess) -> bool:
    process.join(300)
    return process.exitcode == 0


@pytest.mark.slow
@pytest.mark.integration
def test_killed_at_random_moments_it_ends_with_the_same_bits(start, same, tmp_path):
    uninterrupted, killed, generator = tmp_path / "uninterrupted", tmp_path / "killed", random.Random(KILLS)
    assert finished(start("uninterrupted"))
    checkpoints = killed / "checkpoints"
    moments = []
    for k in range(KILLS):
        before, file = step(killed), written(killed)
        process = start("killed")
        if k % 3 == 0:  # while a checkpoint is written
            moments.append("saving" if wait_for(process, lambda: any(checkpoints.glob(".*_step_*"))) else "ended")
        elif k % 3 == 1:  # some time after a new checkpoint, at any place in a step
            newer = wait_for(process, lambda file=file: written(killed) != file)
            time.sleep(generator.uniform(0, 0.3))
            moments.append("training" if newer else "ended")
        else:  # at any time from its start on, often before the first step: two kills in a row
            time.sleep(generator.uniform(0, 3))
            moments.append("anywhere")
        process.kill()
        process.join()
        assert step(killed) >= before  # nothing of what was saved is lost
    assert "ended" not in moments
    assert step(killed) < STEPS
    assert finished(start("killed"))
    assert same(uninterrupted / "checkpoints" / "last.ckpt", checkpoints / "last.ckpt")
    others = [
        read_checkpoint(f / "checkpoints" / "last.ckpt")["callbacks"]["EMA"]["others"] for f in (uninterrupted, killed)
    ]
    assert all((others[0]["0.9"][name] == others[1]["0.9"][name]).all() for name in others[0]["0.9"])
    assert not list(checkpoints.glob(".*"))  # nothing is left of killed saves
