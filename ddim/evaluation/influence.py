"""How much each generated image moves a metric, from which `ddim.results.interval` makes 95 % intervals.

An influence is the derivative of the number by the weight of an image among the n; the reference set is fixed. It is
computed from the same features as the number, in one pass.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

from ddim.evaluation.feature_stats import FeatureSet
from ddim.evaluation.features import EXTRACTORS
from ddim.evaluation.job import Job
from ddim.evaluation.metrics import (
    INCEPTION_SCORE_SPLITS,
    RNG_SEED,
    MetricSpec,
    is_near,
    kernel_subsets,
    metric_name,
)
from ddim.results.interval import Interval, interval, save_influences


def keep_intervals(job: Job, metrics: Mapping[str, float], influences: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Return the interval of each metric that has influences; keep those, for differences between evaluations."""
    save_influences(job.output_dir, job.key, influences)
    return {name: interval(metrics[name], values) for name, values in influences.items()}


def mean_influence(values: Tensor, slope: float = 1.0) -> np.ndarray:
    """Return the influences, (n,), on a function of the mean of `values` (n,), whose derivative there is `slope`."""
    return slope * (values - values.mean()).double().numpy()


def compute_influences(
    generated: FeatureSet, reference: FeatureSet, spec: MetricSpec, batches: Iterable[Tensor], device: torch.device
) -> dict[str, np.ndarray]:
    """Return the influences of each image, float64 (n,), on every metric of `spec`, under its `metric_name`.

    Args:
        generated, reference, spec: as for `compute_metrics`.
        batches: the features (b, D) of the generated images, in order; they need not all be in memory.
        device: where to multiply.

    Recall has none: it is no smooth function of the weights.
    """
    assert generated.count is not None
    influences: dict[str, Tensor] = {}
    if "fd" in spec.metrics:
        influences["fd"] = frechet_influence(batches, generated, reference, device)
    if "kd" in spec.metrics:
        influences["kd"] = kernel_influence(generated, reference, spec)
    if "is" in spec.metrics:
        influences["is"] = inception_score_influence(generated.features[str(EXTRACTORS[spec.extractor].logits_layer)])
    if "prc" in spec.metrics:
        influences["precision"] = precision_influence(generated, reference, spec)
    if "accuracy" in spec.metrics:
        influences["accuracy"] = accuracy_influence(generated, spec)
    if "intra_fd" in spec.metrics:
        influences["intra_fd"] = intra_distance_influence(generated, reference, spec, device)
    named = {metric_name(name, spec.extractor, generated.count): values for name, values in influences.items()}
    return {name: values.cpu().numpy() for name, values in named.items()}


def frechet_influence(
    batches: Iterable[Tensor], generated: FeatureSet, reference: FeatureSet, device: torch.device | str | None = None
) -> Tensor:
    """Return the influences on the Fréchet distance, (n,).

    With m1, S1 and m2, S2 of the generated images and the reference, and T = S2^½ (S2^½ S1 S2^½)^-½ S2^½, the optimal
    map between the two normal distributions, an image with x - m1 = c has 2 (m1 - m2)·c + cᵀ (1 - T) c, minus its mean.
    """
    m1, S1, m2, S2 = (
        moment.to(device, torch.float64) for side in (generated, reference) for moment in (side.mean, side.covariance)
    )
    values, vectors = torch.linalg.eigh(S2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(root @ S1 @ root)
    # On the span of the images alone: no weights of them lead out of it.
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    half = root @ (vectors * torch.where(kept, values, torch.inf).pow(-0.25))
    curve = torch.eye(len(m2), device=device) - half @ half.T
    if generated.has_moments_of(reference):
        curve = torch.zeros_like(curve)  # without rounding
    rows = []
    for batch in batches:
        c = batch.to(device, torch.float64) - m1
        rows.append(2 * c @ (m1 - m2) + ((c @ curve) * c).sum(1))
    return _centred(torch.cat(rows))


def kernel_influence(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> Tensor:
    """Return the influences on the kernel distance, (n,): of each image by the subsets that it is in."""
    assert generated.count is not None
    influence = np.zeros(generated.count)
    for indices, x, y in kernel_subsets(generated, reference, spec):
        within = _cubed(x @ x.T / x.shape[1] + 1)
        across = _cubed(x @ y.T / x.shape[1] + 1)
        row = 2 * ((within.sum(1) - np.diag(within)) / (len(x) - 1) - across.mean(1))
        influence[indices] += row - row.mean()
    return torch.from_numpy(influence * (generated.count / (spec.kid_subset_size * spec.kid_subsets)))


def _cubed(kernel: np.ndarray) -> np.ndarray:
    return kernel * kernel * kernel  # numpy's ** 3 calls pow for each element


def inception_score_influence(logits: Tensor) -> Tensor:
    """Return the influences on the Inception score, (n,): exp(K) (KL_i - K) with the mean K of the split."""
    n = len(logits)
    order = RandomState(RNG_SEED).permutation(n)  # as torch-fidelity shuffles
    influence = torch.zeros(n, dtype=torch.float64)
    for i in range(INCEPTION_SCORE_SPLITS):
        split = order[i * n // INCEPTION_SCORE_SPLITS : (i + 1) * n // INCEPTION_SCORE_SPLITS]
        log_p = logits[split].double().log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1)
        influence[split] = divergence.mean().exp() * (divergence - divergence.mean())
    return influence


def precision_influence(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> Tensor:
    """Return the influences on the precision, (n,): whether the image counts, minus the precision."""
    return _centred(is_near(generated, reference, EXTRACTORS[spec.extractor].feature_layer).double())


def accuracy_influence(generated: FeatureSet, spec: MetricSpec) -> Tensor:
    """Return the influences on the accuracy, (n,), a mean over classes."""
    assert generated.labels is not None
    correct = generated.features[str(EXTRACTORS[spec.extractor].logits_layer)].argmax(1) == generated.labels
    return _over_classes(generated.labels, lambda chosen, _: _centred(correct[chosen].double()))


def intra_distance_influence(
    generated: FeatureSet, reference: FeatureSet, spec: MetricSpec, device: torch.device | str | None = None
) -> Tensor:
    """Return the influences on the Fréchet distance within classes, (n,), a mean over them."""
    assert generated.labels is not None
    layer = EXTRACTORS[spec.extractor].feature_layer

    def influence(chosen: Tensor, label: int) -> Tensor:
        sides = generated.of_class(label, layer), reference.of_class(label, layer)
        return frechet_influence([generated.features[layer][chosen]], *sides, device).cpu()

    return _over_classes(generated.labels, influence)


def _over_classes(labels: Tensor, influence: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return influences on a mean over classes, (n,), of those within each; the sizes of the classes are fixed."""
    classes, result = labels.unique().tolist(), torch.zeros(len(labels), dtype=torch.float64)
    for label in classes:
        chosen = labels == label
        result[chosen] = influence(chosen, label) * (len(labels) / (len(classes) * int(chosen.sum())))
    return result


def _centred(influence: Tensor) -> Tensor:
    return influence - influence.mean(0)
