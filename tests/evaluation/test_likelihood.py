"""Bits per dimension of images: the value by the library's functions, and what it depends on."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from two_processes import run_in_processes

from ddim.checkpoints import LoadedModel
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import normalize
from ddim.diffusion.gaussians import PIXEL
from ddim.diffusion.likelihood import adaptive_steps, dequantise, draw_probes, fixed_steps
from ddim.diffusion.rules import DDIM
from ddim.diffusion.solvers import Heun
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import linear_tau
from ddim.diffusion.variational_bound import bound_terms
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation.likelihood import LikelihoodSpec, evaluate, measure_shards
from ddim.evaluation.session import Session
from ddim.inference.compute import ComputeSpec
from ddim.results.records import Record
from ddim.results.report import build_tables, write_report
from ddim.results.schema import check_evaluation

pytestmark = pytest.mark.integration

DIGITS = DataSpec("digits", (8, 8), 1, flip=False)
BOUND: dict[str, Any] = {"method": "bound", "tolerance": None, "sampler": SamplerSpec(eta=1.0, S=10)}


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> LikelihoodSpec:
    return LikelihoodSpec(
        checkpoint=str(checkpoint),
        name="tiny",
        output_dir=str(tmp_path / "out"),
        data=DIGITS,
        sampler=SamplerSpec("heun", None, S=5),
        compute=ComputeSpec("cpu", batch_size=4),
        n=10,
        tolerance=None,
    )


@pytest.fixture(scope="module")
def x_0() -> Tensor:
    return normalize(load_images(DIGITS).batch(torch.arange(10)))


def bits(nats: Tensor) -> float:
    return float((-nats / 64 / math.log(2)).mean())


def value(record: Record) -> float:
    [number] = record["metrics"].values()
    return number


def test_bits_are_those_of_the_equation(spec: LikelihoodSpec, model: LoadedModel, x_0: Tensor) -> None:
    x = dequantise(x_0, 3, range(10))
    probes = draw_probes("gaussian", 2, x, 3, range(10))
    solved = fixed_steps(model, model.spec.schedule, x, linear_tau(50, 5), Heun(), probes)
    record, new = evaluate(dataclasses.replace(spec, seed=3, probe="gaussian", probes=2))
    assert new
    expected = bits(solved.log_likelihood + 64 * math.log(PIXEL))
    assert record["metrics"] == {"bits_per_dim_ode_10": pytest.approx(expected, rel=1e-5)}
    assert (record["kind"], record["label"], record["S"], record["nfe"]) == ("likelihood", "Heun", 5, 9)
    assert record["network_evaluations"] == 10 * 9
    low, high = record["intervals"]["bits_per_dim_ode_10"]
    assert low < value(record) < high
    assert evaluate(dataclasses.replace(spec, seed=3, probe="gaussian", probes=2))[1] is False


def test_a_tolerance_takes_the_place_of_times(spec: LikelihoodSpec, model: LoadedModel, x_0: Tensor) -> None:
    x = dequantise(x_0[:2], 0, range(2))
    solved = adaptive_steps(model, model.spec.schedule, x, 0.3, draw_probes("rademacher", 1, x, 0, range(2)))
    record, _ = evaluate(spec := dataclasses.replace(spec, tolerance=0.3, n=2, sampler=SamplerSpec()))
    assert value(record) == pytest.approx(bits(solved.log_likelihood + 64 * math.log(PIXEL)), rel=1e-4)
    assert record["network_evaluations"] == pytest.approx(int(solved.evaluations.sum()), rel=0.05)
    assert record["nfe"] == record["S"] == pytest.approx(record["network_evaluations"] / 2, rel=0.3)


@pytest.mark.parametrize("clip", ["none", "x0_and_eps"])
def test_the_bound_is_the_sum_of_its_terms(spec: LikelihoodSpec, model: LoadedModel, x_0: Tensor, clip: str) -> None:
    spec = dataclasses.replace(spec, **BOUND | {"sampler": SamplerSpec(eta=1.0, S=10, clip=clip)})
    terms = bound_terms(model, model.spec.schedule, x_0, linear_tau(50, 10), DDIM(1.0), clip=clip, indices=range(10))
    record, _ = evaluate(spec)
    assert value(record) == pytest.approx(bits(-terms.sum(1)), rel=1e-5)
    assert record["terms"] == pytest.approx((terms.mean(0) / 64 / math.log(2)).tolist(), rel=1e-4)
    assert (len(record["terms"]), record["nfe"], record["network_evaluations"]) == (11, 10, 100)
    check_evaluation(json.loads(json.dumps(record)))
    paths = {path.name: path for path in write_report([record], Path(spec.output_dir))}
    lines = paths["terms.csv"].read_text().splitlines()
    assert [line.split(",")[1:3] for line in lines[1:3] + lines[10:]] == [
        ["L_0", "5"],
        ["L_5", "10"],
        ["L_45", "50"],
        ["L_T", "50"],
    ]
    assert {"plot_terms.png", "plot_terms.pdf"} <= set(paths)
    assert "Terms of the variational bound" in paths["report.html"].read_text()


def test_a_table_has_one_method(spec: LikelihoodSpec) -> None:
    specs = [spec, dataclasses.replace(spec, sampler=SamplerSpec(S=9))]
    specs += [dataclasses.replace(spec, **BOUND)]
    specs += [dataclasses.replace(spec, method="bound", sampler=SamplerSpec("sigma_hat", None, S=10))]
    tables = build_tables([evaluate(one)[0] for one in specs])
    assert sorted(table.rows for table in tables) == [["η=0.0", "Heun"], ["η=1.0", "σ̂"]]
    assert {table.title()[:60] for table in tables} == {
        "bits_per_dim_ode_10: 10 images of digits, dequantised unifor",
        "bits_per_dim_bound_10: 10 images of digits, 256 grey levels,",
    }


def in_a_process(processes: Processes, spec: LikelihoodSpec) -> Record:
    return evaluate(spec, Session(processes))[0]


@pytest.mark.parametrize("changes", [{}, BOUND])
def test_batches_and_processes_do_not_change_the_bits(
    spec: LikelihoodSpec, tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec = dataclasses.replace(spec, **changes)
    one, _ = evaluate(dataclasses.replace(spec, compute=ComputeSpec("cpu", 10), output_dir=str(tmp_path / "one")))
    first, second = run_in_processes(in_a_process, spec, to=tmp_path / "results")
    assert first == second
    assert first["compute"]["processes"] == 2
    assert value(first) == pytest.approx(value(one), rel=1e-5)
    assert first["key"] == one["key"]


@pytest.mark.parametrize("changes", [{}, BOUND])
def test_a_continued_job_has_the_same_record(spec: LikelihoodSpec, tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = dataclasses.replace(spec, **changes)
    undisturbed, _ = evaluate(dataclasses.replace(spec, output_dir=str(tmp_path / "other")))
    session = Session()
    job = spec.prepare(session)
    measure_shards(spec, job, session.images(DIGITS, "test"), SINGLE_PROCESS)
    job.shards.path(range(4, 8)).unlink()  # interrupted while another process was ahead
    record, new = evaluate(spec)
    assert new
    varying = {"seconds_sampling", "config", "revision"}
    assert {k: v for k, v in record.items() if k not in varying} == {
        k: v for k, v in undisturbed.items() if k not in varying
    }


def test_the_grid_shows_the_likeliest_and_the_least_likely(spec: LikelihoodSpec) -> None:
    record, _ = evaluate(dataclasses.replace(spec, grid=6))
    assert (Path(spec.output_dir) / record["grid"]).is_file()


def test_what_changes_the_bits_changes_the_key(spec: LikelihoodSpec) -> None:
    def key(**changes: Any) -> str:
        return dataclasses.replace(spec, **changes).prepare(Session()).key

    other: list[dict[str, Any]] = [{}, BOUND, {"n": 9}, {"seed": 1}, {"probe": "gaussian"}, {"probes": 2}]
    other += [{"tolerance": tolerance, "sampler": SamplerSpec()} for tolerance in (0.1, 0.2)]
    other += [{"sampler": SamplerSpec("heun", None, S=6)}]
    other += [{"sampler": SamplerSpec("heun", None, S=5, last_time=1)}, {"weights": "online"}]
    assert len({key(**changes) for changes in other}) == len(other)
    assert key(grid=3, compute=ComputeSpec("cpu", 99)) == key()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": SamplerSpec(eta=1.0)}, "η=1.0 adds noise, and method=ode follows a deterministic trajectory"),
        ({"sampler": SamplerSpec(S=5, corrector_steps=1)}, "a sampler with a corrector has no likelihood"),
        ({"sampler": SamplerSpec(clip="x0")}, "clip=x0 has no likelihood by method=ode"),
        (
            {"method": "bound"},
            "the bound needs the noise of ddim with eta > 0, of sigma_hat or of learned_variance",
        ),
        (BOUND | {"tolerance": 0.1}, "tolerance=0.1 is of method=ode"),
        (BOUND | {"sampler": SamplerSpec(eta=1.0, last_time=1)}, "last_time=1 has no bound"),
        ({"tolerance": 0.1}, "tolerance=0.1 takes steps of its own, not those of the sampler; set tolerance=null"),
        ({"tolerance": 1.0}, "tolerance=1.0 must lie between 0 and 1"),
        ({"probes": 0}, "probes=0 must be at least 1"),
        ({"n": 0}, "n=0 must be at least 1, or null for all images"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_values_out_of_range_are_refused(spec: LikelihoodSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 1798}, "more than the 1797 of digits; n=null takes all"),
        ({"sampler": SamplerSpec("probability_flow", None, S=5)}, "sampler: "),
        (BOUND | {"sampler": SamplerSpec(eta=1.0, S=1)}, "sampler: the bound needs two or more times"),
        (BOUND | {"sampler": SamplerSpec(eta=1.0, S=1000)}, "S=1000 steps cannot be chosen from T=50"),
    ],
)
def test_bad_input_is_refused_before_work(spec: LikelihoodSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(dataclasses.replace(spec, **changes))
    assert not Path(spec.output_dir).exists()
