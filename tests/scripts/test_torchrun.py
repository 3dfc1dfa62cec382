"""Two processes started by torchrun do what one does, stop at the same step, and are resumed by one."""

import contextlib
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
    "ema.posthoc=true",
    "checkpoint=last",
]
ONE = ["trainer.accumulate=2"]  # the same two halves of a batch, one after the other
TWO = ["trainer.strategy=ddp", "trainer.devices=2"]
pytestmark = [pytest.mark.integration, pytest.mark.slow]


def start(folder, *options, count=2, torchrun=True):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if torchrun else []
    command = [
        sys.executable,
        *launcher,
        ROOT / "scripts" / "train.py",
        *OPTIONS,
        *TWO,
        *options,
        f"output_dir={folder}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{folder.parent}"}
    with (folder.parent / f"{folder.name}.log").open("ab") as out:
        return subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, cwd=folder.parent, start_new_session=True
        )


@pytest.fixture
def train_one(run):
    """train_one(folder, option, ...): the same command as one process, which is this one."""

    def train_one(folder, *options):
        outcome = run("train", *OPTIONS, *ONE, *options, f"output_dir={folder}")
        assert (outcome.code, outcome.err) == (0, "")

    return train_one


def difference(one, other):
    """Return the largest difference between the weights and averages of two runs."""
    checkpoints = [read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (one, other)]
    sets = [weight_sets(checkpoint) | checkpoint["posthoc_ema"]["averages"] for checkpoint in checkpoints]
    assert [*sets[0]] == ["online", "ema", "0.05", "0.15"]
    return max(float((sets[0][s][k] - sets[1][s][k]).abs().max()) for s in sets[0] for k in sets[0][s])


def test_two_processes_train_as_one_and_resume_each_other(train_one, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train_one(one, "trainer.max_steps=20")
    assert start(two, "trainer.max_steps=20").wait(240) == 0
    assert difference(one, two) <= 1e-6
    assert start(one, "trainer.max_steps=24").wait(240) == 0  # now the other way round
    train_one(two, "trainer.max_steps=24")
    assert difference(one, two) <= 1e-6
    steps = [read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] for folder in (one, two)]
    assert steps == [24, 24]


@pytest.mark.gpu
def test_all_gpus_train_as_one(train_one, tmp_path, gpu, record_property):
    count = torch.cuda.device_count() if gpu == "cuda" else 2
    options = ["trainer.max_steps=20", f"trainer.accelerator={gpu}"]
    train_one(tmp_path / "one", *options, f"trainer.accumulate={count}")
    assert start(tmp_path / "all", *options, f"trainer.devices={count}", count=count).wait(240) == 0
    apart = difference(tmp_path / "one", tmp_path / "all")
    record_property(f"largest difference of a weight, {count} devices", apart)
    assert apart <= 1e-4


def test_two_processes_stop_at_the_same_step(train_one, tmp_path):
    folder, uninterrupted = tmp_path / "stopped", tmp_path / "uninterrupted"
    process = start(folder, "trainer.max_steps=100000", "trainer.checkpoint_every=10")
    last = folder / "checkpoints" / "last.ckpt"
    end = time.monotonic() + 120
    while not last.exists() and time.monotonic() < end:
        assert process.poll() is None, (tmp_path / "stopped.log").read_text()[-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    assert process.wait(60) != 0
    step = read_checkpoint(last)["global_step"]
    log = (tmp_path / "stopped.log").read_text()
    assert f"stopped at step {step} of 100000 and saved it; go on with checkpoint=last." in log
    train_one(folder, f"trainer.max_steps={step + 5}")
    train_one(uninterrupted, f"trainer.max_steps={step + 5}")
    assert difference(folder, uninterrupted) <= 1e-6


def is_running(group):
    """Return whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


FAIL_OF_ONE = """
import os, time
from ddim.errors import UserError
from ddim.training.module import DiffusionModule

def step(self, batch, batch_idx):
    if self.trainer.global_rank == {rank}:
        time.sleep(2)
        raise UserError("image 7 is damaged.")
    time.sleep(600)  # as in a collective that the other process never joins

DiffusionModule.training_step = step
"""


@pytest.mark.parametrize(("rank", "torchrun"), [(1, True), (0, False)], ids=["torchrun", "by Lightning"])
def test_one_process_that_fails_ends_all_with_its_reason(tmp_path, rank, torchrun):
    (tmp_path / "fail_of_one.py").write_text(FAIL_OF_ONE.replace("{rank}", str(rank)))
    process = start(tmp_path / "run", "trainer.max_steps=20", "plugins=[fail_of_one]", torchrun=torchrun)
    try:
        assert process.wait(120) == (1 if torchrun else 2)
        log = (tmp_path / "run.log").read_text()
        assert (f"process {rank} of 2 failed: image 7 is damaged." if rank else "error: image 7 is damaged.") in log
        end = time.monotonic() + 20
        while (running := is_running(process.pid)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
