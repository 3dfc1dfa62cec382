"""How much each generated image moves a metric, from which `ddim.results.interval` makes 95 % intervals.

An influence is the derivative of the number by the weight of an image among the n; the reference set is fixed. It is
computed from the same features as the number, in one pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ddim.evaluation.feature_stats import FeatureSet, moments
from ddim.evaluation.features import EXTRACTORS
from ddim.evaluation.job import Job
from ddim.evaluation.metrics import (
    INCEPTION_SCORE_SPLITS,
    PRC_BATCH_SIZE,
    PRC_NEIGHBORHOOD,
    RNG_SEED,
    MetricSpec,
    kernel_subsets,
    metric_name,
)
from ddim.results.interval import Interval, interval, save_influences

Batches = Callable[[], Iterable[Tensor]]


def keep_intervals(job: Job, metrics: Mapping[str, float], influences: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Return the interval of each metric that has influences; keep those, for differences between evaluations."""
    save_influences(job.output_dir, job.key, influences)
    return {name: interval(metrics[name], values) for name, values in influences.items()}


def mean_influence(values: Tensor, slope: float = 1.0) -> np.ndarray:
    """Return the influences, (n, 2), on a function of the mean of `values` (n,), whose derivative there is `slope`."""
    return (slope * (values - values.mean())).double()[:, None].expand(-1, 2).numpy()


def compute_influences(
    generated: FeatureSet, reference: FeatureSet, spec: MetricSpec, batches: Batches, device: torch.device
) -> dict[str, np.ndarray]:
    """Return the influences of each image, float64 (n, 2), on every metric of `spec`, under its `metric_name`.

    Args:
        generated, reference, spec: as for `compute_metrics`.
        batches: each call gives the features (b, D) of the generated images again, in order; they need not be in
            memory at once.
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
        layer = EXTRACTORS[spec.extractor].feature_layer
        influences["precision"] = precision_influence(generated.features[layer], reference.features[layer])
    named = {metric_name(name, spec.extractor, generated.count): values for name, values in influences.items()}
    return {name: values.cpu().numpy() for name, values in named.items()}


def frechet_influence(
    batches: Batches, generated: FeatureSet, reference: FeatureSet, device: torch.device | str | None = None
) -> Tensor:
    """Return the influences on the Fréchet distance, (n, 2).

    With m1, S1 and m2, S2 of the generated images and the reference, and T = S2^½ (S2^½ S1 S2^½)^-½ S2^½, the optimal
    map between the two normal distributions, an image with x - m1 = c has 2 (m1 - m2)·c + cᵀ (1 - T) c, minus its mean.
    """
    m2, S2 = reference.mean.to(device), reference.covariance.to(device)
    values, vectors = torch.linalg.eigh(S2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    gradients = []
    for half in (0, 1):
        count, mean, covariance = moments(_every_other(batches(), half), device)
        if count <= len(mean):  # T is defined on the span of the images alone
            mean, covariance = generated.mean, generated.covariance
        values, vectors = torch.linalg.eigh(root @ covariance.to(device) @ root)
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        inverse_root = torch.where(kept, values, torch.inf).rsqrt()
        T = root @ (vectors * inverse_root) @ vectors.T @ root
        gradients.append((2 * (mean.to(device) - m2), torch.eye(len(m2), device=device) - T))
    centre = generated.mean.to(device)
    rows = []
    for batch in batches():
        c = batch.to(device, torch.float64) - centre
        rows.append(torch.stack([c @ slope + ((c @ curve) * c).sum(1) for slope, curve in gradients], 1))
    return _centred(torch.cat(rows))


def kernel_influence(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> Tensor:
    """Return the influences on the kernel distance, (n, 2): of each image by the subsets that it is in."""
    assert generated.count is not None
    influence = torch.zeros(generated.count, 2, dtype=torch.float64)
    for indices, x, y in kernel_subsets(generated, reference, spec):
        kernel = (x @ x.T / x.shape[1] + 1) ** 3
        kernel -= np.diag(np.diag(kernel))
        across = ((x @ y.T / x.shape[1] + 1) ** 3).mean(1)
        for half in (0, 1):
            others = np.full(len(x), len(x[half::2])) - (np.arange(len(x)) % 2 == half)
            row = 2 * (kernel[:, half::2].sum(1) / np.maximum(1, others) - across)
            influence[indices, half] += torch.from_numpy(row - row.mean())
    return influence * (generated.count / (spec.kid_subset_size * spec.kid_subsets))


def inception_score_influence(logits: Tensor) -> Tensor:
    """Return the influences on the Inception score, (n, 2): exp(K) (KL_i - K) with the mean K of the split."""
    n = len(logits)
    order = np.random.RandomState(RNG_SEED).permutation(n)  # as torch-fidelity shuffles
    influence = torch.zeros(n, 2, dtype=torch.float64)
    for i in range(INCEPTION_SCORE_SPLITS):
        split = order[i * n // INCEPTION_SCORE_SPLITS : (i + 1) * n // INCEPTION_SCORE_SPLITS]
        log_p = logits[split].double().log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1)
        influence[split] = (divergence.mean().exp() * (divergence - divergence.mean()))[:, None]
    return influence


def precision_influence(generated: Tensor, reference: Tensor) -> Tensor:
    """Return the influences on the precision, (n, 2): whether the image counts, minus the precision."""
    y = reference.double()
    blocks = y.split(PRC_BATCH_SIZE)
    radii = torch.cat([torch.cdist(block, y).kthvalue(PRC_NEIGHBORHOOD + 1).values for block in blocks])
    inside = [(torch.cdist(x, y) <= radii).any(1) for x in generated.double().split(PRC_BATCH_SIZE)]
    return torch.from_numpy(mean_influence(torch.cat(inside).double()))


def _every_other(batches: Iterable[Tensor], half: int) -> Iterator[Tensor]:
    """Yield the rows with even (half = 0) or odd numbers, counted over all batches."""
    first = 0
    for batch in batches:
        if len(rows := batch[(half - first) % 2 :: 2]):
            yield rows
        first += len(batch)


def _centred(influence: Tensor) -> Tensor:
    return influence - influence.mean(0)
