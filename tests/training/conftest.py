"""Tiny training runs, and what is compared between them."""

import csv
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.errors import UserError
from ddim.training.module import DiffusionModule
from ddim.training.run import train
from ddim.training.spec import TrainSpec

TINY = {
    "data": {"name": "digits", "size": [8, 8], "channels": 1, "flip": True},
    # With PyTorch's initialisation the output depends on everything from the first step; Ho et al.'s starts at zero.
    "network": {
        "image_size": [8, 8],
        "channels": 1,
        "ch": 16,
        "ch_mult": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "num_groups": 4,
        "dropout": 0.0,
        "init": "torch",
    },
    "schedule": {"T": 20},
    "optim": {"lr": 1e-3, "warmup": 3},
    "ema": {"decay": 0.9},
    "trainer": {
        "max_steps": 6,
        "batch_size": 8,
        "accelerator": "cpu",
        "devices": 1,
        "log_every": 1,
        "checkpoint_every": 100,
    },
    "grid": {"every": 0},
    "seed": 5,
}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`, mapping by mapping."""
    return base | {k: merge(base.get(k) or {}, v) if isinstance(v, dict) else v for k, v in changes.items()}


@pytest.fixture(scope="session")
def tiny():
    """tiny(folder, trainer={"max_steps": 9}): the plain values of a tiny run in a folder."""
    return lambda folder, **changes: merge(TINY | {"name": folder.name, "output_dir": str(folder)}, changes)


@pytest.fixture
def config(tiny, tmp_path):
    """config("run", trainer={"max_steps": 9}): the plain values of a tiny run in the folder tmp_path/run."""
    return lambda name="run", **changes: tiny(tmp_path / name, **changes)


@pytest.fixture
def run(config):
    """run("run", trainer={"max_steps": 9}): train, and return the path of the last checkpoint."""

    def run(name: str = "run", **changes: Any) -> Path:
        values = config(name, **changes)
        return train(build(TrainSpec, values, ""), values).checkpoint

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, tiny):
    """The folder of a run at step 2, which no test changes."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    values = tiny(folder, trainer={"max_steps": 2})
    train(build(TrainSpec, values, ""), values)
    return folder


@pytest.fixture
def after_loss(monkeypatch):
    """after_loss(action): call action(step, batch_idx, output) after every training_step."""

    def after_loss(action: Callable[[int, int, dict[str, torch.Tensor]], None]) -> None:
        training_step = DiffusionModule.training_step

        def step(self, batch, batch_idx):
            output = training_step(self, batch, batch_idx)
            action(batch["step"], batch_idx, output)
            return output

        monkeypatch.setattr(DiffusionModule, "training_step", step)

    return after_loss


@pytest.fixture
def scale_loss(after_loss):
    """scale_loss(steps, value): multiply the loss of these steps by a value."""

    def scale_loss(steps, value):
        after_loss(lambda step, _, output: output.update(loss=output["loss"] * (value if step in steps else 1)))

    return scale_loss


@pytest.fixture
def killed_run(run, monkeypatch, after_loss):
    """killed_run(step, micro, ...): run(...), stopped in its micro-batch `micro` of optimiser step `step`."""

    class Killed(Exception):
        pass

    def killed_run(step: int, micro: int, *args: Any, **changes: Any) -> None:
        seen = []

        def die(now, batch_idx, output):
            if now == step:
                seen.append(batch_idx)
                if len(seen) > micro:
                    raise Killed

        training_step = DiffusionModule.training_step
        after_loss(die)
        with pytest.raises(Killed):
            run(*args, **changes)
        monkeypatch.setattr(DiffusionModule, "training_step", training_step)

    return killed_run


@pytest.fixture
def two_processes():
    """The trainer's options for two processes; forking needs a process that has not used CUDA."""
    if torch.cuda.is_initialized() or "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("a process that has used CUDA cannot be forked")
    return {"devices": 2, "strategy": "ddp_fork"}


@pytest.fixture
def logged(tmp_path):
    """logged("run", "train/loss", version=0): one column of metrics.csv, by step from 0."""

    def logged(name: str, column: str, version: int = 0) -> dict[int, float]:
        with (tmp_path / name / "csv" / f"version_{version}" / "metrics.csv").open() as file:
            return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}

    return logged


def state(path: Path) -> dict[str, torch.Tensor]:
    """Return every number of a checkpoint that decides how a training goes on, by name."""
    checkpoint = read_checkpoint(path)
    (optimizer,), (scheduler,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    named = {f"online.{k}": v for k, v in checkpoint["state_dict"].items()}
    if "EMA" in checkpoint["callbacks"]:
        named |= {f"ema.{k}": v for k, v in checkpoint["callbacks"]["EMA"]["shadow"].items()}
    for length, average in checkpoint.get("posthoc_ema", {"averages": {}})["averages"].items():
        named |= {f"posthoc.{length}.{k}": v for k, v in average.items()}
    named |= {f"adam.{i}.{k}": v for i, s in optimizer["state"].items() for k, v in s.items()}
    named["lr"] = torch.tensor([optimizer["param_groups"][0]["lr"], *scheduler["_last_lr"]])
    named["steps"] = torch.tensor([checkpoint["global_step"], scheduler["last_epoch"]])
    return named


@pytest.fixture
def same():
    """same(one, other): two checkpoints agree bitwise; with a tolerance, within it everywhere."""

    def same(one: Path, other: Path, atol: float = 0.0) -> bool:
        a, b = state(one), state(other)
        assert a.keys() == b.keys()
        assert sum(k.startswith("ema.") for k in a) == sum(k.startswith("online.") for k in a) > 50
        return all(torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=atol) for k in a)

    return same


@pytest.fixture
def refused(run, monkeypatch):
    """refused(...): the message of the UserError that a run ends with before it trains; one sentence."""

    def refused(*args, **changes):
        with monkeypatch.context() as patch:
            patch.setattr(DiffusionModule, "training_step", lambda *args: pytest.fail("trained"))
            with pytest.raises(UserError) as caught:
                run(*args, **changes)
        message = str(caught.value)
        assert re.fullmatch(r"[^\n]{20,}[.!]", message), message
        assert not re.search(r"[.!?] +[A-Z]", message), f"more than one sentence: {message}"
        return message

    return refused
