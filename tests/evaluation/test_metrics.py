"""Distances against closed forms, torch-fidelity's own command, and cases whose answer is known by construction."""

import math
import typing

import pytest
import torch
from composed import group_values

from ddim.config import build
from ddim.errors import UserError
from ddim.evaluation import metrics
from ddim.evaluation.feature_stats import FeatureSet, feature_set
from ddim.evaluation.features import EXTRACTORS
from ddim.evaluation.influence import compute_influences
from ddim.evaluation.metrics import (
    METRICS,
    MetricSpec,
    check_sizes,
    compute_metrics,
    describe,
    metric_name,
)
from ddim.results.protocol import is_distance

OFFLINE = [name for name in EXTRACTORS if name != "inception"]
DIGITS = MetricSpec("digits_classifier")


def normal(n: int, dimension: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, dimension, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def of(features: torch.Tensor, **others: torch.Tensor) -> FeatureSet:
    return feature_set({"64": features, **others}, "64")


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return compute_metrics(of(a), of(b), DIGITS, len(a))[metric_name("fd", "digits_classifier", len(a))]


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """|m1 - m2|² + tr(S1) + tr(S2) - 2 tr((S1^½ S2 S1^½)^½), with symmetric eigenvalues only."""
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(s1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def test_frechet_distance_is_zero_with_itself_and_symmetric() -> None:
    a = normal(300, 64, 0, torch.float32)
    b = 1.3 * normal(200, 64, 1, torch.float32) + 0.2
    assert 0 <= distance(a, a) < 1e-6
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-6)


@pytest.mark.parametrize("dimension", [2, 16, 64])
def test_frechet_distance_is_the_closed_form(dimension: int) -> None:
    mixing = normal(dimension, dimension, 2)
    a = normal(500, dimension, 0) @ mixing
    b = normal(300, dimension, 1) * torch.linspace(0.5, 2, dimension) + 0.3
    assert distance(a, b) == pytest.approx(frechet(a, b), rel=1e-6)


def test_frechet_distance_of_gaussians_is_the_analytic_value() -> None:
    """Axis-aligned Gaussians: sum of (m1 - m2)² + (s1 - s2)², within five standard errors of the estimate."""
    n = 40_000
    means = torch.tensor([0.0, 0.5, -1.0, 2.0], dtype=torch.float64)
    std1 = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    std2 = torch.tensor([1.0, 1.5, 1.0, 3.0], dtype=torch.float64)
    expected = (means.square() + (std1 - std2).square()).sum()
    spread = std1.square() + std2.square()  # a mean has variance std²/n, a standard deviation std²/(2n)
    error = ((4 * means.square() * spread + 2 * (std1 - std2).square() * spread).sum() / n).sqrt()
    measured = distance(normal(n, 4, 0) * std1, means + normal(n, 4, 1) * std2)
    assert abs(measured - expected) < 5 * error
    assert 5 * error < 0.05 * expected  # the test can fail


def test_shifting_a_set_adds_the_squared_shift() -> None:
    a = normal(400, 8, 0)
    shift = torch.linspace(-1, 1, 8, dtype=torch.float64)
    assert distance(a + shift, a) == pytest.approx(shift.square().sum().item(), rel=1e-6)
    assert distance(3 * a, 3 * (a + shift)) == pytest.approx(9 * distance(a, a + shift), rel=1e-6)


def test_numbers_equal_those_of_torch_fidelity() -> None:
    """End to end on the same images: every metric is the one that torch_fidelity.calculate_metrics gives."""
    import torch_fidelity

    class Images(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, images: torch.Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.images[index]

    generator = torch.Generator().manual_seed(0)
    generated = torch.randint(256, (130, 1, 8, 8), generator=generator, dtype=torch.uint8)
    reference = torch.randint(200, (150, 1, 8, 8), generator=generator, dtype=torch.uint8)
    spec = MetricSpec("digits_classifier", ("fd", "kd", "is", "prc"), kid_subset_size=50, kid_subsets=5)
    extractor = spec.build_extractor("cpu")
    sides = [feature_set(extractor.extract(images), "64") for images in (generated, reference)]
    result = compute_metrics(*sides, spec, 130)
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(generated),
        input2=Images(reference),
        feature_extractor="digits-classifier",
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        **{"kid_subset_size": 50, "kid_subsets": 5},
        **{"cuda": False, "save_cpu_ram": True, "cache": False, "verbose": False},
    )
    # Ours are float64 throughout.
    assert result.pop("fd_digits_classifier_130") == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert result.pop("kd_digits_classifier_130") == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert result == {
        "is_digits_classifier_130": theirs["inception_score_mean"],
        "precision_digits_classifier_130": theirs["precision"],
        "recall_digits_classifier_130": theirs["recall"],
    }


@pytest.mark.parametrize("n", [2, 20, 63, 64, 200])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_set_has_the_distance_0_to_itself(n: int, scale: float) -> None:
    """Also with fewer images than dimensions, where rounding alone decides the eigenvalues that should be 0."""
    a = scale * (normal(n, 64, 0, torch.float32) + 5)
    assert 0 <= distance(a, a) < 1e-6 * scale**2


@pytest.mark.parametrize("mean", [30.0, 1000.0])
def test_a_mean_far_above_the_spread_is_no_matter(mean: float) -> None:
    """The kernel distance is that of torch-fidelity in float64; precision and recall are those of centred features."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    spec = MetricSpec("digits_classifier", ("kd", "prc"), kid_subset_size=200, kid_subsets=1)
    spread, shift = 0.01 * mean / 30, 0.003 * mean / 30
    # Rounded to float32 with the mean, so that the centred features are exactly the same numbers.
    a = (mean + spread * normal(200, 64, 0)).float()
    b = (mean + spread * normal(200, 64, 1) + shift).float()
    far = compute_metrics(of(a), of(b), spec, 200)
    near = compute_metrics(of(a.double() - mean), of(b.double() - mean), spec, 200)
    for name in ("precision", "recall"):
        assert far[f"{name}_digits_classifier_200"] == near[f"{name}_digits_classifier_200"]
        assert 0.05 < far[f"{name}_digits_classifier_200"] < 0.95  # the test can fail
    theirs = kid_features_to_metric(a.double(), b.double(), kid_subset_size=200, kid_subsets=1, verbose=False)
    expected = theirs["kernel_inception_distance_mean"]
    assert far["kd_digits_classifier_200"] == expected
    x, y = mean, mean + shift  # without the spread, which adds little
    assert expected == pytest.approx((x * x + 1) ** 3 + (y * y + 1) ** 3 - 2 * (x * y + 1) ** 3, rel=0.3)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_calls_a_copy_of_the_reference_better(metric: str) -> None:
    """Than images of another kind, in each of its numbers, and with the same numbers each time."""
    spec = MetricSpec("digits_classifier", (metric,), kid_subset_size=50, kid_subsets=3)
    a, b = normal(100, 8, 0), 3 + 0.5 * normal(100, 8, 1)
    sides = (of(a.clone(), logits=5 * a), of(a.clone(), logits=5 * a), of(b, logits=b))
    copy, again, far = (METRICS[metric](side, of(a, logits=5 * a), spec) for side in sides)
    assert copy == again
    assert [*copy] == [*far] == (["precision", "recall"] if metric == "prc" else [metric])
    for name in copy:
        assert math.isfinite(copy[name])
        sign = 1 if is_distance(metric_name(name, "digits_classifier", 100)) else -1
        assert sign * copy[name] < sign * far[name]


def test_precision_and_recall_of_equal_and_of_disjoint_sets() -> None:
    spec = MetricSpec("digits_classifier", ("prc",))
    a = normal(60, 8, 0, torch.float32)
    same = compute_metrics(of(a), of(a), spec, 60)
    assert same == {"precision_digits_classifier_60": 1, "recall_digits_classifier_60": 1}
    far = compute_metrics(of(a + 1000), of(a), spec, 60)
    assert far == {"precision_digits_classifier_60": 0, "recall_digits_classifier_60": 0}


def test_generating_one_mode_of_two_is_precise_and_recalls_half() -> None:
    spec = MetricSpec("digits_classifier", ("prc",))
    mode = normal(50, 4, 0, torch.float32)
    both = torch.cat([mode, mode + 1000])
    one = compute_metrics(of(mode), of(both), spec, 50)
    assert one == {"precision_digits_classifier_50": 1, "recall_digits_classifier_50": 0.5}


def test_neighbours_of_the_reference_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, whose size changes nothing."""
    asked: list[tuple[int, int]] = []
    cdist = torch.cdist

    def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        asked.append((len(x), len(y)))
        return cdist(x, y)

    monkeypatch.setattr(torch, "cdist", distances)
    spec, reference = MetricSpec("digits_classifier", ("prc",)), of(normal(90, 8, 0))
    whole = compute_metrics(of(normal(40, 8, 2)), of(normal(90, 8, 0)), spec, 40)
    assert asked.count((90, 90)) == 1
    asked.clear()
    monkeypatch.setattr(metrics, "PRC_BLOCK", 2000)
    for seed in (1, 2):
        generated = of(normal(40, 8, seed))
        measured = compute_metrics(generated, reference, spec, 40)
        influence = compute_influences(generated, reference, spec, [], torch.device("cpu"))
        inside = influence["precision_digits_classifier_40"] > 0
        assert measured["precision_digits_classifier_40"] == pytest.approx(inside.mean())
        assert 0 < inside.mean() < 1
    assert measured == whole
    assert max(x * y for x, y in asked) <= 2000
    # Of the reference and of each generated set to themselves, of both to each other, and of these once more.
    assert sum(x * y for x, y in asked) == 90 * 90 + 2 * (40 * 40 + 3 * 40 * 90)


def test_kernel_distance_is_the_unbiased_cubic_mmd() -> None:
    """With one subset of all images: the double sums written out, without the diagonals of the two equal sets."""
    spec = MetricSpec("digits_classifier", ("kd",), kid_subset_size=30, kid_subsets=1)
    a, b = normal(30, 5, 0), normal(30, 5, 1) + 0.5
    kernel = {(i, j): (x @ y.T / 5 + 1) ** 3 for i, x in enumerate((a, b)) for j, y in enumerate((a, b))}
    off_diagonal = 1 - torch.eye(30, dtype=torch.float64)
    within = ((kernel[0, 0] + kernel[1, 1]) * off_diagonal).sum() / (30 * 29)
    expected = float(within - 2 * kernel[0, 1].mean())
    assert compute_metrics(of(a), of(b), spec, 30)["kd_digits_classifier_30"] == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_sure_and_of_clueless_logits() -> None:
    spec = MetricSpec("digits_classifier", ("is",))
    for logits, expected in ((50 * torch.eye(10).repeat(1000, 1), 10), (torch.zeros(10_000, 10), 1)):
        features = of(torch.zeros(10_000, 64), logits=logits)
        measured = compute_metrics(features, features, spec, 10_000)["is_digits_classifier_10k"]
        assert measured == pytest.approx(expected, rel=0.01)  # splits of 1,000 are not exactly balanced


@pytest.mark.parametrize("n", [2, 360, 1000, 49_984, 50_000])
@pytest.mark.parametrize("metric", ["fd", "kd", "is", "precision", "recall"])
@pytest.mark.parametrize("extractor", OFFLINE)
def test_nothing_offline_is_called_fid_or_kid(extractor: str, metric: str, n: int) -> None:
    name = metric_name(metric, extractor, n)
    assert "fid" not in name
    assert "kid" not in name
    assert name.startswith(f"{metric}_{extractor}_")


@pytest.mark.parametrize(
    ("metric", "n", "name"),
    [
        ("fd", 50_000, "fid_50k"),
        ("fd", 1000, "fid_1k"),
        ("fd", 360, "fid_360"),
        ("fd", 1500, "fid_1500"),
        ("fd", 49_984, "fid_49984"),
        ("kd", 50_000, "kid_50k"),
        ("is", 50_000, "is_50k"),
        ("precision", 50_000, "precision_50k"),
        ("recall", 50_000, "recall_50k"),
    ],
)
def test_names_of_inception_metrics(metric: str, n: int, name: str) -> None:
    assert metric_name(metric, "inception", n) == name


@pytest.mark.parametrize(
    ("metrics", "n", "reference", "sentence"),
    [
        (("fd",), 1, 100, "at least 2 images"),
        (("fd",), 100, 1, "at least 2 images"),
        (("kd",), 999, 2000, "metric.kid_subset_size to at most 999"),
        (("kd",), 2000, 999, "metric.kid_subset_size to at most 999"),
        (("is",), 9, 100, "10 splits"),
        (("prc",), 3, 100, "at least 4"),
        (("prc",), 100, 3, "at least 4"),
    ],
)
def test_sets_that_are_too_small_are_refused(metrics: typing.Any, n: int, reference: int, sentence: str) -> None:
    spec = MetricSpec("digits_classifier", metrics)
    with pytest.raises(UserError, match=sentence):
        check_sizes(spec, n, reference)
    with pytest.raises(UserError, match=sentence):
        compute_metrics(of(torch.zeros(n, 64)), of(torch.zeros(reference, 64)), spec, n)


def test_wrong_counts_and_infinite_features_are_refused() -> None:
    a = normal(10, 64, 0)
    with pytest.raises(UserError, match="10 generated images where n=11"):
        compute_metrics(of(a), of(a), DIGITS, 11)
    extractor = DIGITS.build_extractor("cpu")
    extractor.network.net.hidden.bias[5] = math.inf
    with pytest.raises(UserError, match="features of layer 64 are not finite"):
        extractor.extract(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))


def test_frechet_distance_equals_torch_fidelity() -> None:
    """With its own mean and covariance of the features, also of many dimensions far from 0 as Inception's are."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    for dimension in (8, 200):
        a = normal(500, dimension, 0, torch.float32).abs() + 0.5
        b = 1.1 * normal(700, dimension, 1, torch.float32).abs() + 0.5
        sides = [fid_features_to_statistics(features.double()) for features in (a, b)]
        theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
        assert distance(a, b) == pytest.approx(theirs, rel=1e-9)
        sides = [fid_features_to_statistics(features) for features in (a, b)]  # its own means are float32
        theirs = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
        assert distance(a, b) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"extractor": "digits"}, "allowed: inception, digits_classifier"),
        ({"extractor": "pixels", "metrics": ["is"]}, "class logits"),
        ({"extractor": "pixels", "metrics": []}, "at least one"),
        ({"extractor": "pixels", "metrics": ["fd", "fd"]}, "each once"),
        ({"extractor": "pixels", "metrics": ["fid"]}, "allowed: fd, kd, is, prc"),
        ({"extractor": "pixels", "weights_path": "x.pth"}, "set it null"),
        ({"extractor": "pixels", "batch_size": 0}, "at least 1"),
        ({"extractor": "pixels", "kid_subset_size": 1}, "at least 2"),
        ({"extractor": "pixels", "reference_split": "val"}, "train, test"),
    ],
)
def test_refused_specs(values: dict[str, typing.Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        build(MetricSpec, values, "metric")


def test_unregistered_names_are_refused_with_the_list() -> None:
    with pytest.raises(UserError, match=f"unknown extractor 'pixel' .*did you mean pixels.*{', '.join(EXTRACTORS)}"):
        MetricSpec("pixel")
    with pytest.raises(UserError, match=f"unknown metric 'fid'.*allowed: {', '.join(METRICS)}"):
        MetricSpec("pixels", ("fid",))


@pytest.mark.parametrize("name", list(EXTRACTORS))
def test_each_extractor_has_its_configuration(name: str) -> None:
    values = group_values("metric", name)
    assert build(MetricSpec, values, "metric").extractor == name
    assert set(values) == set(MetricSpec.__dataclass_fields__)


def test_the_subsets_of_the_kernel_distance_are_described() -> None:
    one, *others = (
        MetricSpec("pixels", ("kd",), **changes) for changes in ({}, {"kid_subsets": 6}, {"kid_subset_size": 7})
    )
    extractor = one.build_extractor("cpu")
    assert all(describe(other, extractor) != describe(one, extractor) for other in others)
