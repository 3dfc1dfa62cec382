"""The scripts as commands: in this process, or as processes where that makes a difference."""

import json
import logging
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock

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
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:], root.level = handlers, level
    logging.getLogger("hydra").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """A real training run of four steps: how it ended, and its folder."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, result = shared / "training", shared / "training.json"
    small = ("network.ch=16", "network.num_groups=4", "trainer.max_steps=4", "trainer.batch_size=16")
    settings = ("experiment=digits", "output_dir=run", "trainer.log_every=2", "grid.every=2", "grid.n=4")
    with FileLock(shared / "training.lock"):  # all test processes share one run
        if not result.exists():
            folder.mkdir()
            outcome = run_process("train", *settings, *small, "grid.sampler.S=2", cwd=folder)
            result.write_text(json.dumps(outcome))
    return Outcome(*json.loads(result.read_text())), folder / "run"


@pytest.fixture(scope="session")
def checkpoint(training: tuple[Outcome, Path]) -> Path:
    outcome, folder = training
    assert outcome.code == 0, outcome.err
    return folder / "checkpoints" / "last.ckpt"
