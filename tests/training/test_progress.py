"""The progress report: lines of the log, metrics, and a bar on terminals."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import tqdm.std

from ddim.training import progress
from ddim.training.progress import Progress

pytestmark = pytest.mark.integration


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def resumed(monkeypatch):
    """resumed(steps, stream): what a training shows that is resumed at step 100 of 990, half a second a step."""

    def resumed(steps, stream, **changes):
        now = [1000.0]
        monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
        monkeypatch.setattr(sys, "stderr", stream)
        options = {"global_step": 100, "max_steps": 990, "is_global_zero": True, "accumulate_grad_batches": 2}
        trainer = SimpleNamespace(**options | changes)
        callback = Progress(batch_size=8, every=1000)
        callback.on_train_start(trainer, None)
        for batch_idx in range(200, 200 + 2 * steps):
            now[0] += 0.25
            trainer.global_step = (batch_idx + 1) // 2
            callback.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.125)}, None, batch_idx)
        callback.on_train_end(trainer, None)
        return [text.strip() for text in re.split(r"[\r\n]+", stream.getvalue()) if text.strip()]

    return resumed


def test_a_resumed_bar_counts_all_steps_and_times_its_own(resumed):
    """440 seconds for the 880 steps that are left after ten."""
    first, *_, last = resumed(10, Terminal())
    assert re.fullmatch(r"training: +10%\|.*\| 100/990 steps \[00:00<\?\]", first)
    assert re.fullmatch(r"training: +11%\|.*\| 110/990 steps \[00:05<07:20, loss 0\.2500, 16 images/s\]", last)


@pytest.mark.parametrize(("stream", "main"), [(io.StringIO, True), (Terminal, False)])
def test_a_bar_shows_on_terminals_and_rank_0_only(resumed, stream, main):
    assert resumed(10, stream(), is_global_zero=main) == []


def test_throughput_and_time_left_follow_the_clock(monkeypatch, caplog):
    """Ten steps of 8 images in 5 seconds, from step 100 on; 880 steps to go; loss in two micro-batches of one half."""
    clock = iter([1000.0, 1005.0, 1007.5])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    logged = []
    module = SimpleNamespace(log_dict=logged.append)
    trainer = SimpleNamespace(global_step=100, max_steps=990, is_global_zero=True, accumulate_grad_batches=2)
    callback = Progress(batch_size=8, every=10)
    callback.on_train_start(trainer, module)
    with caplog.at_level(logging.INFO, logger="ddim"):
        for batch_idx in range(200, 240):
            trainer.global_step = (batch_idx + 1) // 2
            callback.on_train_batch_end(trainer, module, {"loss": torch.tensor(0.125)}, None, batch_idx)
    assert logged == [
        {"train/images_per_second": pytest.approx(16.0), "train/hours_left": pytest.approx(440 / 3600)},
        {"train/images_per_second": pytest.approx(32.0), "train/hours_left": pytest.approx(870 / 4 / 3600)},
    ]
    assert [r.getMessage() for r in caplog.records] == [
        "step 110 of 990, loss 0.2500, 2.0 steps/s, 16 images/s, 0:07:20 left",
        "step 120 of 990, loss 0.2500, 4.0 steps/s, 32 images/s, 0:03:38 left",
    ]


def test_run_reports_throughput_in_log_and_metrics(run, logged, caplog):
    with caplog.at_level(logging.INFO, logger="ddim"):
        run(trainer={"max_steps": 6, "log_every": 2})
    lines = [m for r in caplog.records if (m := r.getMessage()).startswith("step ")]
    form = re.compile(r"step (\d) of 6, loss \d\.\d{4}, .* images/s, 0:00:\d\d left")
    assert [form.fullmatch(m)[1] for m in lines] == ["2", "4", "6"]
    throughput, hours = (logged("run", f"train/{name}") for name in ("images_per_second", "hours_left"))
    assert list(throughput) == [1, 3, 5]
    assert min(throughput.values()) > 1
    assert hours[1] > hours[5] == 0
