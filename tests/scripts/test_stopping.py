"""Signals to running commands: what was computed is saved, one line says how to go on, and never a traceback."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddim.checkpoints.model import read_checkpoint
from ddim.errors import Interrupted
from ddim.training.checkpoints import newest_intact

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
SMALL = (
    *("experiment=digits", "network.ch=16", "network.num_groups=4", "grid.every=0"),
    *("trainer.batch_size=16", "trainer.max_steps=100000", "trainer.checkpoint_every=20", "output_dir=run"),
)

pytestmark = pytest.mark.integration


def stop(folder: Path, *signals: int) -> tuple[int, list[str]]:
    """Train until there is a new checkpoint, then send the signals; return the exit status and the lines of stderr."""
    last = folder / "run" / "checkpoints" / "last.ckpt"
    before = last.stat().st_ino if last.exists() else None
    process = subprocess.Popen(
        [sys.executable, TRAIN, *SMALL, "checkpoint=last"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in the background
    )
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if last.exists() and last.stat().st_ino != before:
            break
        time.sleep(0.01)
    for number in signals:
        process.send_signal(number)
        time.sleep(0.02)
    _, err = process.communicate(timeout=120)
    return process.returncode, err.splitlines()


@pytest.mark.slow
def test_training_saves_at_a_signal_and_goes_on(tmp_path):
    code, [line] = stop(tmp_path, signal.SIGTERM, signal.SIGINT)
    assert code == 75
    step = int(re.fullmatch(r"stopped at step (\d+) of 100000 and saved it; go on with checkpoint=last\.", line)[1])
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == step
    code, lines = stop(tmp_path, *3 * [signal.SIGINT])
    assert code in (75, 130)  # a fast machine has saved before the second
    assert all(line.startswith("stopped ") for line in lines)
    assert newest_intact(tmp_path / "run" / "checkpoints")[1]["global_step"] > step


def test_only_the_first_process_prints_and_logs(run, monkeypatch):
    def dry_run(spec):
        logging.getLogger("ddim.any").info("chosen")
        return ["network: unet"]

    monkeypatch.setattr("ddim.training.dry_run.dry_run", dry_run)
    shown = {}
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("WORLD_SIZE", "2")
        shown[number] = run("train", "experiment=digits", "dry_run=true")
    assert [line.partition("[INFO] - ")[2] or line for line in shown["0"].out.splitlines()] == [
        "chosen",
        "network: unet",
    ]
    assert shown["1"] == (0, "", "")


def test_a_signal_ends_a_sweep_and_not_one_run(run, monkeypatch):
    started = []

    def train(spec, config):
        started.append(spec.seed)
        raise Interrupted("stopped at step 1 of 2 and saved it; go on with checkpoint=last.")

    monkeypatch.setattr("ddim.training.run.train", train)
    outcome = run("train", "-m", "experiment=digits", "seed=1,2", "name=n${seed}")
    assert (outcome.code, started) == (75, [1])
    assert outcome.err == "stopped at step 1 of 2 and saved it; go on with checkpoint=last.\n"
    following = "next: python scripts/train.py -m experiment=digits seed=1,2 'name=n${seed}' checkpoint=last"
    assert outcome.out.splitlines()[-1] == following
    # Of torchrun, SLURM and Lightning's own processes, whose main process is killed if they end with another status.
    for name, code in (("RANK", 75), ("SLURM_PROCID", 75), ("LOCAL_RANK", 0)):
        with monkeypatch.context() as other:
            other.setenv(name, "1")
            other.setenv("WORLD_SIZE", "2")
            outcome = run("train", "experiment=digits", f"name={name}")
        assert (outcome.code, outcome.err, "next:" in outcome.out) == (code, "", False)
