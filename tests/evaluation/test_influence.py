"""Influences are derivatives by the weights of the images, and the intervals made of them cover what they should."""

import numpy as np
import pytest
import torch

from ddim.evaluation.feature_stats import FeatureSet, feature_set, moments
from ddim.evaluation.influence import compute_influences, frechet_influence, kernel_influence
from ddim.evaluation.metrics import METRICS, MetricSpec, compute_metrics, precision_recall
from ddim.results.interval import interval

CASES = 500
SPEC = MetricSpec("digits_classifier", ("fd", "kd", "is", "prc"), kid_subset_size=100, kid_subsets=3)


def draw(n: int, generator: torch.Generator, shift: float = 0.0, scale: float = 1.0, D: int = 6) -> torch.Tensor:
    spread = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
    return (scale * torch.randn(n, D, dtype=torch.float64, generator=generator) + shift) * spread


def of(x: torch.Tensor) -> FeatureSet:
    return feature_set({"64": x, "logits": 2 * x}, "64")


def measured(x: torch.Tensor, reference: FeatureSet, *metrics: str) -> dict[str, tuple[float, np.ndarray]]:
    """Return each metric, by the first part of its name, with its influences."""
    spec = MetricSpec("digits_classifier", metrics, kid_subset_size=100, kid_subsets=3)
    values = compute_metrics(of(x), reference, spec, len(x))
    influences = compute_influences(of(x), reference, spec, [x], torch.device("cpu"))
    return {name.partition("_")[0]: (values[name], influence) for name, influence in influences.items()}


def share_covered(cases: list[tuple[float, np.ndarray]]) -> float:
    """Return the share of intervals that hold the mean of all numbers."""
    mean = np.mean([value for value, _ in cases])
    return float(np.mean([low <= mean <= high for low, high in (interval(*case) for case in cases)]))


@pytest.mark.parametrize(
    ("metric", "n", "shift", "scale"),
    [("fd", 400, 0.5, 1.2), ("kd", 300, 0.5, 0.5), ("is", 200, 0, 1), ("prc", 100, 1, 1)],
)
def test_intervals_cover_the_mean_over_sets_of_images(metric: str, n: int, shift: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    reference = of(draw(120, generator))
    cases = [measured(draw(n, generator, shift, scale), reference, metric).popitem()[1] for _ in range(CASES)]
    assert 0.93 <= share_covered(cases) <= 0.97


def test_intervals_of_paired_differences_cover_and_are_narrow() -> None:
    """Two samplers that make nearly the same image of each x_T."""
    generator = torch.Generator().manual_seed(2)
    reference, cases, widths = of(draw(500, generator)), [], []
    for _ in range(CASES):
        x = draw(300, generator, 0.5, 1.2)
        sides = [measured(y, reference, "fd")["fd"] for y in (x, 1.05 * x + 0.02 * draw(300, generator))]
        (a, of_a), (b, of_b) = sides
        cases.append((b - a, of_b - of_a))
        widths.append(np.std(of_b - of_a) / np.std(of_a))
    assert 0.93 <= share_covered(cases) <= 0.97
    assert np.mean(widths) < 0.3


def weighted(x: torch.Tensor, weights: torch.Tensor) -> FeatureSet:
    mean = weights @ x
    return FeatureSet(len(x), mean, ((x - mean) * weights[:, None]).T @ (x - mean))


@pytest.mark.parametrize("n", [5, 40])  # fewer images than features, and more
def test_frechet_influence_is_the_derivative_by_the_weight(n: int) -> None:
    x = draw(n, torch.Generator().manual_seed(3), 0.3, 1.3)
    reference, equal = of(draw(100, torch.Generator().manual_seed(4))), torch.full((n,), 1 / n).double()
    step = 1e-3  # not less: roots of eigenvalues that should be 0 are about 1e-8, different on each processor
    spec = MetricSpec("digits_classifier")
    influence = frechet_influence([x[:2], x[2:]], weighted(x, equal), reference)
    for i in range(5):
        towards = torch.zeros(n).double()
        towards[i] = 1.0
        sides = [weighted(x, (1 - h) * equal + h * towards) for h in (step, -step)]
        up, down = (METRICS["fd"](side, reference, spec)["fd"] for side in sides)
        assert (up - down) / (2 * step) == pytest.approx(float(influence[i]), rel=1e-3)


def test_each_metric_but_recall_has_influences_with_mean_0() -> None:
    generator = torch.Generator().manual_seed(5)
    x = draw(100, generator, 0.5)
    values = measured(x, of(draw(100, generator)), *SPEC.metrics)
    assert list(values) == ["fd", "kd", "is", "precision"]
    for _, influence in values.values():
        assert influence.shape == (100,)
        assert abs(influence.mean()) < 1e-12
        assert influence.std() > 0


def test_a_set_against_itself_has_the_interval_0() -> None:
    x = draw(100, torch.Generator().manual_seed(6))
    value, influence = measured(x, of(x), "fd")["fd"]
    assert value == 0
    assert interval(value, influence) == (0, 0)


def test_frechet_influence_of_features_without_spread() -> None:
    """Some features of the digits classifier are 0 for all images."""
    x = draw(50, torch.Generator().manual_seed(7)) * torch.tensor([1, 1, 0, 1, 0, 1])
    reference = FeatureSet(*moments([draw(50, torch.Generator().manual_seed(8)) * torch.tensor([1, 0, 0, 1, 1, 1])]))
    assert torch.isfinite(frechet_influence([x], FeatureSet(*moments([x])), reference)).all()


def test_the_kernel_influence_leaves_the_diagonal_out() -> None:
    x, y = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    within, across = (x @ x.T / 3 + 1) ** 3, (x @ y.T / 3 + 1) ** 3
    rows = 2 * ((within.sum(1) - within.diagonal()) / 4 - across.mean(1))
    spec = MetricSpec("pixels", ("kd",), kid_subset_size=5, kid_subsets=1)
    found = kernel_influence(feature_set({"pixels": x}, "pixels"), feature_set({"pixels": y}, "pixels"), spec)
    torch.testing.assert_close(torch.as_tensor(found), rows - rows.mean())


def test_an_image_at_the_edge_of_a_ball_is_in_it() -> None:
    images, edge = ([[0.0], [1.0], [2.0], [3.0]], [[-3.0], [6.0], [-3.5], [7.0]])  # with radii 3, 2, 2, 3
    x, y = (feature_set({"pixels": torch.tensor(values)}, "pixels") for values in (edge, images))
    assert precision_recall(x, y, MetricSpec("pixels", ("prc",)))["precision"] == 0.5
