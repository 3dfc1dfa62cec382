"""Several processes do what one does: no image twice, none left out, the same numbers, and failures are shared."""

import dataclasses
import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from fill_shards import fill
from two_processes import run_in_processes

from ddim.distributed import NUMBERS, SINGLE_PROCESS, Processes, join_process_group
from ddim.errors import UserError
from ddim.evaluation.feature_stats import moments
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.metrics import MetricSpec
from ddim.evaluation.session import Session
from ddim.evaluation.shards import Shards
from ddim.figures.paper_figures import FigureSpec, PictureSpec, write_figures
from ddim.inference import generate as generate_module
from ddim.inference import trajectories
from ddim.inference.batching import share
from ddim.inference.sample_files import SampleSpec, write_samples
from ddim.io import Tensors, read_safetensors


def rows(batch: range) -> torch.Tensor:
    return torch.stack([torch.tensor([i, i * i % 7, 1.0]) for i in batch])


def cooperate(processes: Processes, folder: Path, total: int) -> dict[str, Any]:
    """Fill shards, compute their moments, and fail in one process."""
    asked: list[int] = []

    def compute(batch: range) -> Tensors:
        asked.extend(batch)
        return {"rows": rows(batch)}

    shards = Shards(folder, range(total))
    fill(shards, 4, compute, processes)
    count, mean, covariance = moments(shards.read("rows", processes), processes=processes)
    failures = []
    for failing in range(processes.world_size):
        try:
            with processes.barrier():
                if processes.rank == failing:
                    raise KeyError("broken")
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    return {
        "asked": asked,
        "moments": (count, mean, covariance),
        "failures": failures,
        "shared": processes.broadcast(f"from {processes.rank}"),
        "gathered": processes.gather(processes.rank),
        "device": processes.local_device("cpu"),
    }


@pytest.mark.integration
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    x = rows(range(23)).double()
    results = run_in_processes(cooperate, tmp_path / "shards", 23, to=tmp_path / "results")
    asked = [set(result["asked"]) for result in results]
    assert all(asked)
    assert not asked[0] & asked[1]
    assert asked[0] | asked[1] == set(range(23))
    for result in results:
        count, mean, covariance = result["moments"]
        assert count == 23
        torch.testing.assert_close(mean, x.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(covariance, torch.cov(x.T), rtol=1e-12, atol=1e-12)
        assert (result["shared"], result["gathered"], result["device"]) == ("from 0", [0, 1], "cpu")
    assert results[0]["failures"] == ["KeyError: 'broken'", "PeerFailed: process 1 of 2 failed (KeyError: 'broken')."]
    assert results[1]["failures"] == ["PeerFailed: process 0 of 2 failed (KeyError: 'broken').", "KeyError: 'broken'"]


@pytest.mark.integration
def test_more_processes_than_shards(tmp_path: Path) -> None:
    one, other = run_in_processes(cooperate, tmp_path / "shards", 3, to=tmp_path / "results")
    assert (one["asked"], other["asked"]) == ([0, 1, 2], [])
    assert torch.equal(other["moments"][1], rows(range(3)).double().mean(0))


def evaluate_with(processes: Processes, spec: EvaluateSpec) -> tuple[Any, bool]:
    return evaluate(spec, Session(processes))


@pytest.mark.integration
def test_two_processes_give_the_record_of_one(spec: EvaluateSpec, tmp_path: Path) -> None:
    """All metrics, which need the features of all images in the first process."""
    spec = dataclasses.replace(
        spec,
        metric=MetricSpec("digits_classifier", ("fd", "kd", "is", "prc"), kid_subset_size=20),
        compute=dataclasses.replace(spec.compute, batch_size=7),
        n=60,
        grid=20,
    )
    expected, _ = evaluate(spec)
    two = dataclasses.replace(spec, output_dir=str(tmp_path / "two"), reference_dir=str(tmp_path / "reference_two"))
    results = run_in_processes(evaluate_with, two, to=tmp_path / "results")
    assert results[0] == results[1]
    record, new = results[0]
    assert new
    assert record["key"] == expected["key"]
    assert record["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
    assert (record["compute"]["processes"], expected["compute"]["processes"]) == (2, 1)
    [line] = (tmp_path / "two" / "records.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == expected["key"]
    grids = [(Path(s.output_dir) / r["grid"]).read_bytes() for s, r in ((spec, expected), (two, record))]
    assert grids[0] == grids[1]
    assert not (Path(two.output_dir) / "unfinished" / expected["key"]).exists()


def evaluate_twice(processes: Processes, spec: EvaluateSpec) -> list[str]:
    """An evaluation that fails in the first process only, between two collectives; then one that succeeds in all."""
    outcomes = []
    for attempt in (spec, dataclasses.replace(spec, output_dir=f"{spec.output_dir}_again")):
        try:
            outcomes.append(str(list(evaluate(attempt, Session(processes))[0]["metrics"])))
        except UserError as error:
            outcomes.append(str(error))
    return outcomes


@pytest.mark.integration
def test_damaged_records_fail_in_all_processes(spec: EvaluateSpec, tmp_path: Path) -> None:
    """Only the first process reads them; the other must not take the answer of the next evaluation for this one's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records.jsonl").write_text("damaged\n")
    first, second = run_in_processes(evaluate_twice, spec, to=tmp_path / "results")
    assert "records.jsonl, line 1, is damaged" in first[0]
    assert second[0].startswith("process 0 of 2 failed (UserError: ")
    assert first[1] == second[1] == "['fd_digits_classifier_20']"


def write_pictures(processes: Processes, spec: EvaluateSpec, to: Path) -> tuple[list[int], list[int]]:
    """Write samples in all formats and a figure; return the image numbers that this process computed, by kind."""
    given = {"checkpoint": spec.checkpoint, "compute": dataclasses.replace(spec.compute, batch_size=3)}
    numbers: tuple[list[int], list[int]] = ([], [])
    with pytest.MonkeyPatch.context() as patch:
        for seen, module in zip(numbers, (generate_module, trajectories), strict=True):
            real = module.sample_steps

            def sample_steps(*arguments: Any, real: Any = real, seen: list[int] = seen) -> Any:
                seen.extend(arguments[3])
                return real(*arguments)

            patch.setattr(module, "sample_steps", sample_steps)
        for kind in ("grid", "png", "gif"):
            write_samples(
                SampleSpec(output_dir=str(to / kind), sampler=spec.sampler, n=11, format=kind, **given), processes
            )
        write_figures(
            FigureSpec(PictureSpec("samples"), name="a", output_dir=str(to / "figure"), S=(3,), etas=(1.0,), **given),
            processes,
        )
    return numbers


def written(folder: Path) -> dict[str, Any]:
    """Return the content of each file; of tensors as lists, since their file has its entries in any order."""
    files: dict[str, Any] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for name in [name for name in files if name.endswith(".safetensors")]:
        tensors, metadata = read_safetensors(folder / name)
        files[name] = {key: value.tolist() for key, value in tensors.items()}, metadata
    return files


@pytest.mark.integration
def test_two_processes_write_the_pictures_of_one(spec: EvaluateSpec, tmp_path: Path) -> None:
    """To the last byte; each process computes about half of them."""
    one, two = tmp_path / "one", tmp_path / "two"
    all_images = write_pictures(SINGLE_PROCESS, spec, one)
    shares = run_in_processes(write_pictures, spec, two, to=tmp_path / "results")
    assert written(one) == written(two)
    assert len(written(one)) == 1 + 11 + 1 + 2
    for kind in (0, 1):
        assert sorted(shares[0][kind] + shares[1][kind]) == sorted(all_images[kind])
        assert min(len(shares[rank][kind]) for rank in (0, 1)) >= len(all_images[kind]) // 3


def refuse_pictures(processes: Processes, spec: EvaluateSpec, to: Path) -> str:
    (to / "grid.png").touch()
    given = {"checkpoint": spec.checkpoint, "compute": spec.compute}
    with pytest.raises(UserError) as refused:
        write_samples(SampleSpec(output_dir=str(to), **given), processes)
    return str(refused.value)


@pytest.mark.integration
def test_pictures_are_refused_in_all_processes(spec: EvaluateSpec, tmp_path: Path) -> None:
    first, second = run_in_processes(refuse_pictures, spec, tmp_path, to=tmp_path / "results")
    assert re.search(r"grid.png exists already; choose", first)
    assert second.startswith("process 0 of 2 failed (UserError: ")


def test_a_process_without_a_batch_is_told_the_batch_size(caplog: pytest.LogCaptureFixture) -> None:
    batches = [range(0, 5), range(5, 10)]
    assert [share(batches, Processes(rank, 4)) for rank in range(4)] == [[batches[0]], [batches[1]], [], []]
    [record] = caplog.records
    assert record.getMessage() == (
        "only 2 of 4 processes have a batch to compute; compute.batch_size=2 shares the images out."
    )
    share(batches, Processes(0, 2))
    share(batches, SINGLE_PROCESS)
    assert len(caplog.records) == 1


def call_on_main(processes: Processes) -> tuple[int, int]:
    calls: list[int] = []
    answer = processes.run_on_main(lambda: calls.append(processes.rank) or processes.rank + 5)
    return answer, len(calls)


@pytest.mark.integration
def test_only_the_first_process_runs_the_call(tmp_path: Path) -> None:
    assert run_in_processes(call_on_main, to=tmp_path / "results") == [(5, 1), (5, 0)]
    assert call_on_main(SINGLE_PROCESS) == (5, 1)


def test_a_single_process_needs_no_group() -> None:
    assert SINGLE_PROCESS.broadcast("a") == "a"
    assert SINGLE_PROCESS.gather("a") == ["a"]
    assert SINGLE_PROCESS.local_device("cuda") == "cuda"
    with pytest.raises(KeyError), SINGLE_PROCESS.barrier():
        raise KeyError


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the script of a job, not a step of it
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
    ],
)
def test_these_environments_are_a_single_process(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert join_process_group() == SINGLE_PROCESS


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        *(({name: value}, f"{name}={value!r} must be an integer") for name in NUMBERS for value in ("abc", "-1", "")),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK='1.5' must be an integer, at least 0; unset it"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be less than WORLD_SIZE=2; unset it"),
        ({"RANK": "1"}, "RANK=1 must be less than WORLD_SIZE=unset; unset it"),
        ({"WORLD_SIZE": "0"}, "RANK=0 must be less than WORLD_SIZE=0; unset it"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 must lie in 1 .. 65535"),
        ({"SLURM_PROCID": "9" * 30}, f"SLURM_PROCID='{'9' * 30}' must be an integer"),
    ],
    ids=str,
)
def test_launch_variables_that_make_no_sense_are_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^the environment variable {re.escape(message)}"):
        join_process_group()


def test_slurm_tasks_connect_at_the_first_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_NTASKS": "16",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_JOB_NAME": "sweep",
        "SLURM_JOB_ID": "4012345",
        "SLURM_NODELIST": "gpu[07-08]",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }
    monkeypatch.delenv("RANK", raising=False)
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    group: dict[str, Any] = {}
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda backend, **how: group.update(how, backend=backend)
    )
    monkeypatch.setattr("torch.distributed.new_group", lambda backend, timeout: (backend, timeout))
    # Others wait while one measures statistics; gloo's own limit is 30 minutes.
    assert join_process_group() == Processes(9, 16, 1, ("gloo", timedelta(days=7)))  # type: ignore[arg-type]
    assert (group["backend"], group["rank"], group["world_size"]) == ("gloo", 9, 16)
    assert group["init_method"].startswith("tcp://gpu07:")
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match="--ntasks-per-node"):
        join_process_group()


def test_a_failed_connection_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such host\nand a stack")

    monkeypatch.setattr("torch.distributed.init_process_group", refuse)
    with pytest.raises(UserError, match=r"process 1 of 2 cannot reach the others .*no such host.*torchrun"):
        join_process_group()


def test_each_process_takes_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Four:
        @staticmethod
        def device_count() -> int:
            return 4

    monkeypatch.setattr(torch, "get_device_module", lambda _: Four)
    assert [Processes(r, 8, r).local_device("cuda") for r in (0, 3, 4)] == ["cuda:0", "cuda:3", "cuda:0"]
    assert Processes(9, 16, 1).local_device("cuda") == "cuda:1"  # of the second machine
    assert Processes(1, 8, 1).local_device("cuda:2") == "cuda:2"
