"""The batch files and the launcher, with stand-ins for SLURM's commands: what is run, and when the job is requeued."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {path.name: path.read_text() for path in (ROOT / "scripts" / "slurm").glob("*.sbatch")}
SLURM = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_ID": "77",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "6",
}
SRUN = "srun --wait={} --cpus-per-task=6"  # srun does not take the CPUs from the job
WAIT = {"train.sbatch": 600, "sweep.sbatch": 1750}  # seconds that a process may need after the signal


@pytest.fixture
def submit(tmp_path):
    """submit(file, *arguments, status=0, **environment): (exit status, calls of srun and scontrol, output)."""

    def submit(file, *arguments, status=0, **environment):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        for name in ("srun", "scontrol"):
            stand_in = tmp_path / name
            seen = f'echo {name} "$@" >> {calls}\necho "$WANDB_FINISH_TIMEOUT" > {tmp_path}/timeout\n'
            stand_in.write_text(f"#!/bin/sh\n{seen}exit {status if name == 'srun' else 0}\n")
            stand_in.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        command = ["bash", ROOT / "scripts" / "slurm" / file, *arguments]
        done = subprocess.run(
            command, env=os.environ | SLURM | {"PATH": path} | environment, capture_output=True, text=True
        )
        return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stdout + done.stderr

    return submit


def test_training_uses_the_nodes_of_slurm_and_resumes(submit):
    status, calls, _ = submit("train.sbatch", "experiment=celeba", "name=a b")
    assert (status, len(calls)) == (0, 1)
    assert calls[0].startswith(
        f"{SRUN.format(600)} python scripts/train.py trainer=ddp trainer.num_nodes=2 trainer.devices=8 "
    )
    assert calls[0].endswith(" checkpoint=last experiment=celeba name=a b")


@pytest.mark.parametrize(
    ("environment", "words", "seconds"),
    [
        ({}, ["logger=wandb"], "120"),
        ({"WANDB_FINISH_TIMEOUT": "30"}, [], "30"),
        ({}, ["logger=wandb", "logger.log_model=best"], ""),
    ],
)
def test_an_upload_of_wandb_ends_before_the_time_limit(submit, tmp_path, environment, words, seconds):
    submit("train.sbatch", "experiment=celeba", *words, **environment)
    assert (tmp_path / "timeout").read_text().strip() == seconds


@pytest.mark.parametrize(
    ("status", "expected", "requeued"), [(0, 0, False), (75, 0, True), (2, 2, False), (1, 1, False)]
)
@pytest.mark.parametrize("file", FILES)
def test_only_a_stopped_run_is_requeued(submit, file, status, expected, requeued):
    ended, calls, _ = submit(file, "experiment=celeba", status=status, SLURM_ARRAY_TASK_ID="0")
    assert ended == expected
    assert calls[1:] == (["scontrol requeue 77"] if requeued else [])


def test_each_evaluation_is_one_job_of_the_array(submit):
    evaluations = set()
    for job in range(20):
        status, calls, _ = submit(
            "sweep.sbatch", "experiment=table1_cifar10", "checkpoint=x", SLURM_ARRAY_TASK_ID=str(job)
        )
        assert status == 0
        assert calls[0].startswith(f"{SRUN.format(1750)} python scripts/evaluate.py ")
        words = calls[0].split()[1:]
        assert words[6:] == ["compute.device=cuda", "experiment=table1_cifar10", "checkpoint=x"]
        evaluations.add((words[4], words[5]))
    samplers = ("ddim", "ddim_eta02", "ddim_eta05", "ddpm", "sigma_hat_clamped")
    assert evaluations == {(f"sampler={a}", f"sampler.S={S}") for a in samplers for S in (10, 20, 50, 100)}


def test_other_samplers_and_a_too_long_array(submit):
    chosen = {"SAMPLERS": "ddim ddpm", "STEPS": "10 20"}
    _, calls, _ = submit("sweep.sbatch", "checkpoint=x", SLURM_ARRAY_TASK_ID="3", **chosen)
    assert calls[0].split()[5:7] == ["sampler=ddpm", "sampler.S=20"]
    status, calls, output = submit("sweep.sbatch", "checkpoint=x", SLURM_ARRAY_TASK_ID="4", **chosen)
    assert (status, calls) == (2, [])
    assert "there are 4 evaluations, so the array is 0-3" in output


@pytest.mark.parametrize("file", FILES)
def test_python_may_be_several_words(submit, file):
    words = "apptainer exec --nv ddim.sif python"
    _, calls, _ = submit(file, "checkpoint=x", SLURM_ARRAY_TASK_ID="0", PYTHON=words)
    assert calls[0].startswith(f"{SRUN.format(WAIT[file])} {words} scripts/")


@pytest.mark.parametrize("file", FILES)
def test_a_batch_file_asks_for_what_a_job_needs(file):
    subprocess.run(["bash", "-n", ROOT / "scripts" / "slurm" / file], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", FILES[file], flags=re.MULTILINE))
    seconds = {"train.sbatch": 300, "sweep.sbatch": 1800}[file]  # a batch of S=1000 steps takes minutes
    assert options["signal"] == f"USR1@{seconds}"  # without "B:" it goes to srun's processes, not to the shell
    assert {"requeue", "open-mode"} <= options.keys()
    assert (options["gpus-per-node"], options["ntasks-per-node"], options["cpus-per-task"]) == ("1", "1", "8")
    assert re.fullmatch(r"(12|24):00:00", options["time"])
    folder = Path(options["output"]).parent  # SLURM does not make it: git keeps it, and nothing else in it
    ignored = [
        subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", folder / name]) for name in (".gitkeep", "x.log")
    ]
    assert (ROOT / folder / ".gitkeep").is_file()
    assert [done.returncode for done in ignored] == [1, 0]


@pytest.mark.integration
def test_the_launcher_asks_for_a_gpu_and_requeues(run, tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    for name, text in (("srun", ""), ("sbatch", f'cp "$1" {tmp_path}/job.sh\nexit 1\n')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sweep = ("-m", "experiment=digits", "checkpoint=last", "optim.lr=0.001,0.002,0.003", "name=lr${optim.lr}")
    outcome = run("train", *sweep, "hydra/launcher=slurm_gpu", "hydra.launcher.partition=gpu")
    assert outcome.code != 0  # of sbatch
    text = (tmp_path / "job.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    expected = {"array": "0-2%3", "partition": "gpu", "gpus-per-node": "1", "cpus-per-task": "8", "time": "1440"}
    assert options.items() >= (expected | {"signal": "USR1@1800", "requeue": "", "open-mode": "append"}).items()
    assert re.search(r"^export SUBMITIT_PREEMPT_SIGNAL=USR1$", text, flags=re.MULTILINE)
    assert re.search(r"^export SRUN_CPUS_PER_TASK=\$SLURM_CPUS_PER_TASK$", text, flags=re.MULTILINE)


def test_a_stopped_run_lets_submitit_requeue_its_job(monkeypatch):
    """submitit requeues a job in the handler of its signal, which a training had replaced while it saved."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from _cli import Failures

    from ddim.errors import Interrupted

    def interrupted():
        raise Interrupted("stopped")

    received = []
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    failures = Failures(wants_traceback=False)
    failures.process = -1  # of the command, not of the job
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        for executor, expected in (("local", []), ("slurm", [signal.SIGUSR1])):
            monkeypatch.setenv("SUBMITIT_EXECUTOR", executor)
            with pytest.raises(Interrupted):
                failures.guard(interrupted, str)
            assert received == expected
    finally:
        signal.signal(signal.SIGUSR1, before)
