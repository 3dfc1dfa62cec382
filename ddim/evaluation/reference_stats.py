"""The set of real images that generated ones are compared with: measured once, and found again by what decided it."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ddim.data.images import Images
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation.feature_stats import FeatureSet, load_moments, moments, save_moments
from ddim.evaluation.metrics import FeatureExtractor, MetricSpec, keeps_features
from ddim.evaluation.shards import Parts
from ddim.io import Tensors, read_safetensors, write_safetensors
from ddim.results.records import record_key

IMAGES_AT_ONCE = 1000  # of a part; the extractor takes them in its own batches


def measure_reference(
    images: Images,
    identity: dict[str, Any],
    extractor: FeatureExtractor,
    folder: Path,
    processes: Processes = SINGLE_PROCESS,
) -> FeatureSet:
    """Return the data set as the metrics see it, from `folder` if it was measured before.

    There it is NAME_HASH.npz with mu and sigma, which other code bases read too, and NAME_HASH.safetensors with the
    features where a metric needs them. Half-done work goes on.

    Args:
        images: the data set.
        identity: everything that decides the features: data, split, transform, extractor, weights.
        extractor: on its device.
        folder: of all references.
        processes: each extracts a share.
    """
    stem = f"{images.name}_{record_key(identity)}"
    statistics, stored = folder / f"{stem}.npz", folder / f"{stem}.safetensors"
    layer, wants_features = extractor.layers[0], keeps_features(extractor.spec)
    parts = Parts(folder / f"{stem}.parts", range(len(images)))

    def found() -> bool:
        return statistics.is_file() and (not wants_features or stored.is_file())

    if not processes.run_on_main(found):
        with parts.alone(processes, wait=True):  # the jobs of a sweep start together
            if not processes.run_on_main(found):
                _measure(images, extractor, parts, statistics, stored if wants_features else None, processes)
            elif processes.is_main:
                parts.delete()
    with processes.barrier():
        known = load_moments(statistics)
        if wants_features:
            features, _ = read_safetensors(stored)
            known = FeatureSet(len(features[layer]), known.mean, known.covariance, features)
    return known


def _measure(
    images: Images,
    extractor: FeatureExtractor,
    parts: Parts,
    statistics: Path,
    stored: Path | None,
    processes: Processes,
) -> None:
    layer = extractor.layers[0]
    title = f"{extractor.spec.extractor} features of {images.name}"
    with tqdm(total=len(images), desc=title, unit=" images", unit_scale=True, disable=None) as bar:

        def features(batch: range) -> Tensors:
            found = extractor.extract(torch.stack([images[i] for i in batch]))
            bar.update(len(batch))
            return found

        parts.fill(min(IMAGES_AT_ONCE, len(images)), features, processes, bar.reset)
    count, mean, covariance = moments(parts.read(layer, processes), extractor.device, processes)
    with processes.barrier():
        if processes.is_main:
            save_moments(FeatureSet(count, mean, covariance), statistics)
            if stored is not None:
                write_safetensors(stored, {name: torch.cat([*parts.read(name)]) for name in extractor.layers}, {})
            parts.delete()


def published_reference(spec: MetricSpec, extractor: FeatureExtractor, shape: tuple[int, int, int]) -> FeatureSet:
    """Return the statistics in the file `spec.reference_npz`.

    Args:
        spec: names the file.
        extractor: whose features they are.
        shape: of the generated images, (C, H, W).

    Raises:
        UserError: the file cannot be read, or its features have another number of dimensions.
    """
    found = load_moments(Path(str(spec.reference_npz)))
    dimension = extractor.extract(torch.zeros(1, *shape, dtype=torch.uint8))[extractor.layers[0]].shape[1]
    if len(found.mean) != dimension:
        raise UserError(
            f"the statistics {spec.reference_npz} have {len(found.mean)} dimensions, the features of {spec.extractor} "
            f"{dimension}; they belong to another extractor."
        )
    return found


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file of statistics, in hex.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"the statistics {path} cannot be read ({error.strerror}); give an .npz file with the arrays mu and sigma."
        ) from error
