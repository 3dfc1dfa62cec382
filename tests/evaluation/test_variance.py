"""The estimate of E||ε̂||², its file, and what samples with it."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim import GuidanceSpec, SamplerSpec, initial_noise, linear_schedule
from ddim.checkpoints import LoadedModel, load_model
from ddim.data.datasets import DataSpec
from ddim.diffusion.prediction import PREDICTIONS, x0_from_eps
from ddim.errors import UserError
from ddim.evaluation import variance
from ddim.evaluation.job import sampler_settings
from ddim.evaluation.variance import EstimateVarianceSpec, estimate, write_variance
from ddim.inference.compute import ComputeSpec
from ddim.inference.conditioning import conditioned
from ddim.inference.generate import check_sampler, generate
from ddim.results.records import record_key

SCHEDULE = linear_schedule(1000)
TIMES, N, V = (1, 100, 500, 1000), 200, 0.25


def gaussian_images(batch: range) -> Tensor:
    return math.sqrt(V) * initial_noise(batch, (1, 4, 4), seed=7)


def exact(prediction: str) -> Any:
    """The network without an error for data N(0, V I)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        a_t = SCHEDULE[int(t[0])]
        eps = x * math.sqrt(1 - a_t) / (V * a_t + 1 - a_t)
        return PREDICTIONS[prediction].target(x0_from_eps(eps, x, a_t), eps, a_t)

    return model


def estimated(
    prediction: str = "eps", n: int = N, batch_size: int = N, seed: int = 0
) -> tuple[list[float], list[float]]:
    compute = ComputeSpec("cpu", batch_size=batch_size)
    return estimate(exact(prediction), SCHEDULE, gaussian_images, n, TIMES, prediction, seed, compute)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimate_on_gaussian_data_is_the_truth(prediction: str) -> None:
    for t, mean, error in zip(TIMES, *estimated(prediction), strict=True):
        a_t = SCHEDULE[t]
        truth = (1 - a_t) / (V * a_t + 1 - a_t)
        assert error == pytest.approx(truth * math.sqrt(2 / (16 * N)), rel=0.2)
        assert abs(mean - truth) < 4 * error


def test_estimate_does_not_depend_on_the_batch_size() -> None:
    assert estimated(n=20, batch_size=1) == estimated(n=20, batch_size=7) == estimated(n=20)
    assert estimated(n=20, seed=1) != estimated(n=20)


# ---------------------------------------------------------------- with a checkpoint


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> EstimateVarianceSpec:
    return EstimateVarianceSpec(
        checkpoint=str(checkpoint),
        output_dir=str(tmp_path / "out"),
        name="digits",
        data=DataSpec("digits", (8, 8), 1, flip=False),
        compute=ComputeSpec("cpu", batch_size=4),
        sampler=SamplerSpec(S=5),
        n=6,
    )


def test_the_commit_of_a_file_is_that_of_the_code_that_ran(
    spec: EstimateVarianceSpec, monkeypatch: pytest.MonkeyPatch, another_commit: Callable[[], None]
) -> None:
    monkeypatch.setattr(variance, "estimate", lambda *a: (another_commit(), estimate(*a))[1])
    assert write_variance(spec)["revision"] == "a" * 40


def analytic(path: Path, **fields: Any) -> SamplerSpec:
    return SamplerSpec(**{"rule": "analytic", "eta": 1.0, "S": 5, "kwargs": {"file": str(path)}} | fields)


def test_a_file_states_its_origin_and_samples(spec: EstimateVarianceSpec, model: LoadedModel) -> None:
    content = write_variance(spec)
    assert json.loads(spec.path.read_text()) == content
    assert [path.name for path in spec.path.parent.iterdir()] == ["digits.json"]
    assert content["t"] == [10, 20, 30, 40, 50]
    assert content["alpha_bar"] == [model.spec.schedule[t] for t in content["t"]]
    stated = {key: content[key] for key in ("T", "schedule", "weights", "weights_hash", "n", "seed", "prediction")}
    assert stated == {
        "T": 50,
        "schedule": "linear",
        "weights": "ema",
        "weights_hash": model.weights_hash,
        "n": 6,
        "seed": 0,
        "prediction": "eps",
    }
    assert (content["data"]["name"], len(content["data"]["fingerprint"])) == ("digits", 64)
    compute = ComputeSpec("cpu", batch_size=3)
    ddpm, optimal = (generate(model, s, range(3), 0, compute) for s in (SamplerSpec(S=5, eta=1.0), analytic(spec.path)))
    assert not torch.equal(ddpm, optimal)


def test_without_a_sampler_every_time_is_estimated(spec: EstimateVarianceSpec, model: LoadedModel) -> None:
    assert write_variance(dataclasses.replace(spec, sampler=None, n=2))["t"] == [*range(1, 51)]
    assert check_sampler(model, analytic(spec.path, S=7, spacing="quad"))


def test_a_moved_file_keeps_the_key_and_a_changed_one_does_not(spec: EstimateVarianceSpec) -> None:
    def key(**fields: Any) -> str:
        return record_key(sampler_settings(analytic(spec.path, **fields), (1, 2)))

    write_variance(spec)
    first = key()
    assert str(spec.path) not in json.dumps(analytic(spec.path).settings())
    moved = spec.path.rename(spec.path.with_name("moved.json"))
    kwargs = {"file": str(moved), "clip_bound": True}
    assert key(kwargs=kwargs) == first
    assert key(kwargs=kwargs | {"clip_bound": False}) != first
    write_variance(dataclasses.replace(spec, seed=1))
    assert key() != first


def test_a_file_of_other_weights_is_refused(spec: EstimateVarianceSpec, model: LoadedModel, checkpoint: Path) -> None:
    write_variance(dataclasses.replace(spec, weights="online"))
    with pytest.raises(UserError, match=rf"not with {model.weights_hash[:8]} \(ema\); run scripts/estimate_variance"):
        check_sampler(model, analytic(spec.path))


def test_variances_without_labels_are_not_for_labels(spec: EstimateVarianceSpec, conditional_checkpoint: Path) -> None:
    write_variance(dataclasses.replace(spec, checkpoint=str(conditional_checkpoint)))
    conditional = load_model(conditional_checkpoint)
    check_sampler(conditioned(conditional, None, GuidanceSpec()), analytic(spec.path))
    with pytest.raises(UserError, match="estimated without labels; leave label out, or take sampler=ddpm"):
        check_sampler(conditioned(conditional, 3, GuidanceSpec()), analytic(spec.path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 2000}, "n=2000 images are more than the 1797 of digits"),
        ({"sampler": SamplerSpec(S=60)}, "S=60"),
        ({"data": DataSpec("digits", (16, 16), 1)}, r"needs size=\[8, 8\]"),
    ],
)
def test_bad_input_is_refused_before_work(spec: EstimateVarianceSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_variance(dataclasses.replace(spec, **changes))
    assert not spec.path.exists()


def test_an_earlier_file_is_kept(spec: EstimateVarianceSpec) -> None:
    spec.path.parent.mkdir()
    spec.path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        write_variance(spec)
    assert spec.path.read_text() == "mine"
    write_variance(dataclasses.replace(spec, overwrite=True))
    assert json.loads(spec.path.read_text())["n"] == 6


@pytest.mark.parametrize(
    ("changes", "message"), [({"n": 1}, "at least 2"), ({"seed": -1}, "seed"), ({"name": ""}, "file name")]
)
def test_a_spec_refuses_what_it_cannot_mean(spec: EstimateVarianceSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)


def test_the_standard_error_of_two_is_half_their_difference() -> None:
    x_0 = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    predicted = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1)  # whose squares are 1 and 4
    compute = ComputeSpec("cpu", batch_size=2)
    [mean], [error] = estimate(lambda x, t: predicted, linear_schedule(10), lambda _: x_0, 2, (5,), "eps", 0, compute)
    assert (mean, error) == pytest.approx((2.5, 1.5))
