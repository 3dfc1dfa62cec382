"""A dry run reports what the run will be, and writes nothing."""

import re
import runpy
import signal
import sys
from pathlib import Path

import pytest

import ddim
from ddim.config import build
from ddim.errors import UserError
from ddim.training.dry_run import dry_run
from ddim.training.spec import TrainSpec

pytestmark = pytest.mark.integration


@pytest.fixture
def report(config):
    """report(...): the lines of a dry run by their first word."""

    def report(*args, **changes):
        lines = dry_run(build(TrainSpec, config(*args, **changes), ""), steps=4)
        return {key: text for key, _, text in (line.partition(": ") for line in lines)}

    return report


def test_report_describes_the_run_and_writes_nothing(report, tmp_path):
    lines = report(trainer={"max_steps": 1000, "keep_every": 250}, ema={"decay": [0.9, 0.99], "posthoc": True})
    assert lines["network"].endswith("images 1x8x8")
    parameters = int(re.search(r"([\d,]+) parameters", lines["network"])[1].replace(",", ""))
    assert lines["data"] == "digits, 1,797 images; 1,000 steps of 8 are 4.5 epochs"
    assert lines["devices"] == "1 x cpu, 1 x 8 images each in a step; 32-true"
    assert "over 4 steps" in lines["throughput"]
    # weights, two moments, two averages, two for post-hoc EMA; the two newest, every 250 steps, one being written
    assert lines["disk"].startswith(f"{28 * parameters / 2**20:,.0f} MiB a checkpoint, 7 at most")
    assert lines["disk"].endswith(f"; 25 snapshots: {25 * 8 * parameters / 2**30:,.2f} GiB")
    assert 0.1 < float(lines["memory"].split()[0]) < 20
    validating = report(trainer={"max_steps": 1000, "keep_best": 2}, eval={"every": 2, "n": 0, "heldout": 8})
    assert "5 at most" in validating["disk"]  # the two newest, the two best, one being written
    assert not (tmp_path / "run").exists()


def test_a_run_may_be_shorter_than_its_dry_run(report):
    lines = report(trainer={"max_steps": 2})
    assert "over 4 steps" in lines["throughput"]
    assert lines["time"].endswith("for 2 steps, grids not counted")


def test_time_is_seconds_per_step_times_steps_left(report, run):
    run(trainer={"max_steps": 6})
    lines = report(trainer={"max_steps": 100_006}, checkpoint="last")
    assert lines["time"].endswith("for 100,000 steps from step 6 on, grids not counted")
    seconds_per_step = float(lines["throughput"].split()[0])
    hours, minutes, seconds = map(int, lines["time"].split()[0].split(":"))
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(100_000 * seconds_per_step, rel=0.01)


def test_time_includes_the_validations(report, run, tmp_path):
    """Each of a number of seconds that follows from its network evaluations."""
    measure = {"every": 1000, "n": 64, "heldout": 0, "metric": {"extractor": "pixels"}, "sampler": {"S": 10}}
    lines = report(trainer={"max_steps": 10_500}, eval=measure)
    each = float(re.search(r"for 10,500 steps and 10 validations of ([\d.e-]+) s, grids not counted", lines["time"])[1])
    hours, minutes, seconds = map(int, lines["time"].split()[0].split(":"))
    steps = 10_500 * float(lines["throughput"].split()[0])
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(steps + 10 * each, rel=0.05)
    assert 0.001 < each < 5
    assert not (tmp_path / "run").exists()


def test_dry_run_refuses_what_the_run_would_refuse(report, run):
    run(trainer={"max_steps": 2})
    with pytest.raises(UserError, match="already holds a run at step 2"):
        report(trainer={"max_steps": 4})
    with pytest.raises(UserError, match=r"images of .* the data has"):
        report("other", network={"channels": 3})


ROOMS = [path for room in ("training", "data") for path in Path(ddim.__file__).with_name(room).glob("*.py")]


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_module_needs_nothing_that_windows_lacks(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(signal, "SIGUSR1")
    runpy.run_path(str(path))
