"""Sweeps over training settings: one group of W&B runs, each with its settings; and what no sweep can do."""

import csv
import importlib
import math
import os
import re
from types import SimpleNamespace

import pytest
from composed import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf

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
# Of SLURM, in srun --pty bash.
INTERACTIVE = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NAME": "bash"}

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
    [table] = tmp_path.glob("outputs/compare/*/table.md")
    assert outcome.out.count("lr0.001 |") == table.read_text().count("lr0.001 |") == 1
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
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if devices == "2":
        for name, value in INTERACTIVE.items():
            monkeypatch.setenv(name, value)
    outcome = run("train", "-m", "experiment=digits", *SWEEP, "trainer.strategy=ddp", f"trainer.devices={devices}")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"error: a sweep trains each run on one device, and trainer.devices={devices} may be more")
    assert line.endswith(" (2 times)")
    assert not list(tmp_path.glob("outputs/train/*/checkpoints"))


def test_each_debug_run_has_a_folder_of_its_own(run, tmp_path):
    """Hydra resolves ${now:...} a single time for all jobs of a sweep."""
    small = ("experiment=digits", "debug=tiny", *SMALL)
    assert run("train", *small).code == 0
    outcome = run("train", "-m", *small, "optim.lr=0.001,0.002")
    assert (outcome.code, outcome.err) == (0, "")
    folders = [path.parents[1].name for path in tmp_path.glob("outputs/debug/digits/*/checkpoints/last.ckpt")]
    assert sorted(re.sub(r"[\d-]+_[\d-]+", "TIME", name, count=1) for name in folders) == ["TIME", "TIME_0", "TIME_1"]


def test_a_failed_run_does_not_hide_the_others(run, tmp_path):
    outcome = run("train", "-m", "experiment=digits", *SMALL, "optim.lr=-1,0.002", "name=lr${optim.lr}")
    assert outcome.code == 2
    [path] = tmp_path.glob(f"outputs/compare/*_{os.getpid()}/table.csv")  # two sweeps may start in the same second
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["run"], row["optim.lr"], row["steps"], bool(row["loss"])) for row in rows] == [
        ("lr0.002", "0.002", "1", True),
        ("lr-1", "-1", "0", False),
    ]
    again = run("compare", "runs=outputs/train/*", "name=again", "by=train_loss")
    assert again.code == 0, again.err
    assert (tmp_path / "outputs/compare/again/table.csv").read_text() == path.read_text()
    unknown = run("compare", "runs=outputs/train/*", "by=train_los")
    assert (unknown.code, "(did you mean train_loss?)" in unknown.err) == (2, True)
    nothing = run("compare", "runs=outputs/trains/*")
    assert nothing.code == 2
    assert nothing.err.startswith(
        "error: there is no training in outputs/trains/*; give the folders that scripts/train.py"
    )


@pytest.mark.parametrize(
    ("metric", "loss", "value"),
    [(2.5, 0.1, 2.5), (None, 0.1, 0.1), (None, None, None), (math.nan, 0.1, None)],
)
def test_a_job_returns_its_metric_or_its_last_loss(run, monkeypatch, metric, loss, value):
    """Optuna takes no text and no NaN; None is a failed trial."""
    from train import main  # found because of the fixture run

    monkeypatch.setattr("ddim.training.run.train", lambda spec, config: SimpleNamespace(checkpoint="", metric=metric))
    monkeypatch.setattr("ddim.results.compare.last_loss", lambda folder: loss)
    monkeypatch.setattr(HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.RUN))
    monkeypatch.setattr("train.last_words", lambda spec: [])
    config = OmegaConf.to_container(compose("train", "experiment=digits"), resolve=True)
    assert isinstance(config, dict)
    del config["plugins"]
    assert main(config) == value


@pytest.mark.slow
def test_optuna_minimises_and_survives_a_failed_trial(process, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    trials = ("hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=0", "eval.every=0")
    names = ("name=lr${optim.lr}", "optim.lr=choice(-1, 0.001)", "ema.decay=0.9")
    outcome = process("train", "-m", "hparams_search=digits_optuna", *SMALL, *trials, *names, cwd=tmp_path)
    assert (outcome.code, "lr=-1" in outcome.err) == (2, True), outcome.err
    [best] = tmp_path.rglob("optimization_results.yaml")
    [table] = tmp_path.glob("outputs/compare/*/table.csv")
    first, *_ = csv.DictReader(table.read_text().splitlines())
    assert OmegaConf.load(best).best_value == pytest.approx(float(first["loss"]), rel=1e-5)


@pytest.mark.slow
def test_a_search_in_a_storage_goes_on_with_new_trials(process, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    storage = ("hydra.sweeper.n_trials=2", "eval.every=0", "hydra.sweeper.storage=sqlite:///study.db")
    for count in (2, 4):
        outcome = process("train", "-m", "hparams_search=digits_optuna", *SMALL, *storage, cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        assert len(list(tmp_path.glob("outputs/train/*/checkpoints/last.ckpt"))) == count
    wrong = ("optim.lr=choice(-1, -2)", "hydra.sweeper.study_name=wrong")
    outcome = process("train", "-m", "hparams_search=digits_optuna", *SMALL, *storage, *wrong, cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: every trial failed: the study has no best one")


@pytest.mark.parametrize(("storage", "seed"), [("null", 0), ("sqlite:///study.db", None)])
@pytest.mark.parametrize("option", ["digits_optuna", "cifar10_optuna"])
def test_only_a_search_without_storage_repeats_its_draws(run, option, storage, seed):
    """With one, the same command would propose the trials that are in it already."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    importlib.import_module("_cli")  # whose functions the configuration calls; found because of the fixture run
    words = (f"hparams_search={option}", f"hydra.sweeper.storage={storage}")
    sweeper = compose("train", *words, with_hydra=True).hydra.sweeper
    assert (sweeper.sampler.seed, sweeper.study_name) == (seed, option.partition("_")[0])
