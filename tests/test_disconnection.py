"""Processes that disagree, or of which one has ended, are told so in one sentence, and none waits for days to join."""

import dataclasses
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import run_in_processes

from ddim import distributed
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import Processes, join_process_group
from ddim.errors import Disconnected, UserError
from ddim.inference.compute import ComputeSpec
from ddim.inference.sample_files import SampleSpec, write_samples
from ddim.signals import StopSignals


def identify(processes: Processes, values: tuple[str, str], sample: SampleSpec) -> list[str]:
    """Compare a text, and sample from the checkpoint that this process finds; return the reasons of refusals."""
    found = dataclasses.replace(sample, checkpoint=values[processes.rank])
    refusals = []
    for call in (lambda: processes.check_same(values[processes.rank]), lambda: write_samples(found, processes)):
        try:
            call()
        except UserError as error:
            refusals.append(str(error))
    return refusals


@pytest.mark.integration
@pytest.mark.parametrize("format", ["grid", "png"])
def test_processes_with_different_weights_are_refused(make_checkpoint: Any, tmp_path: Path, format: Any) -> None:
    paths = tuple(str(make_checkpoint(tmp_path / f"{seed}.ckpt", seed=seed)) for seed in (1, 2))
    sample = SampleSpec("", str(tmp_path / "out"), ComputeSpec("cpu", 2), SamplerSpec(S=2), n=4, format=format)
    for refusals in run_in_processes(identify, paths, sample, to=tmp_path / "results"):
        assert [refusal.partition(":")[0] for refusal in refusals] == ["the processes would not compute the same"] * 2
    assert not list(tmp_path.glob("out/*.png"))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda processes: processes.sum(torch.ones(1)), "all_reduce"),
        (lambda processes: processes.gather(1), "all_gather_object"),
        (lambda processes: processes.broadcast(1), "broadcast_object_list"),
    ],
)
def test_a_process_that_has_ended_is_no_bug_of_this_one(monkeypatch: pytest.MonkeyPatch, call: Any, name: str) -> None:
    def fail(reason: str) -> None:
        def collective(*_: Any, **__: Any) -> None:
            raise RuntimeError(reason)

        monkeypatch.setattr(f"torch.distributed.{name}", collective)

    fail("[pair.cc:551] Connection closed by peer [127.0.0.1]:4242\nmore")
    with pytest.raises(Disconnected, match=r"another process .* has ended, .*4242\); what was finished is kept"):
        call(Processes(0, 2))
    fail("The size of tensor a must match")
    with pytest.raises(RuntimeError, match="must match"):
        call(Processes(0, 2))


def test_joining_takes_minutes_and_work_may_take_days(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, timedelta] = {}
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: "join" in limits)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, timeout, **__: limits.update(join=timeout))
    monkeypatch.setattr("torch.distributed.new_group", lambda *_, timeout, **__: limits.update(work=timeout) or "group")
    monkeypatch.setattr(distributed, "_group", None)
    assert join_process_group() == join_process_group() == Processes(1, 2, 0, "group")  # type: ignore[arg-type]
    assert limits == {"join": timedelta(minutes=20), "work": timedelta(days=7)}


def end_by_signal(error: type[Exception]) -> int:
    signal.raise_signal(signal.SIGTERM)
    raise error("x")


@pytest.mark.parametrize("error", [Disconnected, UserError])
def test_a_signal_that_ended_another_process_ends_this_too(error: type[Exception]) -> None:
    """A process that waits for another learns of a signal when that one has ended by it."""
    delivered: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: delivered.append(number))
    try:
        with pytest.raises(error), StopSignals() as stop:
            stop.received = end_by_signal(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert delivered == [signal.SIGTERM] * (error is Disconnected)
