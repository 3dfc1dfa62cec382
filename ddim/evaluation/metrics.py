"""Fréchet and kernel distance, Inception score, precision and recall; the first three by torch-fidelity's functions.

Every metric is computed from the same features (`ddim.evaluation.features`), in float64, and the numbers equal those
of torch-fidelity's command line up to the rounding of its float32. Mean and covariance are computed by `feature_stats`,
since several processes may each have a share of the features. Precision and recall are computed here, since the nearest
neighbours within the reference are the same in every evaluation. A number is called FID or KID only if the features are
Inception's: `metric_name`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import RandomState
from torch import Tensor

from ddim.config import FilePath, choose
from ddim.errors import UserError
from ddim.evaluation.feature_stats import FeatureSet
from ddim.evaluation.features import EXTRACTORS, FeatureExtractor

INCEPTION_NAMES = {"fd": "fid", "kd": "kid", "intra_fd": "intra_fid"}
# torch-fidelity's defaults, written out so that they are stored with every number.
RNG_SEED = 2020  # of the subsets of KID and of the shuffle of the Inception score
INCEPTION_SCORE_SPLITS = 10
PRC_NEIGHBORHOOD = 3
PRC_BLOCK = 50_000_000  # distances in a block of rows, 400 MB: decides memory (three blocks), and hardly time


@dataclass(frozen=True)
class MetricSpec:
    """What to measure.

    Attributes:
        extractor: the network, or the pixels, whose features are compared (EXTRACTORS).
        metrics: "fd" Fréchet distance (FID with Inception), "kd" kernel distance (KID with Inception), "is" Inception
            score, "prc" precision and recall; of labelled images also "accuracy", how many of them the extractor's
            logits give their own class, and "intra_fd", the Fréchet distance within each class (intra-FID, Miyato and
            Koyama 2018), both as means over the classes.
        weights_path: Inception's weights file; None takes torch-fidelity's download.
        batch_size: images per forward pass of the extractor.
        bf16: run the extractor in bfloat16, for generated images and for the reference.
        kid_subset_size: images per subset of the kernel distance, at most the size of the smaller set.
        kid_subsets: number of subsets that the kernel distance is averaged over.
        reference_split: the part of the data set that generated images are compared with.
        reference_npz: take mean and covariance of the reference from this .npz (mu, sigma) instead of the data set.
    """

    extractor: str
    metrics: tuple[str, ...] = ("fd",)
    weights_path: FilePath | None = None
    batch_size: int = 64
    bf16: bool = False
    kid_subset_size: int = 1000
    kid_subsets: int = 100
    reference_split: Literal["train", "test"] = "train"
    reference_npz: FilePath | None = None

    def __post_init__(self) -> None:
        extractor = choose("extractor", self.extractor, EXTRACTORS)
        known: dict[str, Any] = METRICS | CLASS_METRICS
        for name in self.metrics:
            choose("metric", name, known)
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics={list(self.metrics)} must name at least one of {', '.join(known)}, each once.")
        for name, needs in (("is", "the Inception score needs"), ("accuracy", "the accuracy of classes needs")):
            if name in self.metrics and extractor.logits_layer is None:
                raise ValueError(f"{needs} class logits, which {self.extractor} does not have; leave out '{name}'.")
        if self.weights_path is not None and self.extractor != "inception":
            raise ValueError(f"weights_path is for extractor=inception; {self.extractor} brings its own, set it null.")
        if self.reference_npz is not None and (more := {"kd", "prc", "intra_fd"} & set(self.metrics)):
            raise ValueError(f"{min(more)} needs the features of the reference, and reference_npz holds moments only.")
        if self.reference_npz is not None and self.bf16:
            raise ValueError("published statistics (reference_npz) are of float32 features; set metric.bf16=false.")
        for key, least in (("batch_size", 1), ("kid_subset_size", 2), ("kid_subsets", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}.")

    @property
    def needs_features(self) -> bool:
        """Whether a metric needs more than mean and covariance of the features."""
        return self.metrics != ("fd",)

    @property
    def class_metrics(self) -> list[str]:
        """Those of the metrics that need the labels of the images."""
        return [name for name in self.metrics if name in CLASS_METRICS]

    def build_extractor(self, device: torch.device | str) -> FeatureExtractor:
        """Return the feature extractor on its device, with the layers that the metrics need."""
        logits = not {"is", "accuracy"}.isdisjoint(self.metrics)
        return FeatureExtractor(self.extractor, device, logits, self.weights_path, self.batch_size, self.bf16)


def describe(spec: MetricSpec, extractor: FeatureExtractor) -> dict[str, Any]:
    """Return what decides a number besides the images, ready for JSON."""
    import torch_fidelity

    description: dict[str, Any] = {
        "extractor": spec.extractor,
        "extractor_name": extractor.info.registered_name,
        "feature_layer": extractor.info.feature_layer,
        "resize": extractor.info.resize,
        "weights_hash": extractor.weights_hash,
        "torch_fidelity": torch_fidelity.__version__,
        "metrics": list(spec.metrics),
        "reference_split": spec.reference_split,
    }
    if spec.bf16:  # else as before this option: keys of records must not change
        description["bf16"] = True
    if "kd" in spec.metrics:
        description |= {
            "kid_subset_size": spec.kid_subset_size,
            "kid_subsets": spec.kid_subsets,
            "kid_rng_seed": RNG_SEED,
        }
    if "is" in spec.metrics:
        description |= {
            "logits_layer": extractor.info.logits_layer,
            "is_splits": INCEPTION_SCORE_SPLITS,
            "is_rng_seed": RNG_SEED,
        }
    if "accuracy" in spec.metrics:
        description |= {"logits_layer": extractor.info.logits_layer}
    if "prc" in spec.metrics:
        description |= {"prc_neighborhood": PRC_NEIGHBORHOOD}
    return description


def metric_name(metric: str, extractor: str, n: int) -> str:
    """Return the name that a number over n generated images is stored and printed under.

    With Inception features "fd" is called fid and "kd" kid: fid_50k, kid_50k, is_50k, precision_50k. With any other
    extractor nothing is called FID or KID, and the extractor is in the name: fd_digits_classifier_1k. n is written in
    full when it is no multiple of a thousand: fid_49984.
    """
    if extractor == "inception":
        return f"{INCEPTION_NAMES.get(metric, metric)}_{count_name(n)}"
    return f"{metric}_{extractor}_{count_name(n)}"


def count_name(n: int) -> str:
    """Return a number of images as it stands in the name of a metric: 50k, or 49984."""
    return f"{n // 1000}k" if n % 1000 == 0 else str(n)


def check_sizes(spec: MetricSpec, n: int, n_reference: int | None) -> None:
    """Refuse sets that are too small for the metrics asked for; call it before generating n images.

    A reference of unknown size (published statistics) is taken as large enough.

    Raises:
        UserError: a set is too small; the message names the number to change.
    """
    n_reference = n if n_reference is None else n_reference
    if min(n, n_reference) < 2:
        raise UserError(f"metrics need at least 2 images on each side, not {n} generated and {n_reference} reference.")
    if "kd" in spec.metrics and spec.kid_subset_size > min(n, n_reference):
        raise UserError(
            f"kid_subset_size={spec.kid_subset_size} is more than the smaller set has ({n} generated, {n_reference} "
            f"reference images); set metric.kid_subset_size to at most {min(n, n_reference)}."
        )
    if "is" in spec.metrics and n < INCEPTION_SCORE_SPLITS:
        raise UserError(f"the Inception score takes {INCEPTION_SCORE_SPLITS} splits; generate as many images, not {n}.")
    if "prc" in spec.metrics and min(n, n_reference) <= PRC_NEIGHBORHOOD:
        raise UserError(
            f"precision and recall take the {PRC_NEIGHBORHOOD} nearest neighbours; use at least {PRC_NEIGHBORHOOD + 1} "
            f"images on each side, not {n} generated and {n_reference} reference."
        )


def compute_class_metrics(
    generated: FeatureSet, reference: FeatureSet, spec: MetricSpec, n: int
) -> dict[str, dict[int, float]]:
    """Return those metrics of `spec` that are of classes, for each label of the generated images.

    Arguments are those of `compute_metrics`; the sets have labels.
    """
    assert generated.labels is not None
    labels, sides = generated.labels.unique().tolist(), (generated, reference, spec)
    return {
        metric_name(metric, spec.extractor, n): {y: CLASS_METRICS[metric](*sides, y) for y in labels}
        for metric in spec.class_metrics
    }


def compute_metrics(
    generated: FeatureSet,
    reference: FeatureSet,
    spec: MetricSpec,
    n: int,
    of_classes: Mapping[str, Mapping[int, float]] | None = None,
) -> dict[str, float]:
    """Return every metric of `spec` under its `metric_name`.

    Args:
        generated: of the n generated images, from the same extractor as `reference`.
        reference: of the data.
        spec: what to compute; all but "fd" need features (`needs_features`).
        n: the number of generated images that the name will claim.
        of_classes: see `compute_class_metrics`, whose means over the classes are metrics.

    Raises:
        UserError: n is not the number of images, or a set is too small (`check_sizes`).
    """
    if generated.count != n:
        raise UserError(
            f"there are features of {generated.count} generated images where n={n} was asked for; generate exactly n."
        )
    check_sizes(spec, n, reference.count)
    results = {name: float(np.mean([*values.values()])) for name, values in (of_classes or {}).items()}
    for metric in [name for name in spec.metrics if name in METRICS]:
        for name, value in METRICS[metric](generated, reference, spec).items():
            results[metric_name(name, spec.extractor, n)] = value
    return results


def frechet_distance(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> dict[str, float]:
    """Return |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½) of the feature means and covariances (Heusel et al., 2017).

    The matrix square root is inside torch-fidelity's fid_statistics_to_metric. The distance is a square, so what is
    less than 0 is the rounding of its eigenvalues, and 0 is returned.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    if generated.has_moments_of(reference):
        return {"fd": 0.0}  # without the rounding of the root
    sides = [{"mu": side.mean.numpy(), "sigma": side.covariance.numpy()} for side in (generated, reference)]
    return {"fd": max(0.0, fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID])}


def kernel_distance(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> dict[str, float]:
    """Return the unbiased squared MMD, kernel (x·y / D + 1)³, averaged over subsets (Binkowski et al., 2018).

    The subsets are those of torch-fidelity's kid_features_to_metric. The kernels are float64: a mean that is large
    against the spread leaves nothing of their difference in float32.
    """
    from torch_fidelity.metric_kid import kernel_mmd

    return {"kd": float(np.mean([kernel_mmd(x, y) for _, x, y in kernel_subsets(generated, reference, spec)]))}


def kernel_subsets(
    generated: FeatureSet, reference: FeatureSet, spec: MetricSpec
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield for each subset of the kernel distance the numbers of its generated images, their features, and others.

    The features are float64 (kid_subset_size, D), of generated images and of as many of the reference.
    """
    layer, rng = EXTRACTORS[spec.extractor].feature_layer, RandomState(RNG_SEED)
    x, y = generated.features[layer], reference.features[layer]
    for _ in range(spec.kid_subsets):
        ours, theirs = (rng.choice(len(side), spec.kid_subset_size, replace=False) for side in (x, y))
        yield ours, x[ours].double().numpy(), y[theirs].double().numpy()


def inception_score(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> dict[str, float]:
    """Return exp of the mean KL(p(y|x) || p(y)) over ten splits (Salimans et al., 2016); uses no reference."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    logits = generated.features[str(EXTRACTORS[spec.extractor].logits_layer)]
    result = isc_features_to_metric(logits, splits=INCEPTION_SCORE_SPLITS, shuffle=True, rng_seed=RNG_SEED)
    return {"is": result[KEY_METRIC_ISC_MEAN]}


def precision_recall(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> dict[str, float]:
    """Return k-nearest-neighbour precision and recall, k = 3 (Kynkäänniemi et al., 2019)."""
    layer = EXTRACTORS[spec.extractor].feature_layer
    sides = {"precision": (generated, reference), "recall": (reference, generated)}
    return {name: float(is_near(x, images, layer).float().mean()) for name, (x, images) in sides.items()}


def is_near(x: FeatureSet, images: FeatureSet, layer: str) -> Tensor:
    """Return whether each of x lies within the distance of at least one image to its k-th neighbour, bool (N,)."""
    radii = neighbour_distances(images, layer)
    return torch.cat([(distances <= radii).any(1) for distances in _distances(x, images, layer)])


def neighbour_distances(images: FeatureSet, layer: str) -> Tensor:
    """Return the distance of each image to its k-th nearest other, float64 (N,).

    They are kept with the set: of a reference of 50,000 images they cost most of an evaluation.
    """
    if layer not in images.neighbours:
        blocks = _distances(images, images, layer)
        images.neighbours[layer] = torch.cat([block.kthvalue(PRC_NEIGHBORHOOD + 1).values for block in blocks])
    return images.neighbours[layer]


def _distances(x: FeatureSet, y: FeatureSet, layer: str) -> Iterator[Tensor]:
    """Yield the distances of x to y in blocks of rows, each with at most PRC_BLOCK numbers or a single row.

    float64: they come from squared norms, which cancel where the mean is large against the spread.
    """
    features = y.features[layer].double()
    for rows in x.features[layer].split(max(1, PRC_BLOCK // len(features))):
        yield torch.cdist(rows.double(), features)


def class_accuracy(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec, label: int) -> float:
    """Return how many of the images of a class have their largest logit at it, 0 to 1; uses no reference."""
    logits = generated.features[str(EXTRACTORS[spec.extractor].logits_layer)]
    return float((logits[generated.labels == label].argmax(1) == label).double().mean())


def class_distance(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec, label: int) -> float:
    """Return the Fréchet distance of the images of a class to those of the reference."""
    layer = EXTRACTORS[spec.extractor].feature_layer
    return frechet_distance(generated.of_class(label, layer), reference.of_class(label, layer), spec)["fd"]


METRICS: dict[str, Callable[[FeatureSet, FeatureSet, MetricSpec], dict[str, float]]] = {
    "fd": frechet_distance,
    "kd": kernel_distance,
    "is": inception_score,
    "prc": precision_recall,
}
CLASS_METRICS: dict[str, Callable[[FeatureSet, FeatureSet, MetricSpec, int], float]] = {
    "accuracy": class_accuracy,
    "intra_fd": class_distance,
}
