"""Evaluations of a conditional model: what a record states, metrics of classes, tables by w."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim import GuidanceSpec
from ddim.checkpoints import load_model
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import MemoryImages
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.class_labels import share_warning
from ddim.evaluation.feature_stats import FeatureSet, feature_set
from ddim.evaluation.features import FeatureExtractor
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.influence import compute_influences
from ddim.evaluation.metrics import MetricSpec, compute_class_metrics, compute_metrics
from ddim.evaluation.session import Session
from ddim.inference.compute import ComputeSpec
from ddim.inference.conditioning import conditioned
from ddim.inference.generate import generate
from ddim.results.report import build_tables
from ddim.results.text import class_csv

METRICS = ("fd", "intra_fd", "accuracy")
SPEC = MetricSpec("digits_classifier", METRICS, batch_size=1000)
DIGITS = DataSpec("digits", (8, 8), 1, flip=False, labels="classes")


def of_metrics(*names: str) -> MetricSpec:
    return MetricSpec("digits_classifier", names)


def labelled(n: int, seed: int, labels: torch.Tensor) -> FeatureSet:
    features = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    features = features + labels[:, None]
    made = feature_set({"64": features, "logits": features[:, :3]}, "64")
    return dataclasses.replace(made, labels=labels)


def test_metrics_of_classes_are_those_of_their_images_alone() -> None:
    x, y = labelled(90, 0, torch.arange(90) % 3), labelled(200, 1, torch.arange(200) % 4)
    of_classes = compute_class_metrics(x, y, SPEC, 90)
    for label in range(3):
        a, b = (feature_set({"64": s.features["64"][s.labels == label]}, "64") for s in (x, y))
        alone = compute_metrics(a, b, MetricSpec("digits_classifier"), 30)
        assert of_classes["intra_fd_digits_classifier_90"][label] == next(iter(alone.values()))
        correct = [int(row.argmax()) == label for row in x.features["logits"][label::3]]
        assert of_classes["accuracy_digits_classifier_90"][label] == sum(correct) / 30
    metrics = compute_metrics(x, y, SPEC, 90, of_classes)
    assert list(metrics) == [f"{name}_digits_classifier_90" for name in ("intra_fd", "accuracy", "fd")]
    for name, values in of_classes.items():
        assert metrics[name] == pytest.approx(sum(values.values()) / 3)


@pytest.mark.parametrize(
    ("label", "shares", "warned"),
    [
        ("all", (5, 5), ""),
        ("all", (5, 6), ""),
        ("all", (1, 9), "50.0%, and x has 10.0% of 0"),
        ("all", (), ""),
        (1, (1, 9), ""),
    ],
)
def test_other_shares_of_classes_are_warned_of(
    conditional_checkpoint: Path, label: str | int, shares: tuple[int, ...], warned: str
) -> None:
    model = conditioned(load_model(str(conditional_checkpoint)), label, GuidanceSpec())
    assert model.condition is not None
    model = dataclasses.replace(model, condition=dataclasses.replace(model.condition, classes=("0", "1")))
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(shares)) if shares else None
    images = MemoryImages("x", torch.zeros(max(1, sum(shares)), 1, 8, 8, dtype=torch.uint8), labels, ("0", "1"))
    warning = share_warning(model, images)
    assert (warned in str(warning)) if warned else warning is None


@pytest.mark.parametrize("metric", ["intra_fd", "accuracy"])
def test_influences_are_derivatives_by_the_weights(metric: str) -> None:
    """An image of weight 2 in its class: the number moves by its influence, to first order."""
    n, labels = 6000, (torch.arange(6000) % 6).clamp(max=2)  # 1,000, 1,000 and 4,000 images
    x, y = labelled(n, 0, labels), labelled(900, 1, torch.arange(900) % 3)
    spec = MetricSpec("digits_classifier", (metric,))
    influences = compute_influences(x, y, spec, [], torch.device("cpu"))[f"{metric}_digits_classifier_6k"]
    numbers = []
    for i in (0, 6, 18):  # of one class
        again = torch.cat([torch.arange(n), torch.tensor([i])])
        features = {name: values[again] for name, values in x.features.items()}
        more = dataclasses.replace(feature_set(features, "64"), labels=labels[again])
        numbers.append(compute_metrics(more, y, spec, n + 1, compute_class_metrics(more, y, spec, n + 1)))
    first, *others = (next(iter(metrics.values())) for metrics in numbers)
    for i, number in zip((6, 18), others, strict=True):
        assert n * (number - first) == pytest.approx(influences[i] - influences[0], rel=0.05, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"extractor": "pixels", "metrics": ("accuracy",)}, "accuracy of classes needs class logits, which pixels"),
        ({"metrics": ("intra_fd",), "reference_npz": "a.npz"}, "intra_fd needs the features of the reference"),
        ({"metrics": ("accurcy",)}, "did you mean accuracy"),
    ],
)
def test_metrics_without_what_they_need_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        MetricSpec(**{"extractor": "digits_classifier", **changes})


@pytest.fixture(scope="module")
def shared() -> Session:
    return Session()


@pytest.fixture
def of_classes(spec: EvaluateSpec, conditional_checkpoint: Path) -> EvaluateSpec:
    spec = dataclasses.replace(
        spec, checkpoint=str(conditional_checkpoint), data=DIGITS, metric=SPEC, n=40, label="all"
    )
    return dataclasses.replace(spec, guidance=GuidanceSpec(0.5), compute=ComputeSpec("cpu", batch_size=25))


@pytest.mark.integration
def test_record_states_label_guidance_and_its_evaluations(of_classes: EvaluateSpec, shared: Session) -> None:
    record, new = evaluate(of_classes, shared)
    assert new
    assert record["condition"] == {"label": "all", "w": 0.5}
    assert (record["S"], record["nfe"], record["network_evaluations"]) == (3, 6, 40 * 6)
    assert record["label"] == "η=0.5, w=0.5"
    assert len(record["reference"]["labels"]) == 64
    assert set(record["intervals"]) == set(record["metrics"])
    model = conditioned(shared.model(of_classes.checkpoint, "ema", of_classes.compute)[0], "all", of_classes.guidance)
    images = generate(model, of_classes.sampler, range(40), 0, ComputeSpec("cpu"))
    real, extractor = load_images(DIGITS), FeatureExtractor("digits_classifier", "cpu", logits=True)
    sides = [
        dataclasses.replace(feature_set(extractor.extract(pixels), "64"), labels=labels)
        for pixels, labels in ((images, torch.arange(40) % 10), (real, real.labels))
    ]
    expected = compute_class_metrics(*sides, SPEC, 40)
    for name, values in expected.items():
        assert list(record["per_class"][name]) == [str(digit) for digit in range(10)]
        assert list(record["per_class"][name].values()) == pytest.approx(list(values.values()), rel=1e-2, abs=1e-2)
    assert evaluate(of_classes, shared) == (json.loads(json.dumps(record)), False)


@pytest.mark.integration
def test_each_w_is_a_row_and_guidance_counts_twice(of_classes: EvaluateSpec, shared: Session) -> None:
    guidances = [GuidanceSpec(w) for w in (-1.0, 0.0, 2.0, 10.0)] + [GuidanceSpec(2.0, (17, 40))]
    few = dataclasses.replace(of_classes, sampler=SamplerSpec(S=3), metric=of_metrics(*METRICS[1:]))
    specs = [dataclasses.replace(few, guidance=guidance) for guidance in guidances]
    specs += [dataclasses.replace(few, guidance=GuidanceSpec(), label=label) for label in (None, 7)]
    specs[-2] = dataclasses.replace(specs[-2], metric=of_metrics("fd"))
    records = [evaluate(spec, shared)[0] for spec in specs]
    assert len({record["key"] for record in records}) == 7
    table = next(t for t in build_tables(records) if t.metric.startswith("accuracy"))
    names = ("w=-1", "w=0", "w=2", "w=2 in [17, 40]", "w=10", "7, w=0")
    assert table.rows == [f"η=0.0, {name}" for name in names]
    assert (table.column, table.columns) == ("NFE", [3, 4, 6])
    assert [nfe for row, nfe in sorted(table.entries) if "in [" in row] == [4]
    assert "less is better" not in dict(table.describe_protocol(full=False))["metric"]
    assert records[-2]["label"] == "η=0.0, no label"
    assert records[-2]["condition"] == {"label": None, "w": 0.0}
    lines = class_csv(records).splitlines()
    assert lines[0] == "sampler,S,nfe,metric,class,value,key"
    assert len(lines) == 1 + 2 * (5 * 10 + 1)
    assert list(records[-1]["per_class"]["accuracy_digits_classifier_40"]) == ["7"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": None, "guidance": GuidanceSpec()}, "needs images of classes; give label=all"),
        ({"data": dataclasses.replace(DIGITS, labels=None)}, "digits has no labels, .*; give data.labels"),
        ({"n": 19}, "at least 2 images of each class on each side, not 1 generated and .* of 9"),
        ({"label": "o"}, "label=o is no class of the checkpoint"),
    ],
)
def test_metrics_of_classes_are_refused_before_work(
    of_classes: EvaluateSpec, shared: Session, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        dataclasses.replace(of_classes, **changes).prepare(shared)


@pytest.mark.integration
def test_classes_must_be_those_of_the_extractor_and_the_data(
    of_classes: EvaluateSpec, tmp_path: Path, make_checkpoint: Any
) -> None:
    other = make_checkpoint(tmp_path / "a.ckpt", classes=("cat", "dog"))
    spec = dataclasses.replace(of_classes, checkpoint=str(other), metric=of_metrics("accuracy"))
    with pytest.raises(UserError, match="digits_classifier has 10, and the checkpoint knows 2 classes"):
        spec.prepare(Session())
    spec = dataclasses.replace(spec, metric=of_metrics("intra_fd"))
    with pytest.raises(UserError, match=r"digits has the classes 0, 1, .*, and the checkpoint knows cat, dog"):
        spec.prepare(Session())
