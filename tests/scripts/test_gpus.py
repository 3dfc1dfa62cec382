"""hydra/launcher=box: which GPUs there are, and that each process has its own."""

import multiprocessing
import runpy
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

gpus: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "_gpus.py")))
FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("5,7", ["5", "7"]),
        (" 0, 2 ", ["0", "2"]),
        ("GPU-1a,MIG-2", ["GPU-1a", "MIG-2"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["1"]),
    ],
)
def test_gpus_are_those_that_cuda_may_see(monkeypatch: pytest.MonkeyPatch, named: str, expected: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus.visible_gpus() == expected
    assert gpus.jobs_side_by_side() == (len(expected) or -1)


def test_without_the_variable_all_gpus_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert gpus.visible_gpus() == ["0", "1", "2"]
    assert gpus.jobs_side_by_side() == 3


def hold(here: Connection) -> None:
    """Take a GPU, twice as two jobs of one process do, and keep it until asked to end."""
    here.send((gpus.own_gpu(), gpus.own_gpu()))
    here.recv()


def start() -> tuple[str, Any, Connection]:
    """Start such a process; return its GPU, the process and the connection that ends it."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(there,))
    process.start()
    first, second = here.recv()
    assert first == second
    return first, process, here


def test_each_process_has_its_own_gpu_until_it_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    running = {}
    for _ in range(2):
        gpu, *process = start()
        running[gpu] = process
    assert running.keys() == {"5", "7"}
    shared, process, connection = start()  # more processes than GPUs
    assert shared == "5"
    running["7"][1].send(None)
    running["7"][0].join()
    again, *running["7"] = start()
    assert again == "7"
    for ended, end in (*running.values(), (process, connection)):
        end.send(None)
        ended.join()


def test_without_a_gpu_nothing_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert gpus.own_gpu() == ""
    gpus.own_gpu.cache_clear()
    assert list(tmp_path.iterdir()) == []
