"""Signals to running commands: what was computed is saved, one line says how to go on, and never a traceback."""

import contextlib
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number", "times", "codes"),
    [(os.kill, signal.SIGTERM, 1, {75}), (os.killpg, signal.SIGINT, 2, {130, 75})],  # 75: all saved before the second
    ids=["saved", "killed"],
)
def test_a_signal_ends_the_processes_of_a_sweep(tmp_path, send, number, times, codes):
    """Two train, and the third setting waits for its turn. A terminal sends Ctrl-C to all processes."""
    loky = pytest.importorskip("joblib.externals.loky.process_executor")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    assert callable(loky._ExecutorManagerThread.terminate_broken)  # which _start.py replaces
    sweep = (
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "optim.lr=0.001,0.002,0.003",
        "name=lr${optim.lr}",
    )
    settings = [word for word in SMALL if not word.startswith(("output_dir", "trainer.checkpoint_every"))]
    process = subprocess.Popen(
        [sys.executable, TRAIN, *sweep, *settings, "trainer.accelerator=cpu", "trainer.log_every=1", "eval.every=0"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("outputs/train/*/csv/*/metrics.csv"))) < 2 and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.05)
        for _ in range(times):
            send(process.pid, number)
            time.sleep(0.1)
        _, err = process.communicate(timeout=120)
        left = processes_of(process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode in codes
    assert left == []
    assert re.fullmatch(r"stopped by (SIGTERM|Ctrl-C); what was finished is kept: .* with checkpoint=last\.\n", err)
    assert times > 1 or len(list(tmp_path.glob("outputs/train/*/checkpoints/last.ckpt"))) >= 2


@pytest.mark.parametrize(
    ("failure", "status"),
    [("raise RuntimeError", 75), ("os.kill(os.getpid(), signal.SIGINT)", 130)],
    ids=["a failure of joblib", "a second Ctrl-C, and no such process"],
)
def test_the_line_comes_though_ending_the_jobs_fails(failure, status):
    """A terminal's Ctrl-C reaches the jobs too: one may have ended, and joblib's thread may have waited for it."""
    program = f"""
import os, signal
import _start
class Job:
    pid = os.getpid()
    def join(self):
        pass
Job.__module__ = "joblib.any"
def sleep(_):
    Job.pid = 2**22 + 1  # larger than the number of any process
    {failure}
_start.time.sleep = sleep
_start.multiprocessing.active_children = lambda: [Job()]  # listed for ever, where joblib's thread has waited for it
signal.signal(signal.SIGINT, _start.stop_at_once)
os.kill(os.getpid(), signal.SIGINT)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=TRAIN.parent, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == status
    assert re.fullmatch(r"stopped by Ctrl-C; what was finished is kept: .* with checkpoint=last\.\n", ended.stderr)


def processes_of(group):
    """Return the commands of a group that still run; of joblib's processes those of jobs; others clean up."""
    listed = subprocess.run(["ps", "-eo", "pgid,stat,args"], capture_output=True, text=True).stdout.splitlines()[1:]
    rows = [line.split(None, 2) for line in listed]
    running = [args for pgid, stat, args in rows if int(pgid) == group and stat[0] != "Z"]
    return [args for args in running if "train.py" in args or "popen_loky" in args]


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
            other.setenv("SLURM_STEP_NUM_TASKS", "2" if name == "SLURM_PROCID" else "1")
            outcome = run("train", "experiment=digits", f"name={name}")
        assert (outcome.code, outcome.err, "next:" in outcome.out) == (code, "", False)
