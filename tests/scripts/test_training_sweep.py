"""Sweeps over training settings: one group of W&B runs, each with its settings; and what no sweep can do."""

import pytest
from lightning.pytorch.loggers.logger import DummyLogger

from ddim.checkpoints.model import read_checkpoint

SMALL = (
    "network.ch=16",
    "network.num_groups=4",
    "trainer.accelerator=cpu",
    "trainer.max_steps=1",
    "trainer.batch_size=4",
    "trainer.log_every=1",
    "grid.every=0",
)
SWEEP = (*SMALL, "optim.lr=0.001,0.002", "name=lr${optim.lr}")

pytestmark = pytest.mark.integration


@pytest.fixture
def wandb_runs(monkeypatch):
    """The arguments of each run that W&B is asked for; nothing is written."""
    runs = []
    monkeypatch.setattr(
        "ddim.training.loggers.WandbLogger", lambda **arguments: runs.append(arguments) or DummyLogger()
    )
    return runs


@pytest.mark.parametrize(
    ("arguments", "group"),
    [
        (("experiment=digits",), "digits"),
        (("data=digits", "network=unet_digits"), "digits"),
        (("experiment=digits", "logger.group=mine"), "mine"),
    ],
)
def test_a_sweep_is_one_wandb_group_with_settings(run, wandb_runs, tmp_path, arguments, group):
    outcome = run("train", "-m", *arguments, *SWEEP, "logger=wandb_offline")
    assert (outcome.code, outcome.err) == (0, "")
    one, two = wandb_runs
    assert one["group"] == two["group"] == group
    assert one["job_type"] == two["job_type"] == "train"
    assert [r["config"]["optim"]["lr"] for r in (one, two)] == [0.001, 0.002]
    assert [r["config"]["logger"]["group"] for r in (one, two)] == [group] * 2
    assert [r["name"] for r in (one, two)] == ["lr0.001", "lr0.002"]
    assert one["id"] != two["id"]
    for r in (one, two):
        assert (
            read_checkpoint(tmp_path / "outputs" / "train" / r["name"] / "checkpoints" / "last.ckpt")["ddim"]["recipe"][
                "optim.lr"
            ]
            == r["config"]["optim"]["lr"]
        )


def test_a_run_by_itself_is_in_no_group(run, wandb_runs):
    assert run("train", "experiment=digits", *SMALL, "logger=wandb_offline").code == 0
    assert [r["group"] for r in wandb_runs] == [None]


@pytest.mark.parametrize("devices", ["2", "auto", "[0, 2]"])
def test_a_sweep_over_runs_of_several_processes_is_refused(run, devices, monkeypatch, tmp_path):
    """Lightning would start each further process by the command of the sweep, which would begin again in it."""
    for name in ("LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    outcome = run("train", "-m", "experiment=digits", *SWEEP, "trainer.strategy=ddp", f"trainer.devices={devices}")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"error: a sweep trains each run on one device, and trainer.devices={devices} may be more")
    assert line.endswith(" (2 times)")
    assert not list(tmp_path.glob("outputs/train/*/checkpoints"))
