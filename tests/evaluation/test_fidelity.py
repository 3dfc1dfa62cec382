"""An evaluation: never computed again, and recorded with everything that decides its key."""

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
from ddim.evaluation import metrics, session
from ddim.evaluation.feature_stats import feature_set
from ddim.evaluation.features import FeatureExtractor
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.metrics import MetricSpec, compute_metrics
from ddim.evaluation.session import Session
from ddim.image_io import grid
from ddim.inference import generate as generate_module
from ddim.inference.generate import generate
from ddim.results.records import RECORDS, RecordFile

pytestmark = pytest.mark.integration
T = 50  # of the tiny model


@pytest.fixture(scope="module")
def shared() -> Session:
    """What one test has loaded, the next one need not load."""
    return Session()


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, whoever generates an image fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("images were generated")

    monkeypatch.setattr(generate_module, "generate_batch", fail)


def on_sampler(**changes: Any) -> Callable[[EvaluateSpec], EvaluateSpec]:
    return lambda spec: dataclasses.replace(spec, sampler=dataclasses.replace(spec.sampler, **changes))


def on_compute(**changes: Any) -> Callable[[EvaluateSpec], EvaluateSpec]:
    return lambda spec: dataclasses.replace(spec, compute=dataclasses.replace(spec.compute, **changes))


def on_metric(**changes: Any) -> Callable[[EvaluateSpec], EvaluateSpec]:
    return lambda spec: dataclasses.replace(spec, metric=dataclasses.replace(spec.metric, **changes))


def on_spec(**changes: Any) -> Callable[[EvaluateSpec], EvaluateSpec]:
    return lambda spec: dataclasses.replace(spec, **changes)


def test_record_holds_everything_that_decides_it(spec: EvaluateSpec, checkpoint: Path) -> None:
    record, new = evaluate(spec)
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
    assert record["metric"]["weights_hash"] == spec.metric.build_extractor("cpu").weights_hash
    assert record["revision"]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert list(record["metrics"]) == ["fd_digits_classifier_20"]
    [stored] = RecordFile(Path(spec.output_dir) / RECORDS).read()
    assert stored == json.loads(json.dumps(record))


def test_metric_equals_a_direct_computation(spec: EvaluateSpec, model: LoadedModel) -> None:
    spec = dataclasses.replace(spec, n=100, seed=5)
    record, _ = evaluate(spec)
    extractor = spec.metric.build_extractor("cpu")
    digits = torch.from_numpy(np.round(load_digits().images * 255 / 16 + 1e-9)).to(torch.uint8)[:, None]
    both = (generate(model, spec.sampler, range(100), 5, spec.compute), digits)
    features = [feature_set(extractor.extract(images), "64") for images in both]
    assert record["metrics"] == pytest.approx(compute_metrics(*features, spec.metric, 100), rel=1e-6)
    assert record["metrics"]["fd_digits_classifier_100"] > 1


def test_an_evaluation_is_not_computed_again(spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first, new = evaluate(spec)
    assert new
    forbid(monkeypatch)
    again, new = evaluate(spec)
    assert not new
    assert again == json.loads(json.dumps(first))


@pytest.mark.parametrize(
    "change",
    [
        on_spec(seed=1),
        on_spec(n=21),
        on_spec(weights="online"),
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
def test_what_changes_the_number_changes_the_key(
    spec: EvaluateSpec, change: Callable[[EvaluateSpec], EvaluateSpec], shared: Session
) -> None:
    first, _ = evaluate(spec, shared)
    second, new = evaluate(change(spec), shared)
    assert new
    assert second["key"] != first["key"]
    assert evaluate(spec, shared) == (json.loads(json.dumps(first)), False)


@pytest.mark.parametrize(
    "change",
    [
        on_compute(batch_size=3),
        on_compute(channels_last=True),
        on_metric(batch_size=64),
        on_spec(grid=4),
        on_spec(name="other"),
        on_sampler(S=None, spacing="explicit", times=(16, 33, 50)),
    ],
)
def test_what_decides_nothing_keeps_the_key(
    spec: EvaluateSpec,
    change: Callable[[EvaluateSpec], EvaluateSpec],
    shared: Session,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = evaluate(spec, shared)
    forbid(monkeypatch)
    assert evaluate(change(spec), shared) == (json.loads(json.dumps(first)), False)


def test_key_does_not_depend_on_paths(spec: EvaluateSpec, tmp_path: Path) -> None:
    first, _ = evaluate(spec)
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes(Path(spec.checkpoint).read_bytes())
    second, new = evaluate(dataclasses.replace(spec, output_dir=str(tmp_path / "b"), checkpoint=str(copy)))
    assert new
    assert (second["key"], second["metrics"]) == (first["key"], first["metrics"])


def test_a_session_loads_nothing_again(spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(metrics, "FeatureExtractor", Counting)
    for module, name in ((session, "load_model"), (session, "load_images"), (metrics, "FeatureExtractor")):
        counted(module, name)
    shared = Session()
    for S in (2, 3, 4):
        evaluate(on_sampler(S=S)(spec), shared)
    assert calls == {
        "load_model": 1,
        "load_images": 1,
        "FeatureExtractor": 1,
        "extract 1000": 1,
        "extract 797": 1,
        "extract 8": 6,
        "extract 4": 3,
    }


def test_a_changed_checkpoint_is_loaded_again(
    spec: EvaluateSpec, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    path = make_checkpoint(tmp_path / "last.ckpt")
    spec = dataclasses.replace(spec, checkpoint=str(path))
    shared = Session()
    first, _ = evaluate(spec, shared)
    stamp = path.stat().st_mtime_ns
    make_checkpoint(path, seed=1, step=8)
    os.utime(path, ns=(stamp + 1, stamp + 1))
    second, new = evaluate(spec, shared)
    assert new
    assert (first["model"]["step"], second["model"]["step"]) == (4, 8)
    assert first["model"]["weights_hash"] != second["model"]["weights_hash"]
    assert first["metrics"] != second["metrics"]


@pytest.mark.parametrize("changed", ["schedule", "network"])
def test_same_weights_in_another_model_change_the_key(spec: EvaluateSpec, tmp_path: Path, changed: str) -> None:
    checkpoint = torch.load(spec.checkpoint, weights_only=True)
    if changed == "schedule":
        checkpoint["ddim"]["schedule"]["alpha_bar"][1:] *= 0.9
    else:
        checkpoint["ddim"]["network"]["num_groups"] = 2
    torch.save(checkpoint, tmp_path / "other.ckpt")
    first, _ = evaluate(spec)
    second, new = evaluate(dataclasses.replace(spec, checkpoint=str(tmp_path / "other.ckpt")))
    assert new
    assert first["model"]["weights_hash"] == second["model"]["weights_hash"]
    assert first["metrics"] != second["metrics"]


def test_images_of_another_size_are_refused(
    spec: EvaluateSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        Image.new("L", (16, 16), i).save(tmp_path / f"{i}.png")
    other = DataSpec("folder", (16, 16), 1, root=str(tmp_path))
    forbid(monkeypatch)
    with pytest.raises(UserError, match=r"\(1, 8, 8\), \S+ has \(1, 16, 16\); choose the data"):
        evaluate(dataclasses.replace(spec, data=other, metric=MetricSpec("pixels")))
    assert not Path(spec.output_dir).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (on_spec(checkpoint="nowhere.ckpt"), "there is no checkpoint nowhere.ckpt"),
        (on_spec(n=1), "at least 2 images"),
        (on_metric(reference_npz="nowhere.npz"), "statistics nowhere.npz cannot be used .*arrays mu and sigma"),
        (on_sampler(S=51), "S=51 .*T=50"),
        (on_metric(metrics=("kd",)), "kid_subset_size=1000 is more than"),
        (on_spec(data=DataSpec("digits", (8, 8), 3)), "digits needs"),
    ],
)
def test_bad_input_is_refused_before_sampling(
    spec: EvaluateSpec,
    change: Callable[[EvaluateSpec], EvaluateSpec],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forbid(monkeypatch)
    with pytest.raises(UserError, match=message):
        evaluate(change(spec))
    assert not Path(spec.output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"n": 4_000_000_000}, "n=4000000000 must"),
        ({"repeats": 1_000_000}, "repeats=1000000 must"),
        ({"seed": -1}, r"seed=-1 must lie in"),
        ({"seed": 1 << 64}, "seed"),
        ({"grid": -1}, "grid=-1"),
    ],
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
def test_times_are_recorded(spec: EvaluateSpec, sampler: SamplerSpec, spacing: str, S: int, shared: Session) -> None:
    record, _ = evaluate(dataclasses.replace(spec, sampler=sampler, n=2), shared)
    assert (record["spacing"], record["S"]) == (spacing, S)
    assert record["sampler"]["tau"] == list(sampler.tau(T))
    assert record["distinct_evaluations"] == len(set(sampler.tau(T)))
    assert record["network_evaluations"] == 2 * S


def test_times_of_a_file_make_the_record_of_explicit_ones(spec: EvaluateSpec, tmp_path: Path) -> None:
    """The same key, since the same numbers decide; in tables the times are named as the file is."""
    (tmp_path / "searched.json").write_text('{"T": 50, "tau": [3, 50]}')
    times = SamplerSpec(S=None, spacing=str(tmp_path / "searched.json"))
    record, _ = evaluate(dataclasses.replace(spec, sampler=times, n=2))
    assert (record["spacing"], record["S"], record["sampler"]["tau"]) == ("searched", 2, [3, 50])
    explicit = dataclasses.replace(spec, sampler=times.at_times((3, 50)), n=2)
    assert explicit.prepare(Session()).key == record["key"]


def test_labels_distinguish_rows() -> None:
    assert row_label(SamplerSpec(eta=0.2)) == "η=0.2"
    assert row_label(SamplerSpec("sigma_hat", None)) == "σ̂"
    assert row_label(SamplerSpec("sigma_hat", None, clip="x0_and_eps")) == "σ̂ (clip x0_and_eps)"
    assert title(SamplerSpec(S=20, spacing="quad")) == "η=0.0 S=20 quad"
    assert title(SamplerSpec(S=None, spacing="explicit", times=(1, 2))) == "η=0.0 2 times explicit"


@pytest.mark.parametrize("first", [0, 20])
def test_grid_shows_the_first_images(spec: EvaluateSpec, model: LoadedModel, first: int) -> None:
    record, _ = evaluate(dataclasses.replace(spec, first=first, grid=4))
    expected = grid(generate(model, spec.sampler, range(first, first + 4), 0, spec.compute))
    with Image.open(Path(spec.output_dir) / record["grid"]) as picture:
        difference = np.array(picture).astype(int) - expected[0].numpy()
    assert np.abs(difference).max() <= 1
    record, _ = evaluate(dataclasses.replace(spec, seed=1))
    assert "grid" not in record


def test_grids_have_different_names(spec: EvaluateSpec) -> None:
    clipped = dataclasses.replace(spec.sampler, clip="x0")
    larger = dataclasses.replace(spec.sampler, rule="sigma_hat", eta=None)
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"sampler": clipped}, {"sampler": larger}]
    names = [evaluate(dataclasses.replace(spec, grid=1, **change))[0]["grid"] for change in changes]
    assert len(set(names)) == len(names)
