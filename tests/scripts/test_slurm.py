"""The batch files, with stand-ins for SLURM's commands: what they run, and when the job is requeued."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLURM = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}


@pytest.fixture
def submit(tmp_path):
    """submit(file, *arguments, status=0, **environment): (exit status, calls of srun and scontrol, output)."""

    def submit(file, *arguments, status=0, **environment):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        for name in ("srun", "scontrol"):
            stand_in = tmp_path / name
            stand_in.write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\nexit {status if name == "srun" else 0}\n')
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
    assert calls[0].startswith("srun python scripts/train.py trainer=ddp trainer.num_nodes=2 trainer.devices=8 ")
    assert calls[0].endswith(" checkpoint=last experiment=celeba name=a b")


@pytest.mark.parametrize(
    ("status", "expected", "requeued"), [(0, 0, False), (75, 0, True), (2, 2, False), (1, 1, False)]
)
def test_only_a_stopped_run_is_requeued(submit, status, expected, requeued):
    ended, calls, _ = submit("train.sbatch", "experiment=celeba", status=status)
    assert ended == expected
    assert calls[1:] == (["scontrol requeue 77"] if requeued else [])


def test_each_evaluation_is_one_job_of_the_array(submit):
    evaluations = set()
    for job in range(20):
        status, calls, _ = submit(
            "sweep.sbatch", "experiment=table1_cifar10", "checkpoint=x", SLURM_ARRAY_TASK_ID=str(job)
        )
        assert status == 0
        words = calls[0].split()
        assert words[:3] == ["srun", "python", "scripts/evaluate.py"]
        assert words[5:] == ["compute=gpu", "experiment=table1_cifar10", "checkpoint=x"]
        evaluations.add((words[3], words[4]))
    samplers = ("ddim", "ddim_eta02", "ddim_eta05", "ddpm", "sigma_hat_clamped")
    assert evaluations == {(f"sampler={a}", f"sampler.S={S}") for a in samplers for S in (10, 20, 50, 100)}


def test_other_samplers_and_a_too_long_array(submit):
    chosen = {"SAMPLERS": "ddim ddpm", "STEPS": "10 20"}
    _, calls, _ = submit("sweep.sbatch", "checkpoint=x", SLURM_ARRAY_TASK_ID="3", **chosen)
    assert calls[0].split()[3:5] == ["sampler=ddpm", "sampler.S=20"]
    status, calls, output = submit("sweep.sbatch", "checkpoint=x", SLURM_ARRAY_TASK_ID="4", **chosen)
    assert (status, calls) == (2, [])
    assert "there are 4 evaluations, so the array is 0-3" in output


def test_the_signal_leaves_time_to_save_and_reaches_python():
    text = (ROOT / "scripts" / "slurm" / "train.sbatch").read_text()
    assert "#SBATCH --signal=USR1@300" in text  # without "B:" it goes to srun's processes, not to the shell
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --open-mode=append" in text
