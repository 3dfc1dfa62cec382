"""A dry run says what the run is going to be, and leaves nothing behind."""

import re

import pytest

from ddim.config import build
from ddim.errors import UserError
from ddim.training.run import dry_run
from ddim.training.spec import TrainSpec


@pytest.fixture
def lines(config):
    """lines(...): what a dry run says, by its first word."""

    def lines(*args, **changes):
        said = dry_run(build(TrainSpec, config(*args, **changes), ""), steps=4)
        return {key: text for key, _, text in (line.partition(": ") for line in said)}

    return lines


def test_it_says_what_the_run_will_be(lines, tmp_path):
    said = lines(trainer={"max_steps": 1000, "keep_every": 250}, ema={"decay": [0.9, 0.99]})
    assert said["network"].endswith("images 1x8x8")
    parameters = int(re.search(r"([\d,]+) parameters", said["network"])[1].replace(",", ""))
    assert said["data"] == "digits, 1,797 images; 1,000 steps of 8 are 4.5 epochs"
    assert said["devices"] == "1 x cpu, 1 x 8 images each in a step; 32-true"
    assert "over 4 steps" in said["pace"]
    # weights, two moments, two averages; the two newest, the fourth parts, and one that is being written
    assert said["disk"].startswith(f"{20 * parameters / 2**20:,.0f} MiB a checkpoint, 7 at most")
    assert 0.1 < float(said["memory"].split()[0]) < 20
    assert not (tmp_path / "run").exists()


def test_time_is_pace_times_what_is_left(lines, run):
    run(trainer={"max_steps": 6})
    said = lines(trainer={"max_steps": 100_006}, ckpt_path="last")
    assert said["time"].endswith("for 100,000 steps from step 6 on, grids not counted")
    pace = float(said["pace"].split()[0])
    hours, minutes, seconds = map(int, said["time"].split()[0].split(":"))
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(100_000 * pace, rel=0.01)


def test_it_refuses_what_the_run_would_refuse(lines, run):
    run(trainer={"max_steps": 2})
    with pytest.raises(UserError, match="already holds a run at step 2"):
        lines(trainer={"max_steps": 4})
    with pytest.raises(UserError, match=r"images of .* the data has"):
        lines("other", network={"channels": 3})
