"""The scripts as commands: in this process, or as processes where that makes a difference."""

import json
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

from ddim.signals import STOP_SIGNALS

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def run_process(script: str, *arguments: str, cwd: Path) -> Outcome:
    """Run a script as a process of its own, in a folder that is not the checkout."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def process() -> Run:
    return run_process


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Run a script in this process, in an empty folder, and leave no trace of Hydra's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPTS)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    signals = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def call(script: str, *arguments: str, full_error: str = "0") -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{script}.py"), *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", full_error)  # the scripts set it; afterwards it is what it was
        code = 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    yield call
    for number, handler in signals.items():  # which the first import of a script replaces
        signal.signal(number, handler)
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level
    logging.getLogger("hydra").setLevel(logging.NOTSET)


def run_for_all(factory: pytest.TempPathFactory, name: str, script: str, *arguments: str) -> tuple[Outcome, Path]:
    """Run a script with output_dir=NAME, a single time for all test processes: how it ended, and its folder."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    result = shared / f"{name}.json"
    with FileLock(shared / f"{name}.lock"):
        if not result.exists():
            result.write_text(json.dumps(run_process(script, *arguments, f"output_dir={name}", cwd=shared)))
    return Outcome(*json.loads(result.read_text())), shared / name


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A training run of four steps."""
    small = ("network.ch=16", "network.num_groups=4", "trainer.max_steps=4", "trainer.batch_size=16")
    settings = ("experiment=digits", "trainer.log_every=2", "grid.every=2", "grid.n=4", "grid.sampler.S=2")
    return run_for_all(tmp_path_factory, "training", "train", *settings, *small)


@pytest.fixture(scope="session")
def checkpoint(training: tuple[Outcome, Path]) -> Path:
    outcome, folder = training
    assert outcome.code == 0, outcome.err
    return folder / "checkpoints" / "last.ckpt"


SWEEP = (
    *("-m", "data=digits", "metric=digits_classifier", "compute.device=cpu", "compute.batch_size=7"),
    *("n=120", "grid=9", "sampler=ddim,ddpm", "sampler.S=4,10"),
)


@pytest.fixture(scope="session")
def sweep_arguments(checkpoint: Path) -> tuple[str, ...]:
    return (*SWEEP, f"checkpoint={checkpoint}")


@pytest.fixture(scope="session")
def sweep(sweep_arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A sweep of four evaluations without a disturbance."""
    return run_for_all(tmp_path_factory, "sweep", "evaluate", *sweep_arguments)
