"""Sweeps over training hyperparameters in other processes; a job that fails is reported, with the same exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddim.checkpoints.model import read_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = ["experiment=digits", "trainer.max_steps=2", "trainer.log_every=1", "grid.every=0", "name=lr${optim.lr}"]

pytestmark = pytest.mark.integration


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib", "joblib_launcher"), ("submitit_local", "submitit_launcher")]
)
def test_each_job_of_a_sweep_trains_in_a_process_of_its_own(tmp_path, launcher, package):
    pytest.importorskip(f"hydra_plugins.hydra_{package}")
    command = [sys.executable, ROOT / "scripts" / "train.py", "-m", f"hydra/launcher={launcher}", *SMALL]
    sweep = [*command, "optim.lr=0.001,-1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(sweep, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "lr=-1" in next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    rates = {}
    for folder in (tmp_path / "outputs" / "train").glob("lr*"):
        if (folder / "checkpoints").exists():
            rates[folder.name] = read_checkpoint(folder / "checkpoints" / "last.ckpt")["ddim"]["recipe"]["optim.lr"]
    assert rates == {"lr0.001": 0.001}
    [table] = tmp_path.glob("outputs/compare/*/table.csv")  # in the main process, also of those that failed
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["run", "lr0.001", "lr-1"]
