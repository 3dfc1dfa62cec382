"""Sweeps over training hyperparameters in other processes; a job that fails is reported, with the same exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddim.checkpoints.model import read_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = [
    "experiment=digits",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.log_every=1",
    "grid.every=0",
]

pytestmark = pytest.mark.integration


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "package"), [("box", "joblib_launcher"), ("submitit_local", "submitit_launcher")])
def test_each_job_of_a_sweep_trains_in_a_process_of_its_own(tmp_path, launcher, package):
    """Of a box each with its own GPU; here there are none, but two names."""
    pytest.importorskip(f"hydra_plugins.hydra_{package}")
    command = [sys.executable, ROOT / "scripts" / "train.py", "-m", f"hydra/launcher={launcher}", *SMALL]
    box = launcher == "box"
    good = ("0.001", "0.002") if box else ("0.001",)
    name = "name=lr${optim.lr}" + "_${oc.env:CUDA_VISIBLE_DEVICES}" * box  # known to the job
    sweep = [*command, f"optim.lr={','.join(good)},-1", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "5,7", "TMPDIR": str(tmp_path)}
    done = subprocess.run(sweep, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "lr=-1" in next(line for line in done.stderr.splitlines() if line.startswith("error:"))
    paths = list((tmp_path / "outputs" / "train").glob("*/checkpoints/last.ckpt"))
    assert sorted(str(read_checkpoint(path)["ddim"]["recipe"]["optim.lr"]) for path in paths) == [*good]
    if box:
        assert sorted(path.parents[1].name.partition("_")[2] for path in paths) == ["5", "7"]
        return
    [table] = tmp_path.glob("outputs/compare/*/table.csv")  # in the main process, also of those that failed
    names = [line.partition(",")[0] for line in table.read_text().splitlines()[1:]]
    assert sorted(names) == sorted(f"lr{lr}" for lr in (*good, -1))


def test_a_job_that_dies_is_reported_in_one_line(monkeypatch):
    """Of submitit's jobs, which it then no longer waits for: a table of the runs has to be made again."""
    error = pytest.importorskip("submitit.core.utils").UncompletedJobError
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from _messages import explain_hydra

    for rest in ("Error stream produced:\n---\nKilled", "No error stream produced. Look at stdout: x"):
        text = f"Job 7_1 with path x.pkl\nhas not produced any output (state: OUT_OF_MEMORY)\n{rest}"
        assert explain_hydra(error(text), "train") == (
            "Job 7_1 with path x.pkl has not produced any output (state: OUT_OF_MEMORY); the other jobs go on: "
            "when they have ended, compare trainings by scripts/compare.py, and give a command of evaluations again."
        )
