"""Reference statistics: measured, cached under what decides them, or read from a published file."""

import dataclasses
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from two_processes import run_in_processes

from ddim.data.images import MemoryImages
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.evaluation import reference_stats
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.metrics import FeatureExtractor, MetricSpec
from ddim.evaluation.reference_stats import measure_reference, published_reference
from ddim.evaluation.session import Session

SPEC = MetricSpec("digits_classifier")


@pytest.fixture
def images() -> MemoryImages:
    generator = torch.Generator().manual_seed(0)
    return MemoryImages("noise-train", torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator))


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("features were extracted")

    monkeypatch.setattr(FeatureExtractor, "extract", fail)


def test_statistics_equal_those_of_numpy(images: MemoryImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_stats, "SHARD_SIZE", 25)
    extractor = SPEC.build_extractor("cpu")
    features = extractor.extract(images.images)["64"].double().numpy()
    first = measure_reference(images, {"a": 1}, extractor, tmp_path)
    assert first.count == 60
    assert first.mean.numpy() == pytest.approx(features.mean(0), rel=1e-6)
    assert first.covariance.numpy() == pytest.approx(np.cov(features, rowvar=False), rel=1e-5, abs=1e-6)
    [file] = tmp_path.glob("*.npz")
    assert file.name.startswith("noise-train_")
    with np.load(file) as arrays:
        assert arrays["mu"] == pytest.approx(features.mean(0), rel=1e-6)
    forbid(monkeypatch)
    again = measure_reference(images, {"a": 1}, extractor, tmp_path)
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.covariance, again.covariance)
    with pytest.raises(AssertionError, match="extracted"):
        measure_reference(images, {"a": 2}, extractor, tmp_path)


def test_features_are_kept_if_a_metric_needs_them(
    images: MemoryImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_reference(images, {}, SPEC.build_extractor("cpu"), tmp_path)  # moments only
    extractor = MetricSpec("digits_classifier", ("fd", "prc")).build_extractor("cpu")
    expected = extractor.extract(images.images)["64"]
    result = measure_reference(images, {}, extractor, tmp_path, with_features=True)
    torch.testing.assert_close(result.features["64"], expected)
    forbid(monkeypatch)
    assert torch.equal(
        measure_reference(images, {}, extractor, tmp_path, with_features=True).features["64"], result.features["64"]
    )


def test_concurrent_jobs_measure_the_reference_once(
    images: MemoryImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one removes the shards that another is about to read, which then takes the moments of what is left."""
    monkeypatch.setattr(reference_stats, "SHARD_SIZE", 10)
    asked: list[int] = []

    class Slow(FeatureExtractor):
        def extract(self, images: Any) -> Any:
            asked.append(len(images))
            time.sleep(0.02)
            return super().extract(images)

    def measure(_: int) -> Any:
        return measure_reference(images, {}, Slow("digits_classifier", "cpu"), tmp_path)

    with ThreadPoolExecutor(4) as jobs:
        results = [*jobs.map(measure, range(4))]
    assert asked == [10] * 6
    assert {known.count for known in results} == {60}
    assert all(torch.equal(results[0].covariance, known.covariance) for known in results)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz", ".lock"}


def measure_share(processes: Processes, images: MemoryImages, folder: Path) -> tuple[Any, int]:
    reference_stats.SHARD_SIZE = 10
    extractor, extract, asked = SPEC.build_extractor("cpu"), FeatureExtractor.extract, []

    def noted(images: Any) -> Any:
        asked.append(len(images))
        return extract(extractor, images)

    extractor.extract = noted  # type: ignore[method-assign]
    stats = measure_reference(images, {}, extractor, folder, processes)
    return stats, sum(asked)


@pytest.mark.integration
def test_processes_measure_a_share_of_the_reference(
    images: MemoryImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_stats, "SHARD_SIZE", 10)  # on some processors features depend on the batch's size
    expected = measure_reference(images, {}, SPEC.build_extractor("cpu"), tmp_path / "one")
    results = run_in_processes(measure_share, images, tmp_path / "three", to=tmp_path / "results", count=3)
    assert [extracted for _, extracted in results] == [20, 20, 20]
    for stats, _ in results:
        assert stats.has_moments_of(results[0][0])
        torch.testing.assert_close(stats.mean, expected.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.covariance, expected.covariance, rtol=1e-6, atol=1e-9)


def test_a_published_file_gives_the_same_distance(spec: EvaluateSpec, tmp_path: Path) -> None:
    measured, _ = evaluate(spec)
    [file] = (tmp_path / "reference").glob("digits_*.npz")
    with np.load(file) as arrays:  # as another code base writes it: without the number of images
        np.savez(tmp_path / "theirs.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    npz = dataclasses.replace(spec.metric, reference_npz=str(tmp_path / "theirs.npz"))
    published, new = evaluate(dataclasses.replace(spec, metric=npz))
    assert new
    assert published["metrics"] == pytest.approx(measured["metrics"], rel=1e-12)
    assert published["reference"]["name"] == "theirs.npz"
    assert len(published["reference"]["fingerprint"]) == 64
    assert published["key"] != measured["key"]


def test_a_published_file_needs_no_data_set(spec: EvaluateSpec, tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(64), sigma=np.eye(64))
    npz = dataclasses.replace(spec.metric, reference_npz=str(tmp_path / "theirs.npz"))
    absent = dataclasses.replace(spec.data, name="folder", root=str(tmp_path / "absent"))
    with_data, _ = evaluate(dataclasses.replace(spec, metric=npz))
    record, new = evaluate(dataclasses.replace(spec, metric=npz, data=absent))
    assert (record["key"], new) == (with_data["key"], False)
    again, new = evaluate(dataclasses.replace(spec, metric=npz, data=absent, output_dir=str(tmp_path / "other")))
    assert (again["metrics"], new) == (record["metrics"], True)


def test_a_changed_published_file_is_read_again(tmp_path: Path) -> None:
    npz, session, expected = tmp_path / "theirs.npz", Session(), []
    for i in range(2):
        np.savez(npz, mu=np.full(64, float(i)), sigma=np.eye(64))
        os.utime(npz, ns=(i, i))
        stats, fingerprint = session.published_stats(str(npz), SPEC, "cpu", (1, 8, 8))
        assert float(stats.mean[0]) == i
        expected.append(fingerprint)
    assert expected[0] != expected[1] == hashlib.sha256(npz.read_bytes()).hexdigest()


def test_statistics_of_another_extractor_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    spec = dataclasses.replace(SPEC, reference_npz=str(tmp_path / "inception.npz"))
    with pytest.raises(UserError, match=r"shape \(2048,\) .* the mean and covariance of 64 features"):
        published_reference(str(spec.reference_npz), spec.build_extractor("cpu"), (1, 8, 8))


@pytest.mark.parametrize("length", [0, 100])
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_damaged_cache_is_measured_again(
    images: MemoryImages,
    tmp_path: Path,
    suffix: str,
    length: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    extractor = MetricSpec("digits_classifier", ("fd", "prc")).build_extractor("cpu")
    first = measure_reference(images, {}, extractor, tmp_path, with_features=True)
    [file] = tmp_path.glob(f"*.{suffix}")
    content = file.read_bytes()
    file.unlink()  # the features that were read are mapped from it
    file.write_bytes(content[:length])
    again = measure_reference(images, {}, extractor, tmp_path, with_features=True)
    assert torch.equal(again.covariance, first.covariance)
    assert torch.equal(again.features["64"], first.features["64"])
    assert file.read_bytes() == content
    [message] = [record.message for record in caplog.records]
    assert file.name in message
    assert message.endswith("It is measured again.")


@pytest.mark.parametrize("metric", ["kd", "prc"])
def test_feature_metrics_refuse_published_moments(metric: Any) -> None:
    with pytest.raises(ValueError, match=f"{metric} needs the features"):
        MetricSpec("digits_classifier", ("fd", metric), reference_npz="x.npz")


def test_a_long_name_is_cut_in_the_cache(images: MemoryImages, tmp_path: Path) -> None:
    extractor = SPEC.build_extractor("cpu")
    for name in (240 * "n", 120 * "ä"):
        measure_reference(MemoryImages(name, images.images), {"name": name}, extractor, tmp_path)
    assert len([*tmp_path.glob("*.npz")]) == 2
