"""Shards: exactly the missing images are computed, whatever was stored before."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fill_shards import fill

from ddim.errors import UserError
from ddim.evaluation import shards as module
from ddim.evaluation.shards import Shards
from ddim.inference.batching import map_batches, split
from ddim.io import Tensors, write_safetensors


def squares(batch: range) -> Tensors:
    """A computation whose rows tell which images they are of."""
    return {"squares": torch.tensor(batch) ** 2}


def everything(shards: Shards) -> list[int]:
    return torch.cat([*shards.read("squares")]).tolist()


class Counting:
    """`squares`, and which batches were asked for."""

    def __init__(self) -> None:
        self.batches: list[range] = []

    def __call__(self, batch: range) -> Tensors:
        self.batches.append(batch)
        return squares(batch)


@pytest.mark.parametrize("origin", [0, 3, 100])
@pytest.mark.parametrize("size", [1, 4, 7, 1000])
@pytest.mark.parametrize("indices", [range(100, 123), range(100, 101), range(104, 108)])
def test_split_covers_each_image_once(indices: range, size: int, origin: int) -> None:
    batches = split(indices, size, origin)
    assert [i for batch in batches for i in batch] == [*indices]
    assert all(0 < len(batch) <= size for batch in batches)
    assert all((batch.start - origin) % size == 0 for batch in batches[1:])


def test_rows_are_in_the_order_of_the_images(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "shards", range(10, 33))
    fill(shards, 5, squares)
    assert everything(shards) == [i * i for i in range(10, 33)]
    assert len([*shards.folder.iterdir()]) == 5
    shards.delete()
    assert not shards.folder.exists()


@pytest.mark.parametrize("size", [1, 5, 7, 64])
@pytest.mark.parametrize("lost", [[0], [4], [1, 2], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_only_missing_images_are_computed(tmp_path: Path, lost: list[int], size: int) -> None:
    shards = Shards(tmp_path, range(10, 33))
    fill(shards, 5, squares)
    batches = shards.complete()
    for k in lost:
        shards.path(batches[k]).unlink()
    counting = Counting()
    fill(shards, size, counting)
    asked = [i for batch in counting.batches for i in batch]
    assert asked == [i for k in lost for i in batches[k]]
    assert everything(shards) == [i * i for i in range(10, 33)]
    if size == 5:  # what an interrupted run left is computed in the batches of an uninterrupted one
        assert shards.complete() == batches


def test_shards_survive_a_failure(tmp_path: Path) -> None:
    shards = Shards(tmp_path, range(20))

    def failing(batch: range) -> Tensors:
        if batch.start == 10:
            raise KeyError("defect")
        return squares(batch)

    with pytest.raises(KeyError):
        fill(shards, 5, failing)
    assert shards.complete() == [range(5), range(5, 10)]
    assert shards.missing(5) == [range(10, 15), range(15, 20)]


def test_a_batch_is_written_while_the_next_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = threading.Event()

    def write(*arguments: Any) -> None:
        assert second.wait(20)
        write_safetensors(*arguments)

    def compute(batch: range) -> Tensors:
        if batch.start:
            second.set()
        return {"rows": torch.zeros(len(batch), 1)}

    monkeypatch.setattr(module, "write_safetensors", write)
    shards = Shards(tmp_path / "shards", range(4))
    fill(shards, 2, compute)
    assert not shards.missing(2)


@pytest.mark.parametrize("count", [2, 4])
def test_write_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Also for the last batch, after which nothing is computed."""

    def write(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_safetensors", write)
    with pytest.raises(OSError, match="No space left"):
        fill(Shards(tmp_path / "shards", range(count)), 2, lambda batch: {"rows": torch.zeros(len(batch), 1)})


def test_insufficient_shards_are_discarded(tmp_path: Path) -> None:
    shards = Shards(tmp_path, range(20))
    fill(shards, 5, squares)
    shards.discard_unless(lambda batch, tensors: batch.start != 5 and int(tensors["squares"][0]) == batch.start**2)
    assert shards.missing(100) == [range(5, 10)]


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_shards_are_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    shards = Shards(tmp_path, range(20))
    fill(shards, 5, squares)
    victim = shards.path(range(5, 10))
    content = victim.read_bytes()
    victim.write_bytes({"cut": content[:-1], "empty": b"", "noise": bytes(reversed(content))}[damage])
    assert shards.complete() == [range(5), range(10, 15), range(15, 20)]
    assert not victim.exists()
    counting = Counting()
    fill(shards, 5, counting)
    assert counting.batches == [range(5, 10)]
    assert "computed again" in caplog.text
    assert everything(shards) == [i * i for i in range(20)]


def test_shards_of_other_images_are_ignored(tmp_path: Path) -> None:
    fill(Shards(tmp_path, range(100)), 30, squares)
    shards = Shards(tmp_path, range(10, 95))  # 0..29 begins too early, 90..99 ends too late
    assert shards.complete() == [range(30, 60), range(60, 90)]
    assert shards.missing(50) == [range(10, 30), range(90, 95)]


@pytest.mark.parametrize("looks", [1, 44, 45])
def test_late_files_on_a_network_are_awaited(tmp_path: Path, looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They show when somebody has looked `looks` times; 45 looks are too many."""
    late: list[tuple[Any, ...]] = []
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == looks:
            for arguments in late:
                write_safetensors(*arguments)

    monkeypatch.setattr(module, "write_safetensors", lambda *arguments: late.append(arguments))
    monkeypatch.setattr(module.time, "sleep", sleep)
    shards = Shards(tmp_path / "shards", range(4))
    if looks == 45:
        with pytest.raises(UserError, match="must all see the same output folder"):
            fill(shards, 2, squares)
        assert 80 < sum(slept) < 120
    else:
        fill(shards, 2, squares)
        assert everything(shards) == [0, 1, 4, 9]
        assert len(slept) == looks


def test_batches_start_at_the_first_image(tmp_path: Path) -> None:
    assert Shards(tmp_path, range(3, 15)).missing(5) == [range(3, 8), range(8, 13), range(13, 15)]


def test_no_image_counts_twice(tmp_path: Path) -> None:
    """As if a run with another batch size saw a damaged shard that another process could read later."""
    shards = Shards(tmp_path, range(12))
    for batch in (range(5), range(8), range(3, 8), range(5, 10)):
        write_safetensors(shards.path(batch), squares(batch), {})
    assert shards.complete() == [range(5), range(5, 10)]
    assert everything(shards) == [i * i for i in range(10)]


def exhausted(limit: int, error: Callable[[], Exception]) -> Counting:
    class Device(Counting):
        def __call__(self, batch: range) -> Tensors:
            result = super().__call__(batch)
            if len(batch) > limit:
                raise error()
            return result

    return Device()


ERRORS = {
    "device": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "host": MemoryError,
    "driver": lambda: RuntimeError("CUDA error: out of memory"),
    "library": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    "torch on the host": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ..."),
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_out_of_memory_halves_the_batch_and_goes_on(
    tmp_path: Path, error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    shards, device = Shards(tmp_path, range(50)), exhausted(6, error)
    fill(shards, 20, device)
    assert everything(shards) == [i * i for i in range(50)]
    too_large = [len(batch) for batch in device.batches if len(batch) > 6]
    assert too_large == [20, 10]  # what was learnt holds for the batches after it
    assert "20 images at a time do not fit into memory; going on with 10" in caplog.text


def test_memory_for_no_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not even one image"):
        fill(Shards(tmp_path, range(4)), 4, exhausted(0, MemoryError))


def test_other_errors_are_not_out_of_memory() -> None:
    device = exhausted(1, lambda: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        [*map_batches([range(4)], device)]
    assert device.batches == [range(4)]


def test_lock_refuses_a_second_run(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "shards", range(4))
    with shards.lock(), pytest.raises(UserError, match="another run is computing this evaluation"), shards.lock():
        pass
    with shards.lock():
        fill(shards, 2, squares)
    assert shards.complete() == [range(2), range(2, 4)]  # the lock file is no shard


@pytest.mark.parametrize("deletes", [True, False])
def test_waiting_runs_hold_the_lock_one_at_a_time(tmp_path: Path, deletes: bool) -> None:
    """Also where the other run removed the folder, and with it the file that the waiting ones had opened."""
    inside, most, entered = 0, 0, 0
    counting = threading.Lock()

    def run() -> None:
        nonlocal inside, most, entered
        shards = Shards(tmp_path / "shards", range(4))
        for _ in range(8):
            with shards.lock(wait=True):
                with counting:
                    inside, entered = inside + 1, entered + 1
                    most = max(most, inside)
                fill(shards, 4, squares)
                with counting:
                    inside -= 1
                if deletes:  # the last that a run does
                    shards.delete()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 32)


def test_a_signal_waits_until_the_batch_is_stored(tmp_path: Path) -> None:
    """And the next call computes what is missing."""
    shards, counting = Shards(tmp_path / "s", range(12)), Counting()

    def stop(number: int, _: Any) -> None:
        raise InterruptedError(number)

    def compute(batch: range) -> Tensors:
        if batch.start == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return counting(batch)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(InterruptedError):
            fill(shards, 4, compute)
        assert signal.getsignal(signal.SIGTERM) == stop
    finally:
        signal.signal(signal.SIGTERM, before)
    assert shards.complete() == [range(4), range(4, 8)]
    fill(shards, 4, counting)
    assert counting.batches == [range(4), range(4, 8), range(8, 12)]
