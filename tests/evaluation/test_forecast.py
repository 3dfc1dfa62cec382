"""The manifest of a sweep, which several processes write to, and the forecast of its time."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fill_shards import fill
from two_processes import run_in_processes

from ddim.diffusion.guidance import GuidanceSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import Processes
from ddim.evaluation import sweep
from ddim.evaluation.dry_run import dry_run
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.job import Job
from ddim.evaluation.metrics import MetricSpec
from ddim.evaluation.reconstruction import ReconstructSpec
from ddim.evaluation.session import Session
from ddim.evaluation.sweep import MANIFEST, NOT_DECISIVE, Manifest, Remaining, Timing, job_id, outline, survey
from ddim.inference.auto import flops
from ddim.inference.compute import ComputeSpec
from ddim.results.records import record_key
from ddim.results.wandb import LoggerSpec

pytestmark = pytest.mark.integration


@pytest.fixture
def spec(spec: EvaluateSpec) -> EvaluateSpec:
    return dataclasses.replace(spec, sampler=SamplerSpec(S=3))


@pytest.fixture
def timed_jobs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A network evaluation takes 2 s and an extraction 30 s; the jobs that were timed."""
    timed: list[Path] = []

    def time_job(job: Job) -> Timing:
        timed.append(job.output_dir)
        return Timing(2.0, 30.0)

    monkeypatch.setattr(sweep, "time_job", time_job)
    return timed


def forecast(specs: list[EvaluateSpec], session: Session) -> list[str]:
    return sweep.forecast(*survey(specs, session), session.processes.world_size)


def with_steps(spec: EvaluateSpec, *steps: int) -> list[EvaluateSpec]:
    return [dataclasses.replace(spec, sampler=dataclasses.replace(spec.sampler, S=S)) for S in steps]


def states(folder: Path) -> list[tuple[str, str]]:
    content = json.loads((folder / MANIFEST).read_text())
    return [(job["title"], job["state"]) for job in content["cells"].values()]


def test_a_plan_keeps_the_jobs_of_earlier_sweeps(spec: EvaluateSpec, tmp_path: Path) -> None:
    two, three, four = with_steps(spec, 2, 3, 4)
    manifest = Manifest(tmp_path / "made" / "sweep")
    assert manifest.read() == {"command": None, "cells": {}}
    manifest.plan("first", [two, three])
    manifest.note(two, "done")
    manifest.plan("second", [three, four])
    assert states(tmp_path / "made" / "sweep") == [
        (two.title, "done"),
        (three.title, "planned"),
        (four.title, "planned"),
    ]
    assert manifest.read()["command"] == "second"


def test_a_single_job_has_no_manifest(spec: EvaluateSpec, tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.note(spec, "running")
    assert manifest.failures() == []
    assert [*tmp_path.iterdir()] == []


def test_a_failure_stays_until_the_job_is_retried(spec: EvaluateSpec, tmp_path: Path) -> None:
    two, three = with_steps(spec, 2, 3)
    manifest = Manifest(tmp_path)
    manifest.plan("command", [two, three])
    manifest.note(two, "failed", "no memory")
    manifest.note(three, "failed", "η is odd")
    assert manifest.failures() == [(two.title, "no memory"), (three.title, "η is odd")]
    smaller = dataclasses.replace(two, compute=ComputeSpec("cpu", batch_size=1), grid=3, logger=LoggerSpec(wandb=True))
    manifest.note(smaller, "done")  # the same job, continued with other settings
    assert manifest.failures() == [(three.title, "η is odd")]
    manifest.plan("command", [three])
    assert manifest.failures() == []


def test_job_ids_depend_on_what_decides_a_number(spec: EvaluateSpec) -> None:
    changes = [
        {"n": 21},
        {"seed": 1},
        {"first": 20},
        {"sampler": SamplerSpec(S=4)},
        {"compute": dataclasses.replace(spec.compute, bf16=True)},
        {"metric": MetricSpec("pixels")},
        {"metric": dataclasses.replace(spec.metric, bf16=True)},
        {"checkpoint": "another.ckpt"},
        {"label": "all"},
        {"guidance": GuidanceSpec(1.0)},
        {"data": dataclasses.replace(spec.data, labels="classes")},
    ]
    assert len({job_id(dataclasses.replace(spec, **change)) for change in [{}, *changes]}) == 12  # type: ignore[arg-type]


def test_job_ids_of_before_an_option_stay(spec: EvaluateSpec) -> None:
    values = dataclasses.asdict(spec) | {"compute": spec.compute.bf16}
    del values["data"]["convert"], values["data"]["labels"], values["metric"]["bf16"]
    del values["label"], values["guidance"]
    assert job_id(spec) == record_key({key: value for key, value in values.items() if key not in NOT_DECISIVE})
    data = dataclasses.replace(spec.data, name="folder")
    jobs = [dataclasses.replace(spec, data=dataclasses.replace(data, convert=on)) for on in (False, True)]
    assert job_id(jobs[0]) != job_id(jobs[1])


@pytest.mark.parametrize(
    ("n", "batch_size", "processes", "waiting", "even"),
    [
        (50_000, 250, 8, None, None),
        (50_000, 500, 8, 4, 250),
        (50_000, 1000, 8, 11, 625),
        (50_000, 500, 1, None, None),
        (1009, 300, 4, 16, 253),
        (24, 250, 8, 99, 3),
    ],
)
def test_a_plan_says_how_long_processes_wait(
    n: int, batch_size: int, processes: int, waiting: int | None, even: int | None
) -> None:
    """For others that have one more batch; with the size that it names they do not."""
    work = [Remaining(n, n, steps, "cpu", Timing(1.0, 0.0), batch_size) for steps in (10, 1000)]
    lines = sweep.forecast(work, [], processes)
    if waiting is None:
        assert len(lines) == 2
    else:
        assert lines[2].startswith(f"{waiting}% of the time processes wait for the last batches")
        assert f"compute.batch_size={even} " in lines[2]
        assert len(sweep.forecast([job._replace(batch_size=even) for job in work], [], processes)) == 2


def test_concurrent_notes_are_all_kept(spec: EvaluateSpec, tmp_path: Path) -> None:
    specs = [dataclasses.replace(spec, seed=seed) for seed in range(40)]
    Manifest(tmp_path).plan("command", specs)

    def note(mine: list[EvaluateSpec]) -> None:
        for one in mine:
            Manifest(tmp_path).note(one, "running")
            Manifest(tmp_path).note(one, "failed", f"seed {one.seed}")

    threads = [threading.Thread(target=note, args=[specs[k::4]]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Manifest(tmp_path).failures() == [(one.title, f"seed {one.seed}") for one in specs]


def note_in_a_process(processes: Processes, specs: list[EvaluateSpec], folder: Path) -> None:
    for one in specs[processes.rank :: processes.world_size]:
        Manifest(folder).note(one, f"of {processes.rank}")


def test_notes_of_two_processes_are_all_kept(spec: EvaluateSpec, tmp_path: Path) -> None:
    specs = [dataclasses.replace(spec, seed=seed) for seed in range(60)]
    Manifest(tmp_path / "sweep").plan("command", specs)
    run_in_processes(note_in_a_process, specs, tmp_path / "sweep", to=tmp_path / "results")
    assert [state for _, state in states(tmp_path / "sweep")] == ["of 0", "of 1"] * 30


def test_a_forecast_counts_and_multiplies(spec: EvaluateSpec, timed_jobs: list[Path]) -> None:
    lines = forecast(with_steps(spec, 2, 3), Session())
    assert lines[0] == "2 jobs, 100 network evaluations of one image"
    seconds = 20 * (2 * 2 + 30) + 20 * (3 * 2 + 30)
    assert lines[1].startswith(f"expected: 0:{seconds // 60:02d}:{seconds % 60:02d} on 1 x ")
    assert lines[1].endswith(", at 0 evaluations/s each (88% for features at 2 steps)")
    assert len(lines) == 2
    assert len(timed_jobs) == 1  # they have the same model
    assert not Path(spec.output_dir).exists()
    [_, shared, _] = forecast(with_steps(spec, 2, 3), Session(Processes(0, 4, 0)))  # which wait, with 3 batches
    assert shared.startswith("expected: 0:05:50 on 4 x ")


def test_forecast_leaves_out_what_is_done(spec: EvaluateSpec, timed_jobs: list[Path]) -> None:
    two, three, four = with_steps(spec, 2, 3, 4)
    evaluate(two)
    begun = three.prepare(Session())
    fill(begun.shards, 5, lambda batch: {"x": torch.zeros(len(batch))})
    begun.shards.path(range(10, 15)).unlink()
    lines = forecast([two, three, four], Session())
    assert lines[:2] == [
        "3 jobs, 180 network evaluations of one image",
        "done: 1 job, and 1 in part; 95 network evaluations are left",
    ]
    seconds = 5 * (3 * 2 + 30) + 20 * (4 * 2 + 30)
    assert lines[2].startswith(f"expected: 0:{seconds // 60}:{seconds % 60:02d} on 1 x ")
    assert lines[2].endswith("(83% for features at 3 steps)")  # of the first job that is left
    timed_jobs.clear()
    assert forecast([two], Session()) == [
        "1 job, 40 network evaluations of one image",
        "done: 1 job, and 0 in part; 0 network evaluations are left",
    ]
    assert timed_jobs == []


def test_repeats_are_jobs(spec: EvaluateSpec, timed_jobs: list[Path]) -> None:
    assert (
        forecast([dataclasses.replace(spec, repeats=3)], Session())[0] == "3 jobs, 180 network evaluations of one image"
    )


def test_each_compute_setting_is_timed(spec: EvaluateSpec, timed_jobs: list[Path]) -> None:
    online, small = (
        dataclasses.replace(spec, weights="online"),
        dataclasses.replace(spec, compute=ComputeSpec("cpu", 1)),
    )
    forecast([spec, online, small, spec, online], Session())
    assert len(timed_jobs) == 3


def test_one_model_is_in_memory_at_a_time(
    spec: EvaluateSpec, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep over checkpoints must not have all of them on the device before it begins."""
    import gc
    import weakref

    held: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []

    def time_job(job: Job) -> Timing:
        held.append(weakref.ref(job.model.network))
        gc.collect()
        alive.append(sum(reference() is not None for reference in held))
        return Timing(1.0, 0.0)

    monkeypatch.setattr(sweep, "time_job", time_job)
    paths = [make_checkpoint(tmp_path / f"{k}.ckpt", seed=k) for k in range(4)]
    forecast([dataclasses.replace(spec, checkpoint=str(path)) for path in paths], Session())
    assert len(alive) == 4
    assert max(alive) == 1


def test_impossible_jobs_are_named(spec: EvaluateSpec, timed_jobs: list[Path]) -> None:
    two, much = with_steps(spec, 2, 51)
    lines = forecast([much, two], Session())
    assert lines[0] == "1 job, 40 network evaluations of one image"
    assert lines[1].startswith(f"not possible: {much.title}: sampler: S=51 steps cannot be chosen")
    assert forecast([much], Session()) == forecast([], Session()) == []


def test_a_dry_run_counts_operations_and_bytes(spec: EvaluateSpec, timed_jobs: list[Path]) -> None:
    two, much = with_steps(dataclasses.replace(spec, save_images=True, repeats=2), 2, 51)
    lines = dry_run([much, two], Session())
    assert lines[:3] == forecast([much, two], Session())
    job = two.prepare(Session())
    operations = 2 * 20 * 2 * flops(job.model.network, job.model.spec.image_shape)
    assert lines[3].startswith(f"operations: {operations:.2g} of the network, 0:00:00 on one GPU at 40 TFLOP/s")
    assert job.extractor is not None
    features = 20 * 4 * job.extractor.dimension(job.model.spec.image_shape)
    images = 2 * 20 * 64
    assert (
        lines[4]
        == f"disk: {features / 2**20:.1f} MiB while an evaluation runs, {images / 2**20:.1f} MiB of images at most"
    )
    assert not Path(spec.output_dir).exists()
    assert dry_run([much], Session()) == []


def test_reconstruction_forecast_has_no_features(spec: EvaluateSpec, tmp_path: Path) -> None:
    there_and_back = ReconstructSpec(
        checkpoint=spec.checkpoint,
        name="tiny",
        output_dir=str(tmp_path / "out"),
        data=spec.data,
        sampler=SamplerSpec(S=5),
        compute=spec.compute,
        n=7,
    )
    lines = forecast([there_and_back], Session())
    assert lines[0] == "1 job, 70 network evaluations of one image"
    assert "features" not in lines[1]
    assert outline([there_and_back, spec]) == [
        f"2 jobs, {70 + 60} network evaluations of one image; each job reports its own progress"
    ]
    assert outline([dataclasses.replace(there_and_back, n=None), spec]) == ["2 jobs; each job reports its own progress"]


class Device:
    """A call that takes 10 ms and 1 ms more for each image, the first of each size 5 s; on a clock of its own."""

    def __init__(self, room: int = 1000) -> None:
        self.now, self.room = 0.0, room
        self.asked: list[int] = []

    def __call__(self, count: int) -> None:
        if count > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.now += 0.010 + 0.001 * count if count in self.asked else 5
        self.asked.append(count)


@pytest.mark.parametrize(
    ("largest", "at_once", "room", "counts", "expected"),
    [
        (100_000, False, 1000, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], 0.522 / 512),  # long enough
        (250, False, 1000, [1, 2, 4, 8, 16, 32, 64, 128, 250], 0.26 / 250),  # as many as there will be
        (250, True, 1000, [250], 0.26 / 250),  # compiled for one shape
        (1, False, 1000, [1], 0.011),
        (250, False, 50, [1, 2, 4, 8, 16, 32, 32], 0.042 / 32),  # 64 do not fit
        (250, True, 100, [63], 0.073 / 63),
    ],
)
def test_timing_skips_the_first_call(
    largest: int, at_once: bool, room: int, counts: list[int], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(room)
    monkeypatch.setattr("time.perf_counter", lambda: device.now)
    assert sweep.seconds_per_image(device, largest, at_once) == pytest.approx(expected, rel=1e-9)
    assert device.asked == [count for count in counts for _ in range(2)]


@pytest.mark.parametrize(("compute", "n"), [(ComputeSpec("cpu", 8), 20), (ComputeSpec("cpu", 50, compile=True), 20)])
def test_timing_takes_at_most_the_images_of_the_job(
    spec: EvaluateSpec, compute: ComputeSpec, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []

    def seconds(call: Callable[[int], object], largest: int, at_once: bool = False) -> float:
        asked.append((largest, at_once))
        return 1.0

    monkeypatch.setattr(sweep, "seconds_per_image", seconds)
    forecast([dataclasses.replace(spec, compute=compute, n=n)], Session())
    largest = min(compute.batch_size, n)
    assert asked == [(largest, compute.compile), (largest, False)]  # the network, and then the features
