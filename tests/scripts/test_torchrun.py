"""Two processes started by torchrun: they do what one does, stop together when told to, and one goes on from there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddim.checkpoints.model import read_checkpoint, weight_sets

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "experiment=digits",
    "network.dropout=0.1",
    "optim.eps=0.001",  # where the gradient is mere rounding, a small eps makes a full step of it
    "trainer.accelerator=cpu",
    "trainer.batch_size=32",
    "trainer.log_every=10",
    "grid.every=0",
    "ckpt_path=last",
]
ONE = ["trainer.accumulate=2"]  # the same two parts of a batch, one after the other
TWO = ["trainer.strategy=ddp", "trainer.devices=2"]
pytestmark = pytest.mark.slow


def start(folder, options, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "scripts" / "train.py"),
        *OPTIONS,
        *options,
        f"output_dir={folder}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder.parent / f"{folder.name}.log").open("ab") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder.parent)


def difference(one, other):
    """Return the largest difference between the weights and averages of two runs."""
    sets = [weight_sets(read_checkpoint(folder / "checkpoints" / "last.ckpt")) for folder in (one, other)]
    return max(float((sets[0][s][k] - sets[1][s][k]).abs().max()) for s in ("raw", "ema") for k in sets[0][s])


def test_two_processes_train_as_one_and_each_goes_on_from_the_other(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(one, [*ONE, "trainer.max_steps=20"], 1).wait(120) == 0
    assert start(two, [*TWO, "trainer.max_steps=20"], 2).wait(120) == 0
    assert difference(one, two) <= 1e-6
    assert start(one, [*TWO, "trainer.max_steps=24"], 2).wait(120) == 0  # now the other way round
    assert start(two, [*ONE, "trainer.max_steps=24"], 1).wait(120) == 0
    assert difference(one, two) <= 1e-6
    assert torch.equal(
        *(torch.tensor(read_checkpoint(f / "checkpoints" / "last.ckpt")["global_step"]) for f in (one, two))
    )


def test_two_processes_that_are_told_to_stop_save_the_same_step(tmp_path):
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    process = start(folder, [*TWO, "trainer.max_steps=100000", "trainer.checkpoint_every=10"], 2)
    last = folder / "checkpoints" / "last.ckpt"
    end = time.monotonic() + 120
    while not last.exists() and time.monotonic() < end:
        assert process.poll() is None, (tmp_path / "stopped.log").read_text()[-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    assert process.wait(60) != 0
    step = read_checkpoint(last)["global_step"]
    log = (tmp_path / "stopped.log").read_text()
    assert f"stopped at step {step} of 100000 and saved it; go on with ckpt_path=last." in log
    assert start(folder, [*ONE, f"trainer.max_steps={step + 5}"], 1).wait(120) == 0
    assert start(whole, [*ONE, f"trainer.max_steps={step + 5}"], 1).wait(120) == 0
    assert difference(folder, whole) <= 1e-6
