"""Metrics and features that are computed while images are sampled: the same numbers, at the same time."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ddim.evaluation import fidelity, job
from ddim.evaluation.features import FeatureExtractor
from ddim.evaluation.fidelity import EvaluateSpec, evaluate, evaluate_in_steps
from ddim.evaluation.session import Session
from ddim.inference import generate
from ddim.results.records import Record

pytestmark = pytest.mark.integration
SECONDS = ("seconds_sampling", "seconds_metrics")
PATIENCE = 30.0  # seconds, after which something is not done at the same time


def content(record: Record) -> Record:
    """What a record states besides times and folders."""
    config = {key: value for key, value in record["config"].items() if key != "output_dir"}
    return {key: value for key, value in record.items() if key not in SECONDS} | {"config": config}


def elsewhere(spec: EvaluateSpec) -> EvaluateSpec:
    return dataclasses.replace(spec, output_dir=f"{spec.output_dir}_other", grid=9)


def test_metrics_wait_for_no_other_evaluation(spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the first are not computed before the images of the second are sampled."""
    session, sampled, told = Session(), threading.Event(), []
    first, second = elsewhere(spec), dataclasses.replace(elsewhere(spec), seed=1)
    expected = [evaluate(dataclasses.replace(job, output_dir=spec.output_dir), session)[0] for job in (first, second)]
    compute = fidelity.compute_metrics

    def late(*arguments: Any) -> Any:
        assert sampled.wait(PATIENCE)
        assert threading.current_thread() is not threading.main_thread()
        return compute(*arguments)

    monkeypatch.setattr(fidelity, "compute_metrics", late)
    with ThreadPoolExecutor(1) as pool:
        both = [evaluate_in_steps(job, session, pool=pool, report=told.append) for job in (first, second)]
        for steps in both:
            next(steps)
        sampled.set()
        for steps, record in zip(both, expected, strict=True):
            with pytest.raises(StopIteration) as end:
                next(steps)
            found, new = end.value.value
            assert new
            assert content(found) == content(record)
    assert [content(record) for record in told] == list(map(content, expected))
    assert [*Path(first.output_dir).glob("unfinished/*/*")] == []
    assert [evaluate(job, session)[1] for job in (first, second)] == [False, False]


def test_features_are_extracted_beside_sampling(spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a batch on a GPU, while the next batch is sampled; pictures too."""
    spec = dataclasses.replace(spec, save_images=True)
    session = Session()
    expected, _ = evaluate(spec, session)
    extract, sample = FeatureExtractor.extract, generate.generate_batch
    started = [threading.Event() for _ in range(3)]  # the sampling of each batch
    sampling, extracting = iter(started), iter([*started[1:], started[2]])

    def note(*arguments: Any) -> Any:
        next(sampling).set()
        return sample(*arguments)

    def late(self: FeatureExtractor, images: Any) -> Any:
        assert next(extracting).wait(PATIENCE)
        return extract(self, images)

    monkeypatch.setattr(job.Job, "overlaps", True)
    monkeypatch.setattr(generate, "generate_batch", note)
    monkeypatch.setattr(FeatureExtractor, "extract", late)
    record, new = evaluate(elsewhere(spec), session)
    assert new
    assert record["metrics"] == expected["metrics"]
    assert record["intervals"] == expected["intervals"]
    pictures = [
        {path.name: path.read_bytes() for path in Path(folder).glob("images/*/*.png")}
        for folder in (spec.output_dir, elsewhere(spec).output_dir)
    ]
    assert len(pictures[0]) == spec.n
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("device", "graphs", "expected"), [("cpu", False, False), ("cuda", False, True), ("cuda", True, False)]
)
def test_only_gpus_that_capture_no_graphs_overlap(
    spec: EvaluateSpec, device: str, graphs: bool, expected: bool
) -> None:
    compute = dataclasses.replace(spec.compute, device=device, graphs=graphs)
    assert dataclasses.replace(spec.prepare(Session()), compute=compute).overlaps == expected
