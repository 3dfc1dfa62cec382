"""Fréchet and kernel distance, Inception score, precision and recall: the only door to torch-fidelity.

Features are extracted once per set of images (`FeatureExtractor`), and every metric is computed from the same features
(`compute_metrics`) by torch-fidelity's own functions, so that the numbers equal those of its command line; mean and
covariance alone are ours (`statistics`), since several processes may have a share of the features each. A number may be
called FID, or KID, only when the features are Inception's; names are made in one place, `metric_name`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ddim.checkpoints import weights_hash
from ddim.config import choose
from ddim.errors import UserError
from ddim.evaluation.feature_stats import Features, FeatureSet

INCEPTION_NAMES = {"fd": "fid", "kd": "kid"}
# torch-fidelity's defaults, written out so that they are stored with every number.
RNG_SEED = 2020  # of the subsets of KID and of the shuffle of the Inception score
INCEPTION_SCORE_SPLITS = 10
PRC_NEIGHBORHOOD = 3


@dataclass(frozen=True)
class MetricSpec:
    """What to measure.

    Attributes:
        extractor: the network, or the pixels, whose features are compared (EXTRACTORS).
        metrics: "fd" Fréchet distance (FID with Inception), "kd" kernel distance (KID with Inception), "is" Inception
            score, "prc" precision and recall.
        weights_path: Inception's weights file; None takes torch-fidelity's download.
        batch_size: images per forward pass of the extractor.
        kid_subset_size: images per subset of the kernel distance, at most the size of the smaller set.
        kid_subsets: number of subsets that the kernel distance is averaged over.
        reference_split: the part of the data set that generated images are compared with.
        reference_npz: take mean and covariance of the reference from this .npz (mu, sigma) instead of the data set.
    """

    extractor: Literal["inception", "digits_classifier", "pixels", "efficientnet"]
    metrics: tuple[Literal["fd", "kd", "is", "prc"], ...] = ("fd",)
    weights_path: str | None = None
    batch_size: int = 64
    kid_subset_size: int = 1000
    kid_subsets: int = 100
    reference_split: Literal["train", "test"] = "train"
    reference_npz: str | None = None

    def __post_init__(self) -> None:
        extractor = choose("extractor", self.extractor, EXTRACTORS)
        for name in self.metrics:
            choose("metric", name, METRICS)
        if not self.metrics or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics={list(self.metrics)} must name at least one of {', '.join(METRICS)}, each once.")
        if "is" in self.metrics and extractor.logits is None:
            raise ValueError(f"the Inception score needs class logits, which {self.extractor} has not; leave out 'is'.")
        if self.weights_path is not None and self.extractor != "inception":
            raise ValueError(f"weights_path is for extractor=inception; {self.extractor} brings its own, set it null.")
        if self.reference_npz is not None and (more := {"kd", "prc"} & set(self.metrics)):
            raise ValueError(f"{min(more)} needs the features of the reference, and reference_npz holds moments only.")
        for key, least in (("batch_size", 1), ("kid_subset_size", 2), ("kid_subsets", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}.")


class ExtractorFacts(NamedTuple):
    """What is known of an extractor without loading it; the layer names are torch-fidelity's."""

    registered_as: str
    features: str
    logits: str | None
    resize: str
    takes_grey: bool


class FeatureExtractor:
    """An extractor loaded once, on one device.

    Raises:
        UserError: the Inception weights or the package of an extractor cannot be had; says what to fetch.
    """

    def __init__(self, spec: MetricSpec, device: torch.device | str) -> None:
        from ddim.evaluation.features import INCEPTION, fold_normalisation, load_network

        self.spec = spec
        self.device = torch.device(device)
        self.facts = EXTRACTORS[spec.extractor]
        layers = [self.facts.features]
        if "is" in spec.metrics and self.facts.logits is not None:
            layers.append(self.facts.logits)
        self.network = load_network(self.facts.registered_as, layers, spec.weights_path)
        self._weights_hash = weights_hash(self.network.state_dict())  # of the weights as published
        if self.facts.registered_as == INCEPTION:
            fold_normalisation(self.network)
        self.network.to(self.device)

    @property
    def layers(self) -> list[str]:
        """The layers that `extract` returns; distances are taken in the first."""
        return self.network.features_list

    @torch.no_grad()
    def extract(self, images: Tensor | Dataset[Tensor]) -> Features:
        """Return the features of uint8 images.

        Args:
            images: (N, C, H, W) or a data set of (C, H, W) items, uint8, C = 1 or 3. Grey images are repeated to three
                channels for networks that need them.

        Returns:
            (N, D) float32 on the CPU per layer, in the order of the images whatever the batch size.

        Raises:
            UserError: no images, not uint8, not (N, C, H, W), or of a size that the extractor refuses.
        """
        batches = [self._extract_batch(batch) for batch in _batches(images, self.spec.batch_size)]
        return {layer: torch.cat([batch[layer] for batch in batches]) for layer in batches[0]}

    def _extract_batch(self, images: Tensor) -> Features:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"images must be uint8 of shape (N, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}; "
                "convert samples to 8-bit pixels first."
            )
        if images.shape[1] == 1 and not self.facts.takes_grey:
            images = images.expand(-1, 3, -1, -1)
        features = self.network(images.to(self.device))
        found = {k: v.cpu() for k, v in self.network.convert_features_tuple_to_dict(features).items()}
        for layer, values in found.items():
            if not torch.isfinite(values).all():
                raise UserError(f"the features of layer {layer} are not finite; check the extractor's weights.")
        return found

    def weights_hash(self) -> str:
        """Return the sha256, in hex, of the parameters and buffers in the order of their names.

        Names, shapes, types and values count, so that the device and the file they came from do not.
        """
        return self._weights_hash


def describe(spec: MetricSpec, extractor: FeatureExtractor) -> dict[str, Any]:
    """Return the facts that decide a number besides the images, ready for JSON."""
    import torch_fidelity

    facts: dict[str, Any] = {
        "extractor": spec.extractor,
        "extractor_name": extractor.facts.registered_as,
        "feature_layer": extractor.facts.features,
        "resize": extractor.facts.resize,
        "weights_hash": extractor.weights_hash(),
        "torch_fidelity": torch_fidelity.__version__,
        "metrics": list(spec.metrics),
        "reference_split": spec.reference_split,
    }
    if "kd" in spec.metrics:
        facts |= {"kid_subset_size": spec.kid_subset_size, "kid_subsets": spec.kid_subsets, "kid_rng_seed": RNG_SEED}
    if "is" in spec.metrics:
        facts |= {"logits_layer": extractor.facts.logits, "is_splits": INCEPTION_SCORE_SPLITS, "is_rng_seed": RNG_SEED}
    if "prc" in spec.metrics:
        facts |= {"prc_neighborhood": PRC_NEIGHBORHOOD}
    return facts


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
        UserError: says which number to change.
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


def compute_metrics(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec, n: int) -> dict[str, float]:
    """Return every metric of `spec` under its `metric_name`.

    Args:
        generated: of the n generated images, from the same extractor as `reference`.
        reference: of the data.
        spec: what to compute; all but "fd" need features, which `keeps_features` says.
        n: the number of generated images that the name will claim.

    Raises:
        UserError: n is not the number of images, or a set is too small (`check_sizes`).
    """
    if generated.count != n:
        raise UserError(
            f"there are features of {generated.count} generated images where n={n} was asked for; generate exactly n."
        )
    check_sizes(spec, n, reference.count)
    results: dict[str, float] = {}
    for metric in spec.metrics:
        for name, value in METRICS[metric](generated, reference, spec).items():
            results[metric_name(name, spec.extractor, n)] = value
    return results


def keeps_features(spec: MetricSpec) -> bool:
    """Whether a metric needs more than the moments of the features."""
    return spec.metrics != ("fd",)


def frechet_distance(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> dict[str, float]:
    """Return |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½) of the feature means and covariances (Heusel et al., 2017)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    sides = [{"mu": side.mean.numpy(), "sigma": side.covariance.numpy()} for side in (generated, reference)]
    return {"fd": fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID]}


def kernel_distance(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> dict[str, float]:
    """Return the unbiased squared MMD, kernel (x·y / D + 1)³, averaged over subsets (Binkowski et al., 2018)."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    layer = EXTRACTORS[spec.extractor].features
    result = kid_features_to_metric(
        generated.features[layer],
        reference.features[layer],
        kid_subset_size=spec.kid_subset_size,
        kid_subsets=spec.kid_subsets,
        rng_seed=RNG_SEED,
        verbose=False,
    )
    return {"kd": result[KEY_METRIC_KID_MEAN]}


def inception_score(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> dict[str, float]:
    """Return exp of the mean KL(p(y|x) || p(y)) over ten splits (Salimans et al., 2016); uses no reference."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    logits = generated.features[str(EXTRACTORS[spec.extractor].logits)]
    result = isc_features_to_metric(logits, splits=INCEPTION_SCORE_SPLITS, shuffle=True, rng_seed=RNG_SEED)
    return {"is": result[KEY_METRIC_ISC_MEAN]}


def precision_recall(generated: FeatureSet, reference: FeatureSet, spec: MetricSpec) -> dict[str, float]:
    """Return k-nearest-neighbour precision and recall, k = 3 (Kynkäänniemi et al., 2019)."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    layer = EXTRACTORS[spec.extractor].features
    # In parts, as the whole 50k x 50k table of distances would be 10 GB.
    result = prc_features_to_metric(
        generated.features[layer],
        reference.features[layer],
        prc_neighborhood=PRC_NEIGHBORHOOD,
        save_cpu_ram=True,
        verbose=False,
    )
    return {"precision": result[KEY_METRIC_PRECISION], "recall": result[KEY_METRIC_RECALL]}


def _batches(images: Tensor | Dataset[Tensor], batch_size: int) -> Iterator[Tensor]:
    count = len(images)  # type: ignore[arg-type]
    if count == 0:
        raise UserError("there are no images to extract features from; generate or load at least one.")
    for start in range(0, count, batch_size):
        stop = min(start + batch_size, count)
        if isinstance(images, Tensor):
            yield images[start:stop]
            continue
        items = [images[i] for i in range(start, stop)]
        if not isinstance(items[0], Tensor):
            raise UserError(f"the items of an image data set must be tensors, not {type(items[0]).__name__}.")
        yield torch.stack(items)


EXTRACTORS: dict[str, ExtractorFacts] = {
    "inception": ExtractorFacts(
        "inception-v3-compat",
        features="2048",
        logits="logits_unbiased",
        resize="TF1-style bilinear to 299x299, no antialiasing",
        takes_grey=False,
    ),
    "digits_classifier": ExtractorFacts("digits-classifier", "64", "logits", "none (8x8 only)", takes_grey=True),
    "pixels": ExtractorFacts("pixels", "pixels", None, "none", takes_grey=True),
    "efficientnet": ExtractorFacts(
        "efficientnet-lite0",
        features="1280",
        logits="logits",
        resize="antialiased bilinear to 64x64 when no side exceeds 64, else to 224x224",
        takes_grey=True,
    ),
}
METRICS: dict[str, Callable[[FeatureSet, FeatureSet, MetricSpec], dict[str, float]]] = {
    "fd": frechet_distance,
    "kd": kernel_distance,
    "is": inception_score,
    "prc": precision_recall,
}
