"""Several processes of one command: which is the first, what the others print, and what they must not start."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}

pytestmark = pytest.mark.integration


@pytest.fixture
def launched(monkeypatch):
    """launched(variables): the environment that a launcher gives to a process."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)

    def launched(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("variables", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 3),
        ({"RANK": "4", "WORLD_SIZE": "4"}, 0),  # refused: its reason is shown
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}, 3),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "LOCAL_RANK": "1"}, 1),  # Lightning's, in the script of a job
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "LOCAL_RANK": "1"}, 1),  # and below srun --pty bash
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "x"}, 0),
    ],
)
def test_the_rank_is_that_of_the_launcher(launched, monkeypatch, variables, rank):
    monkeypatch.syspath_prepend(SCRIPTS)
    import _start

    launched(variables)
    assert _start.rank() == rank


def test_a_process_that_fails_alone_says_so(run, launched, monkeypatch):
    """As one on a node without the data; the first process waits for it and can only say that it has gone."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    launched(TORCHRUN)
    outcome = run("train", "data=folder", "data.root=missing", "data.size=[32,32]", "trainer=ddp")
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("error: process 1: ")
    assert "missing" in line
    assert waited == [5]  # so that torchrun can end it, where the first has said the same
    # Once they are connected, the first one tells the reason of another.
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert run("train", "data=folder", "data.root=missing", "data.size=[32,32]", "trainer=ddp") == (2, "", "")


def test_several_processes_run_no_search_each(run, launched, tmp_path):
    """Each would train settings of its own, in a training that they share."""
    launched(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"})
    outcome = run("train", "-m", "experiment=digits", "hydra.sweeper._target_=plugin.OptunaSweeper")
    assert outcome.code == 2
    assert outcome.err.startswith(
        "error: 2 processes were started, and each would choose settings of its own (OptunaSweeper)"
    )
    assert "hydra/launcher=box hydra.sweeper.n_jobs=2" in outcome.err
    assert not list(tmp_path.glob("outputs/train/*/checkpoints"))
