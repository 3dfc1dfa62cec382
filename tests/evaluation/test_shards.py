"""A computation over numbered images: what is missing is computed, once, whatever was there before."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.errors import UserError
from ddim.evaluation import shards as module
from ddim.evaluation.shards import Parts
from ddim.inference.batching import in_batches, split
from ddim.io import Tensors, write_safetensors


def squares(batch: range) -> Tensors:
    """A computation whose rows tell which images they are of."""
    return {"squares": torch.tensor(batch) ** 2}


def everything(parts: Parts) -> list[int]:
    return torch.cat([*parts.read("squares")]).tolist()


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
def test_splitting_covers_each_image_once_and_cuts_at_multiples(indices: range, size: int, origin: int) -> None:
    batches = split(indices, size, origin)
    assert [i for batch in batches for i in batch] == [*indices]
    assert all(0 < len(batch) <= size for batch in batches)
    assert all((batch.start - origin) % size == 0 for batch in batches[1:])


def test_parts_hold_the_rows_in_the_order_of_the_images(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "cell", range(10, 33))
    parts.fill(5, squares)
    assert everything(parts) == [i * i for i in range(10, 33)]
    assert len([*parts.folder.iterdir()]) == 5
    parts.delete()
    assert not parts.folder.exists()


@pytest.mark.parametrize("size", [1, 5, 7, 64])
@pytest.mark.parametrize("lost", [[0], [4], [1, 2], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_only_what_is_missing_is_computed(tmp_path: Path, lost: list[int], size: int) -> None:
    parts = Parts(tmp_path, range(10, 33))
    parts.fill(5, squares)
    batches = parts.done()
    for k in lost:
        parts.path(batches[k]).unlink()
    counting = Counting()
    told: list[int] = []
    parts.fill(size, counting, started=told.append)
    asked = [i for batch in counting.batches for i in batch]
    assert asked == [i for k in lost for i in batches[k]]
    assert told == [len(asked)]
    assert everything(parts) == [i * i for i in range(10, 33)]
    if size == 5:  # what an interrupted run left is computed in the batches of an uninterrupted one
        assert parts.done() == batches


def test_a_failure_keeps_what_was_done(tmp_path: Path) -> None:
    parts = Parts(tmp_path, range(20))

    def failing(batch: range) -> Tensors:
        if batch.start == 10:
            raise KeyError("defect")
        return squares(batch)

    with pytest.raises(KeyError):
        parts.fill(5, failing)
    assert parts.done() == [range(5), range(5, 10)]
    assert parts.missing(5) == [range(10, 15), range(15, 20)]


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
    parts = Parts(tmp_path / "parts", range(4))
    parts.fill(2, compute)
    assert not parts.missing(2)


@pytest.mark.parametrize("count", [2, 4])
def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Also of the last batch, after which nothing is computed."""

    def write(path: Path, *_: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module, "write_safetensors", write)
    with pytest.raises(OSError, match="No space left"):
        Parts(tmp_path / "parts", range(count)).fill(2, lambda batch: {"rows": torch.zeros(len(batch), 1)})


def test_a_part_that_does_not_hold_what_is_required_is_computed_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path, range(20))
    parts.fill(5, squares)
    parts.require(lambda batch, tensors: batch.start != 5 and int(tensors["squares"][0]) == batch.start**2)
    assert parts.missing(100) == [range(5, 10)]


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_part_is_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts(tmp_path, range(20))
    parts.fill(5, squares)
    victim = parts.path(range(5, 10))
    content = victim.read_bytes()
    victim.write_bytes({"cut": content[:-1], "empty": b"", "noise": bytes(reversed(content))}[damage])
    assert parts.done() == [range(5), range(10, 15), range(15, 20)]
    assert not victim.exists()
    counting = Counting()
    parts.fill(5, counting)
    assert counting.batches == [range(5, 10)]
    assert "computed again" in caplog.text
    assert everything(parts) == [i * i for i in range(20)]


def test_parts_of_other_images_do_not_count(tmp_path: Path) -> None:
    Parts(tmp_path, range(100)).fill(30, squares)
    parts = Parts(tmp_path, range(10, 95))  # 0..29 begins too early, 90..99 ends too late
    assert parts.done() == [range(30, 60), range(60, 90)]
    assert parts.missing(50) == [range(10, 30), range(90, 95)]


@pytest.mark.parametrize("looks", [1, 44, 45])
def test_files_of_a_folder_on_the_network_are_waited_for(
    tmp_path: Path, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    parts = Parts(tmp_path / "cell", range(4))
    if looks == 45:
        with pytest.raises(UserError, match="must all see the same output folder"):
            parts.fill(2, squares)
        assert 80 < sum(slept) < 120
    else:
        parts.fill(2, squares)
        assert everything(parts) == [0, 1, 4, 9]
        assert len(slept) == looks


def test_batches_are_counted_from_the_first_image_on(tmp_path: Path) -> None:
    assert Parts(tmp_path, range(3, 15)).missing(5) == [range(3, 8), range(8, 13), range(13, 15)]


def test_no_image_counts_twice(tmp_path: Path) -> None:
    """As where a run with another batch size found a part damaged that another process then could read."""
    parts = Parts(tmp_path, range(12))
    for batch in (range(5), range(8), range(3, 8), range(5, 10)):
        write_safetensors(parts.path(batch), squares(batch), {})
    assert parts.done() == [range(5), range(5, 10)]
    assert everything(parts) == [i * i for i in range(10)]


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
    parts, device = Parts(tmp_path, range(50)), exhausted(6, error)
    parts.fill(20, device)
    assert everything(parts) == [i * i for i in range(50)]
    too_large = [len(batch) for batch in device.batches if len(batch) > 6]
    assert too_large == [20, 10]  # what was learnt holds for the batches after it
    assert "20 images at a time do not fit into memory; going on with 10" in caplog.text


def test_a_device_without_room_for_one_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not even one image"):
        Parts(tmp_path, range(4)).fill(4, exhausted(0, MemoryError))


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    device = exhausted(1, lambda: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        [*in_batches([range(4)], device)]
    assert device.batches == [range(4)]


def test_parts_of_another_run_are_refused_until_it_ends(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "cell", range(4))
    with parts.alone(), pytest.raises(UserError, match="another run is computing this cell"), parts.alone():
        pass
    with parts.alone():
        parts.fill(2, squares)
    assert parts.done() == [range(2), range(2, 4)]  # the lock is no part


@pytest.mark.parametrize("deletes", [True, False])
def test_whoever_waits_is_alone_after_the_other_run(tmp_path: Path, deletes: bool) -> None:
    """Also where the other run removed the folder, and with it the file that the waiting ones had opened."""
    inside, most, entered = 0, 0, 0
    counting = threading.Lock()

    def run() -> None:
        nonlocal inside, most, entered
        parts = Parts(tmp_path / "cell", range(4))
        for _ in range(30):
            with parts.alone(wait=True):
                with counting:
                    inside, entered = inside + 1, entered + 1
                    most = max(most, inside)
                parts.fill(4, squares)
                with counting:
                    inside -= 1
                if deletes:  # the last that a run does
                    parts.delete()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, entered) == (1, 120)
