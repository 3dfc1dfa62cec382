"""The error to the exact trajectory: its value by the library's own functions, its order, and what it depends on."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import run_in_processes

import ddim
from ddim.checkpoints import LoadedModel
from ddim.data.datasets import DataSpec
from ddim.diffusion.rules import DDIM
from ddim.diffusion.solvers import AdamsBashforth
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation import reconstruction, trajectory_error
from ddim.evaluation.session import Session
from ddim.evaluation.trajectory_error import TrajectoryErrorSpec, compare_shards, evaluate, exact_samples
from ddim.inference.compute import ComputeSpec
from ddim.results.records import Record
from ddim.results.report import build_tables

pytestmark = pytest.mark.integration


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> TrajectoryErrorSpec:
    return TrajectoryErrorSpec(
        checkpoint=str(checkpoint),
        name="tiny",
        output_dir=str(tmp_path / "out"),
        sampler=SamplerSpec(S=5),
        compute=ComputeSpec("cpu", batch_size=7),
        n=10,
        grid=3,
    )


def error_of(spec: TrajectoryErrorSpec, **changes: Any) -> float:
    [error] = evaluate(dataclasses.replace(spec, **changes))[0]["metrics"].values()
    return error


def test_error_is_the_distance_to_all_times(spec: TrajectoryErrorSpec, model: LoadedModel) -> None:
    x_T = ddim.initial_noise(range(10), (1, 8, 8), seed=0)
    schedule = model.spec.schedule
    with torch.no_grad():
        exact = ddim.sample(model, schedule, x_T, range(1, 51), AdamsBashforth(3))
        x_0 = ddim.sample(model, schedule, x_T, ddim.linear_tau(50, 5), DDIM())
    record, new = evaluate(spec)
    assert new
    expected = float((x_0 - exact).double().square().mean().sqrt())
    assert record["metrics"] == {"trajectory_rmse_10": pytest.approx(expected, rel=1e-4)}
    assert (record["kind"], record["label"], record["S"], record["nfe"], record["n"]) == (
        "trajectory",
        "η=0.0",
        5,
        5,
        10,
    )
    assert record["network_evaluations"] == 10 * 5
    assert record["reference"]["name"] == "AB3 over all 50 times"
    assert (Path(spec.output_dir) / record["grid"]).is_file()
    assert evaluate(spec)[1] is False


def test_all_times_of_the_exact_rule_have_no_error(spec: TrajectoryErrorSpec) -> None:
    exact = SamplerSpec("adams_bashforth", None, order=3, S=50)
    assert error_of(spec, sampler=exact) == 0


def test_higher_orders_come_closer_at_equal_cost(spec: TrajectoryErrorSpec) -> None:
    order_1 = [error_of(spec, sampler=SamplerSpec(S=None, nfe=nfe)) for nfe in (5, 15)]
    order_2 = [error_of(spec, sampler=SamplerSpec("heun", None, S=None, nfe=nfe)) for nfe in (5, 15)]
    assert order_1[1] < order_1[0]
    assert order_2[1] < order_1[1]
    records = [evaluate(dataclasses.replace(spec, sampler=SamplerSpec("heun", None, S=3)))[0]]
    records.append(evaluate(spec)[0])
    [table] = build_tables(records)  # of one protocol, since the exact trajectory is the same
    assert (table.column, table.columns, table.rows) == ("NFE", [5], ["η=0.0", "Heun"])
    assert math.isclose(table.value("Heun", 5) or 0, order_2[0])


def test_the_exact_trajectory_is_computed_a_single_time(spec: TrajectoryErrorSpec) -> None:
    session = Session()
    job = spec.prepare(session)
    exact_samples(spec, job, SINGLE_PROCESS)
    files = {path: path.stat().st_mtime_ns for path in Path(spec.output_dir, "exact").rglob("*.safetensors")}
    assert len(files) == 2
    for sampler in (SamplerSpec(S=7), SamplerSpec("heun", None, S=3), SamplerSpec("unipc", None, S=5, spacing="quad")):
        evaluate(dataclasses.replace(spec, sampler=sampler, compute=ComputeSpec("cpu", batch_size=3)), session)
    now = Path(spec.output_dir, "exact").rglob("*.safetensors")
    assert {path: path.stat().st_mtime_ns for path in now} == files


def test_exact_trajectories_of_other_code_are_recorded(
    spec: TrajectoryErrorSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ddim.evaluation.shards.code_revision", lambda: "older")
    exact_samples(spec, spec.prepare(Session()), SINGLE_PROCESS)
    monkeypatch.undo()
    record, _ = evaluate(spec)
    assert "the exact trajectories of trajectory error η=0.0" in caplog.text
    assert "was computed by the code of older and stays as it is" in caplog.text
    assert record["other_revisions"] == ["older"]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_exact_trajectories_are_in_float32(
    spec: TrajectoryErrorSpec, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the samples are in: every precision is compared with the same files."""
    seen = []
    sample = trajectory_error.sample_batches

    def note(*arguments: Any) -> Any:
        seen.append(arguments[4].precision)
        return sample(*arguments)

    monkeypatch.setattr(trajectory_error, "sample_batches", note)
    evaluate(dataclasses.replace(spec, n=1, compute=dataclasses.replace(spec.compute, **{precision: True})))
    assert seen == [{"bf16": False}, {"bf16": False} | {precision: True}]


def test_what_decides_the_exact_trajectory_names_it(spec: TrajectoryErrorSpec) -> None:
    def name(**changes: Any) -> str:
        return dataclasses.replace(spec, **changes).prepare(Session()).settings["reference"]["fingerprint"]

    same = [{}, {"sampler": SamplerSpec(S=9, spacing="quad")}, {"sampler": SamplerSpec("heun", None)}, {"grid": 0}]
    assert len({name(**changes) for changes in same}) == 1
    other: list[dict[str, Any]] = [{}, {"n": 11}, {"seed": 1}, {"weights": "online"}]
    other += [{"sampler": SamplerSpec(clip="x0")}, {"sampler": SamplerSpec(last_time=1)}]
    assert len({name(**changes) for changes in other}) == len(other)


def test_a_continued_job_has_the_same_error(spec: TrajectoryErrorSpec, tmp_path: Path) -> None:
    undisturbed = dataclasses.replace(spec, output_dir=str(tmp_path / "other"))
    job = spec.prepare(Session())
    exact = exact_samples(spec, job, SINGLE_PROCESS)
    compare_shards(dataclasses.replace(spec, grid=0), job, exact, SINGLE_PROCESS)
    next(Path(spec.output_dir, "exact").rglob("*.safetensors")).write_bytes(b"cut")  # is computed again
    job.shards.path(range(7, 10)).unlink()
    assert error_of(spec) == error_of(undisturbed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": SamplerSpec(eta=1.0)}, "η=1.0 adds noise, so no exact trajectory belongs to it; choose a determ"),
        ({"sampler": SamplerSpec("sigma_hat", None)}, "σ̂ adds noise"),
        ({"sampler": SamplerSpec("sde_dpm_solver_pp", None)}, "SDE-DPM-Solver"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"n": 100_001}, "at most 100,000"),
        ({"seed": -1}, "seed=-1"),
        ({"grid": -1}, "grid=-1"),
    ],
)
def test_values_out_of_range_are_refused(spec: TrajectoryErrorSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)


def test_a_sampler_that_does_not_fit_is_refused_before_work(spec: TrajectoryErrorSpec) -> None:
    with pytest.raises(UserError, match="sampler: nfe=4 is not possible with rule=heun"):
        evaluate(dataclasses.replace(spec, sampler=SamplerSpec("heun", None, S=None, nfe=4)))
    assert not Path(spec.output_dir).exists()


def errors_in_a_process(
    processes: Processes, spec: TrajectoryErrorSpec, encoded: reconstruction.ReconstructSpec
) -> list[Record]:
    session = Session(processes)
    return [evaluate(spec, session)[0], reconstruction.evaluate(encoded, session)[0]]


def test_errors_do_not_depend_on_processes(spec: TrajectoryErrorSpec, tmp_path: Path) -> None:
    """Those of the reconstruction neither."""
    encoded = reconstruction.ReconstructSpec(
        checkpoint=spec.checkpoint,
        name="encoded",
        output_dir=str(tmp_path / "encoded"),
        data=DataSpec("digits", (8, 8), 1, flip=False),
        sampler=spec.sampler,
        compute=dataclasses.replace(spec.compute, batch_size=3),  # of ten images: four batches for two processes
        n=10,
        grid=0,
    )
    spec = dataclasses.replace(spec, compute=encoded.compute)
    first, second = run_in_processes(errors_in_a_process, spec, encoded, to=tmp_path / "results")
    assert first == second
    elsewhere = [dataclasses.replace(one, output_dir=str(tmp_path / "one")) for one in (spec, encoded)]
    for record, one in zip(first, errors_in_a_process(SINGLE_PROCESS, *elsewhere), strict=True):
        assert record["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
