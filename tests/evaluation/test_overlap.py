"""Metrics and features that are computed while images are sampled: the same numbers, at the same time."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.evaluation import fidelity, job
from ddim.evaluation.features import FeatureExtractor
from ddim.evaluation.fidelity import EvaluateSpec, evaluate, evaluate_in_steps
from ddim.evaluation.session import Session
from ddim.inference import generate
from ddim.networks import float32_products
from ddim.results.records import Record

pytestmark = pytest.mark.integration
SECONDS = ("seconds_sampling", "seconds_metrics")
PATIENCE = 30.0  # seconds, after which something is not done at the same time


def content(record: Record) -> Record:
    """What a record states besides times and folders; of intervals ten digits, since threads add in another order."""
    config = {key: value for key, value in record["config"].items() if key != "output_dir"}
    intervals = {name: [float(f"{end:.9e}") for end in ends] for name, ends in record["intervals"].items()}
    kept = {key: value for key, value in record.items() if key not in SECONDS}
    return kept | {"config": config, "intervals": intervals}


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
    precisions: list[tuple[bool, bool]] = []
    sampling, extracting = iter(started), iter([*started[1:], started[2]])

    def note(*arguments: Any) -> Any:
        next(sampling).set()
        return sample(*arguments)

    def late(self: FeatureExtractor, images: Any) -> Any:
        assert next(extracting).wait(PATIENCE)
        precisions.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return extract(self, images)

    monkeypatch.setattr(job.Job, "overlaps", True)
    monkeypatch.setattr(generate, "generate_batch", note)
    monkeypatch.setattr(FeatureExtractor, "extract", late)
    with float32_products(tf32=True):  # features are never in TF32, whatever the rest of the process does
        record, new = evaluate(elsewhere(spec), session)
    assert new
    assert {*precisions} == {(False, False)}
    assert record["metrics"] == expected["metrics"]
    assert record["intervals"] == expected["intervals"]
    pictures = [
        {path.name: path.read_bytes() for path in Path(folder).glob("images/*/*.png")}
        for folder in (spec.output_dir, elsewhere(spec).output_dir)
    ]
    assert len(pictures[0]) == spec.n
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"device": "cpu"}, False),
        ({"device": "cuda"}, True),
        ({"device": "cuda", "graphs": True}, False),
        ({"device": "cuda", "tf32": True}, False),
        ({"device": "cuda", "tf32": True, "bf16": True}, True),
    ],
    ids=str,
)
def test_only_gpus_without_graphs_and_tf32_overlap(
    spec: EvaluateSpec, settings: dict[str, Any], expected: bool
) -> None:
    compute = dataclasses.replace(spec.compute, **settings)
    prepared = dataclasses.replace(spec.prepare(Session()), compute=compute)
    assert prepared.overlaps == expected
    assert prepared.shares_gpu == (compute.device == "cuda" and not compute.graphs)  # for metrics, in float64
