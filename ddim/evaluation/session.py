"""What the evaluations of one command share: the model, the images, the feature extractor, the reference statistics."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from ddim.checkpoints import LoadedModel, load_model
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import Images
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.evaluation.feature_stats import FeatureSet
from ddim.evaluation.features import FeatureExtractor
from ddim.evaluation.metrics import MetricSpec, describe
from ddim.evaluation.reference_stats import file_hash, measure_reference, published_reference
from ddim.inference.compute import ComputeSpec, prepare_model, with_batch_size
from ddim.results.records import RECORDS, RecordFile
from ddim.results.schema import evaluation_records

log = logging.getLogger(__name__)

T = TypeVar("T")
Shape = tuple[int, int, int]  # (C, H, W)
# Of the description of a metric: what decides the features of the reference set.
FEATURE_KEYS = ("extractor", "extractor_name", "resize", "weights_hash", "torch_fidelity", "bf16")


class Session:
    """Loads what an evaluation needs when it is first needed, and keeps it until an evaluation needs another one.

    Args:
        processes: that compute together.
    """

    def __init__(self, processes: Processes = SINGLE_PROCESS) -> None:
        self.processes = processes
        self.planned = 0  # network evaluations of single images in all jobs of the command
        self._records: dict[str, RecordFile] = {}  # by folder: each remembers what it read
        self._warnings: set[str] = set()  # that were logged
        self._loaded: dict[str, tuple[Any, Any]] = {}  # kind -> (what decides it, the object)

    def model(
        self, checkpoint: str, weights: str, compute: ComputeSpec, evaluations: int = 0, images: int = 1024
    ) -> tuple[LoadedModel, ComputeSpec]:
        """Return a model on the device of this process, and how it is run; loaded again if its file has changed.

        Args:
            evaluations, images: of the job that asks first, which decide what `prepare_model` chooses; `planned` are
                more where there is a plan.

        Raises:
            UserError: the checkpoint cannot be loaded, or the device cannot be used.
        """
        compute = dataclasses.replace(compute, device=self.processes.local_device(compute.device))

        def load() -> tuple[LoadedModel, ComputeSpec]:
            model, count = load_model(checkpoint, weights), self.processes.world_size
            work = max(evaluations, self.planned) // count
            compute_here = prepare_model(model, compute, work, images, count == 1)
            return model, with_batch_size(model, compute_here)  # each process, since loading can fail in one of them

        return self._load("model", (checkpoint, _modified(checkpoint), weights, compute), load)

    def plan(self, evaluations: int) -> bool:
        """Note how many network evaluations are planned; return whether a model is loaded again for so many."""
        if evaluations <= 2 * self.planned:  # some times are a few more than S
            return False
        self.planned = evaluations
        return self._loaded.pop("model", None) is not None

    def warn_once(self, warning: str | None) -> None:
        """Log a warning, unless it is None or was logged before; of several processes the main one does."""
        if warning is not None and warning not in self._warnings and self.processes.is_main:
            self._warnings.add(warning)
            log.warning("%s", warning)

    def records(self, folder: str) -> RecordFile:
        """Return the records in the folder of a sweep."""
        return self._records.setdefault(folder, evaluation_records(Path(folder) / RECORDS))

    def images(self, data: DataSpec, split: Literal["train", "test"]) -> Images:
        """Return a data set."""
        return self._load("images", (data, split), lambda: load_images(data, split))

    def samples(self, data: DataSpec) -> tuple[Images, str]:
        """Return a set of generated images with its fingerprint, 64 hexadecimal digits."""

        def load() -> tuple[Images, str]:
            images = load_images(data)
            return images, images.fingerprint()

        return self._load("samples", (data, _modified(data.root)), load)

    def fingerprint(self, data: DataSpec, split: Literal["train", "test"]) -> str:
        """Return the fingerprint of a data set, 64 hexadecimal digits."""
        return self._load("fingerprint", (data, split), lambda: self.images(data, split).fingerprint())

    def extractor(self, metric: MetricSpec, device: str) -> FeatureExtractor:
        """Return the feature extractor of a metric on its device."""
        return self._load("extractor", (metric, device), lambda: metric.build_extractor(device))

    def metric_description(self, metric: MetricSpec, device: str) -> dict[str, Any]:
        """Return what decides a number besides the images; see `ddim.evaluation.metrics.describe`."""
        return self._load("metric", (metric, device), lambda: describe(metric, self.extractor(metric, device)))

    def published_stats(self, npz: str, metric: MetricSpec, device: str, shape: Shape) -> tuple[FeatureSet, str]:
        """Return the statistics in a published file, for images of this shape, and the hash of the file.

        Raises:
            UserError: the file cannot be used.
        """

        def load() -> tuple[FeatureSet, str]:
            return published_reference(npz, self.extractor(metric, device), shape), file_hash(npz)

        return self._load("reference", (npz, _modified(npz), metric, device, shape), load)

    def reference_stats(self, data: DataSpec, metric: MetricSpec, device: str, folder: str, shape: Shape) -> FeatureSet:
        """Return the reference set as the metrics see it: from a published file, from `folder`, or measured now.

        All processes must call this together. The data set is not read where a file is given.
        """
        if metric.reference_npz is not None:
            with self.processes.barrier():
                return self.published_stats(metric.reference_npz, metric, device, shape)[0]
        key = (data, metric, device, folder)
        return self._load("reference", key, lambda: self._reference_stats(*key))

    def _reference_stats(self, data: DataSpec, metric: MetricSpec, device: str, folder: str) -> FeatureSet:
        images, extractor = self.images(data, metric.reference_split), self.extractor(metric, device)
        described = self.metric_description(metric, device)
        cache_key: dict[str, Any] = {
            "images": self.fingerprint(data, metric.reference_split),
            "extractor": {key: described[key] for key in FEATURE_KEYS if key in described}
            | {"layers": extractor.layers},
        }
        if extractor.device.type == "cuda":  # those of earlier code were in TF32
            cache_key["tf32"] = False
        return measure_reference(
            images, cache_key, extractor, Path(folder), self.processes, with_features=metric.needs_features
        )

    def _load(self, kind: str, key: Any, load: Callable[[], T]) -> T:
        if kind not in self._loaded or self._loaded[kind][0] != key:
            self._loaded.pop(kind, None)  # first, so that two models are never in memory at once
            self._loaded[kind] = key, load()
        return self._loaded[kind][1]


def _modified(path: str) -> int:
    return Path(path).stat().st_mtime_ns if Path(path).exists() else 0
