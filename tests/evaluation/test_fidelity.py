"""A cell: computed once, recorded with everything that decided it, found again by that and by nothing else."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddim.checkpoints import LoadedModel, load_model
from ddim.data.datasets import DataSpec
from ddim.diffusion.labels import row_label, title
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation import fidelity, job
from ddim.evaluation.feature_stats import feature_set
from ddim.evaluation.fidelity import EvaluateSpec, evaluate_cell
from ddim.evaluation.metrics import FeatureExtractor, MetricSpec, compute_metrics
from ddim.inference.generate import generate
from ddim.results.records import RECORDS, RecordFile

T = 50  # of the tiny model
CACHES = (
    *((job, name) for name in ("_model", "cached_images", "cached_fingerprint")),
    *((fidelity, name) for name in ("_extractor", "_extractor_facts", "_reference")),
)


@pytest.fixture
def empty_caches() -> None:
    for module, name in CACHES:
        getattr(module, name).cache_clear()


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whoever generates an image fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("images were generated")

    monkeypatch.setattr(fidelity, "generate_batch", fail)


def on_sampler(**changes: Any) -> Callable[[EvaluateSpec], EvaluateSpec]:
    return lambda spec: dataclasses.replace(spec, sampler=dataclasses.replace(spec.sampler, **changes))


def on_compute(**changes: Any) -> Callable[[EvaluateSpec], EvaluateSpec]:
    return lambda spec: dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, **changes))


def on_metric(**changes: Any) -> Callable[[EvaluateSpec], EvaluateSpec]:
    return lambda spec: dataclasses.replace(spec, metric=dataclasses.replace(spec.metric, **changes))


def on_cell(**changes: Any) -> Callable[[EvaluateSpec], EvaluateSpec]:
    return lambda spec: dataclasses.replace(spec, **changes)


def test_the_record_holds_everything_that_decided_the_number(spec: EvaluateSpec, checkpoint: Path) -> None:
    record, new = evaluate_cell(spec)
    assert new
    assert record["config"] == dataclasses.asdict(spec)
    assert record["model"] == {
        "weights": "ema",
        "weights_hash": load_model(checkpoint, "ema").weights_hash,
        "step": 4,
        "schedule": "linear",
        "T": T,
        "prediction": "eps",
        "description_hash": record["model"]["description_hash"],
    }
    assert record["sampler"] == {"rule": "ddim", "eta": 0.5, "clip": "none", "last_time": 0, "tau": [16, 33, 50]}
    assert (record["n"], record["seed"], record["bf16"], record["S"]) == (20, 0, False, 3)
    assert (record["spacing"], record["label"], record["distinct_evaluations"]) == ("linear", "η=0.5", 3)
    assert record["network_evaluations"] == 60
    assert record["seconds_sampling"] > 0
    assert record["seconds_metrics"] > 0
    assert record["reference"]["name"] == "digits"
    assert record["reference"]["images"] == 1797
    assert len(record["reference"]["fingerprint"]) == 64
    assert record["metric"]["extractor"] == "digits_classifier"
    assert record["metric"]["weights_hash"] == FeatureExtractor(spec.metric, "cpu").weights_hash()
    assert record["revision"]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert list(record["metrics"]) == ["fd_digits_classifier_20"]
    [stored] = RecordFile(Path(spec.output_dir) / RECORDS).read()
    assert stored == json.loads(json.dumps(record))


def test_the_number_is_that_of_the_images_and_the_data(spec: EvaluateSpec, model: LoadedModel) -> None:
    spec = dataclasses.replace(spec, n=100, seed=5)
    record, _ = evaluate_cell(spec)
    extractor = FeatureExtractor(spec.metric, "cpu")
    digits = torch.from_numpy(np.round(load_digits().images * 255 / 16 + 1e-9)).to(torch.uint8)[:, None]
    both = (generate(model, spec.sampler, range(100), 5, spec.compute), digits)
    features = [feature_set(extractor.extract(images), "64") for images in both]
    assert record["metrics"] == pytest.approx(compute_metrics(*features, spec.metric, 100), rel=1e-6)
    assert record["metrics"]["fd_digits_classifier_100"] > 1


def test_a_cell_is_computed_once(spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first, new = evaluate_cell(spec)
    assert new
    forbid(monkeypatch)
    again, new = evaluate_cell(spec)
    assert not new
    assert again == json.loads(json.dumps(first))


@pytest.mark.parametrize(
    "change",
    [
        on_cell(seed=1),
        on_cell(n=21),
        on_cell(weights="online"),
        on_sampler(eta=0.6),
        on_sampler(S=4),
        on_sampler(spacing="quadratic"),
        on_sampler(clip="x0"),
        on_sampler(last_time=1),
        on_sampler(rule="sigma_hat", eta=None),
        on_compute(bf16=True),
        on_metric(metrics=("fd", "prc")),
        on_metric(extractor="pixels"),
    ],
)
def test_what_changes_the_number_is_another_cell(
    spec: EvaluateSpec, change: Callable[[EvaluateSpec], EvaluateSpec]
) -> None:
    first, _ = evaluate_cell(spec)
    second, new = evaluate_cell(change(spec))
    assert new
    assert second["key"] != first["key"]
    assert evaluate_cell(spec) == (json.loads(json.dumps(first)), False)


@pytest.mark.parametrize(
    "change",
    [
        on_compute(batch_size=3),
        on_compute(channels_last=True),
        on_metric(batch_size=64),
        on_cell(grid=4),
        on_cell(name="other"),
        on_sampler(S=None, spacing="explicit", times=(16, 33, 50)),
    ],
)
def test_what_does_not_change_the_number_is_the_same_cell(
    spec: EvaluateSpec, change: Callable[[EvaluateSpec], EvaluateSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = evaluate_cell(spec)
    forbid(monkeypatch)
    assert evaluate_cell(change(spec)) == (json.loads(json.dumps(first)), False)


def test_another_folder_and_another_copy_of_the_model_give_the_same_key(spec: EvaluateSpec, tmp_path: Path) -> None:
    first, _ = evaluate_cell(spec)
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(Path(spec.checkpoint).read_bytes())
    second, new = evaluate_cell(dataclasses.replace(spec, output_dir=str(tmp_path / "b"), checkpoint=str(copy)))
    assert new
    assert (second["key"], second["metrics"]) == (first["key"], first["metrics"])


def test_model_extractor_and_reference_are_read_once_for_a_sweep(
    spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch, empty_caches: None
) -> None:
    calls: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    class Counting(FeatureExtractor):
        def extract(self, images: Any) -> Any:
            calls[f"extract {len(images)}"] += 1
            return super().extract(images)

    monkeypatch.setattr(fidelity, "FeatureExtractor", Counting)
    for module, name in ((job, "load_model"), (job, "load_images"), (fidelity, "FeatureExtractor")):
        counted(module, name)
    for S in (2, 3, 4):
        evaluate_cell(on_sampler(S=S)(spec))
    assert calls == {
        "load_model": 1,
        "load_images": 1,
        "FeatureExtractor": 1,
        "extract 1000": 1,
        "extract 797": 1,
        "extract 8": 6,
        "extract 4": 3,
    }


def test_a_checkpoint_that_was_trained_on_is_noticed(
    spec: EvaluateSpec, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    path = make_checkpoint(tmp_path / "last.ckpt")
    spec = dataclasses.replace(spec, checkpoint=str(path))
    first, _ = evaluate_cell(spec)
    stamp = path.stat().st_mtime_ns
    make_checkpoint(path, seed=1, step=8)
    os.utime(path, ns=(stamp + 1, stamp + 1))
    second, new = evaluate_cell(spec)
    assert new
    assert (first["model"]["step"], second["model"]["step"]) == (4, 8)
    assert first["model"]["weights_hash"] != second["model"]["weights_hash"]
    assert first["metrics"] != second["metrics"]


@pytest.mark.parametrize("part", ["schedule", "network"])
def test_the_same_weights_in_another_model_are_another_cell(spec: EvaluateSpec, tmp_path: Path, part: str) -> None:
    checkpoint = torch.load(spec.checkpoint, weights_only=True)
    if part == "schedule":
        checkpoint["ddim"]["schedule"]["alpha_bar"][1:] *= 0.9
    else:
        checkpoint["ddim"]["network"]["num_groups"] = 2
    torch.save(checkpoint, tmp_path / "other.ckpt")
    first, _ = evaluate_cell(spec)
    second, new = evaluate_cell(dataclasses.replace(spec, checkpoint=str(tmp_path / "other.ckpt")))
    assert new
    assert first["model"]["weights_hash"] == second["model"]["weights_hash"]
    assert first["metrics"] != second["metrics"]


def test_images_of_another_size_are_refused_before_generating(
    spec: EvaluateSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        Image.new("L", (16, 16), i).save(tmp_path / f"{i}.png")
    other = DataSpec("folder", (16, 16), 1, root=str(tmp_path))
    forbid(monkeypatch)
    with pytest.raises(UserError, match=r"\(1, 8, 8\), \S+ has \(1, 16, 16\); choose the data"):
        evaluate_cell(dataclasses.replace(spec, data=other, metric=MetricSpec("pixels")))
    assert not Path(spec.output_dir).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (on_cell(checkpoint="nowhere.ckpt"), "there is no checkpoint nowhere.ckpt"),
        (on_cell(n=1), "at least 2 images"),
        (on_metric(reference_npz="nowhere.npz"), "statistics nowhere.npz cannot be read .*arrays mu and sigma"),
        (on_sampler(S=51), "S=51 .*T=50"),
        (on_metric(metrics=("kd",)), "kid_subset_size=1000 is more than"),
        (on_cell(data=DataSpec("digits", (8, 8), 3)), "digits needs"),
    ],
)
def test_bad_input_is_refused_before_generating(
    spec: EvaluateSpec,
    change: Callable[[EvaluateSpec], EvaluateSpec],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid(monkeypatch)
    with pytest.raises(UserError, match=message):
        evaluate_cell(change(spec))
    assert not Path(spec.output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"n": 0}, "n=0"), ({"seed": -1}, r"seed=-1 must lie in"), ({"seed": 1 << 64}, "seed"), ({"grid": -1}, "grid=-1")],
)
def test_values_out_of_range_are_refused(spec: EvaluateSpec, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)


@pytest.mark.parametrize(
    ("sampler", "spacing", "S"),
    [
        (SamplerSpec(S=T), "full", T),
        (SamplerSpec(S=T, spacing="uniform"), "full", T),
        (SamplerSpec(S=T, spacing="quad"), "quad", T),
        (SamplerSpec(S=T, spacing="quad_or_full"), "full", T),
        (SamplerSpec(S=10, spacing="quad_or_full"), "quad", 10),
        (SamplerSpec(S=20, spacing="uniform"), "uniform", 25),  # as released: more than asked for
        (SamplerSpec(S=None, spacing="explicit", times=(3, 50)), "explicit 3,50", 2),
    ],
)
def test_what_is_recorded_of_the_times(spec: EvaluateSpec, sampler: SamplerSpec, spacing: str, S: int) -> None:
    record, _ = evaluate_cell(dataclasses.replace(spec, sampler=sampler, n=2))
    assert (record["spacing"], record["S"]) == (spacing, S)
    assert record["sampler"]["tau"] == list(sampler.tau(T))
    assert record["distinct_evaluations"] == len(set(sampler.tau(T)))
    assert record["network_evaluations"] == 2 * S


def test_labels_say_what_distinguishes_rows() -> None:
    assert row_label(SamplerSpec(eta=0.2)) == "η=0.2"
    assert row_label(SamplerSpec("sigma_hat", None)) == "σ̂"
    assert row_label(SamplerSpec("sigma_hat", None, clip="x0_and_eps")) == "σ̂ (clip x0_and_eps)"
    assert title(SamplerSpec(S=20, spacing="quad")) == "η=0.0 S=20 quad"
    assert title(SamplerSpec(S=None, spacing="explicit", times=(1, 2))) == "η=0.0 2 times explicit"
