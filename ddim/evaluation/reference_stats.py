"""The statistics of the real images: measured once and kept under a hash of what decides them, or published."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ddim.data.images import Images
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation.feature_stats import FeatureSet, load_moments, moments, save_moments
from ddim.evaluation.features import FeatureExtractor
from ddim.evaluation.shards import Shards
from ddim.io import check_regular_file, read_safetensors, write_safetensors
from ddim.results.records import record_key

log = logging.getLogger(__name__)
SHARD_SIZE = 1000  # images of a shard; the extractor takes them in its own batches


def measure_reference(
    images: Images,
    cache_key: dict[str, Any],
    extractor: FeatureExtractor,
    folder: Path,
    processes: Processes = SINGLE_PROCESS,
    *,
    with_features: bool = False,
) -> FeatureSet:
    """Return the data set as the metrics see it, from `folder` if it was measured before.

    The files are NAME_HASH.npz with mu and sigma, which other code bases read too, and NAME_HASH.safetensors with the
    features where a metric needs them. An interrupted measurement continues; a damaged file is measured again.

    Args:
        images: the data set.
        cache_key: everything that decides the features: data, split, transform, extractor, weights.
        extractor: on its device.
        folder: of all references.
        processes: each extracts a share.
        with_features: keep the features too.
    """
    name = os.fsdecode(os.fsencode(images.name)[:150])  # a file name has at most 255 bytes
    stem = f"{name}_{record_key(cache_key)}"
    statistics, stored = folder / f"{stem}.npz", folder / f"{stem}.safetensors"
    shards = Shards(folder / f"{stem}.parts", range(len(images)))

    def load() -> FeatureSet:
        stats = load_moments(statistics, extractor.dimension(images.shape))
        if not with_features:
            return stats
        features, _ = read_safetensors(stored)
        return FeatureSet(len(features[extractor.layers[0]]), stats.mean, stats.covariance, features)

    def find(level: int) -> FeatureSet | None:
        if not statistics.exists() or (with_features and not stored.exists()):
            return None
        try:
            return load()
        except UserError as error:
            log.log(level, "%s It is measured again.", error)
            return None

    with processes.barrier():
        found = find(logging.DEBUG)
    if all(processes.gather(found is not None)) and found is not None:
        return found
    with shards.lock(processes, wait=True):  # the jobs of a sweep start together
        if not processes.run_on_main(lambda: find(logging.WARNING) is not None):
            _measure(images, extractor, shards, statistics, stored if with_features else None, processes)
        elif processes.is_main:
            shards.delete()
    with processes.barrier():
        return load()


def _measure(
    images: Images,
    extractor: FeatureExtractor,
    shards: Shards,
    statistics: Path,
    stored: Path | None,
    processes: Processes,
) -> None:
    batches = shards.missing(min(SHARD_SIZE, len(images)), processes)
    title = f"{extractor.name} features of {images.name}"
    with (
        tqdm(total=sum(map(len, batches)), desc=title, unit=" images", unit_scale=True, disable=None) as bar,
        shards.writer(processes) as write,
    ):
        for batch in batches:
            write(batch, extractor.extract(torch.stack([images[i] for i in batch])))
            bar.update(len(batch))
    count, mean, covariance = moments(shards.read(extractor.layers[0], processes), extractor.device, processes)
    with processes.barrier():
        if processes.is_main:
            save_moments(FeatureSet(count, mean, covariance), statistics)
            if stored is not None:
                write_safetensors(stored, {name: shards.read_all(name) for name in extractor.layers}, {})
            shards.delete()


def published_reference(path: str, extractor: FeatureExtractor, shape: tuple[int, int, int]) -> FeatureSet:
    """Return the statistics in a published file.

    Args:
        path: of an .npz with mu and sigma.
        extractor: whose features they are.
        shape: of the generated images, (C, H, W).

    Raises:
        UserError: the extractor refuses images of this shape, or see `load_moments`.
    """
    extractor.extract(torch.zeros(1, *shape, dtype=torch.uint8))
    return load_moments(Path(path), extractor.dimension(shape))


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file of statistics, in hex.

    Raises:
        UserError: it cannot be read.
    """
    check_regular_file(Path(path), "file of statistics")
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"the statistics {path} cannot be read ({error.strerror}); give an .npz file with the arrays mu and sigma."
        ) from error
