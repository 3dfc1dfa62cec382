"""Metrics of images that exist already: a folder, or the samples of another code base, against a reference set."""

import dataclasses
import re
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ddim.config import FilePath, check_name
from ddim.data.datasets import DataSpec
from ddim.data.image_files import FileImages
from ddim.data.image_folder import first_image_shape, split_folders
from ddim.data.images import Images
from ddim.data.npz_images import SAMPLES, array_header, samples_shape
from ddim.errors import UserError
from ddim.evaluation.feature_stats import FeatureSet, save_moments
from ddim.evaluation.features import EXTRACTORS
from ddim.evaluation.fidelity import reference_settings
from ddim.evaluation.influence import compute_influences, keep_intervals
from ddim.evaluation.job import Job
from ddim.evaluation.metrics import MetricSpec, compute_metrics
from ddim.evaluation.reference_stats import measure_reference
from ddim.evaluation.session import Session
from ddim.inference.compute import ComputeSpec
from ddim.io import check_can_write, explain_read_errors, explain_write_errors
from ddim.results.protocol import FULL
from ddim.results.records import Record
from ddim.results.schema import IMAGES
from ddim.results.table import TableSpec
from ddim.results.wandb import LoggerSpec

LOSSY = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WebP"}  # the last may be without loss
LABEL_DIGITS = 8  # of the fingerprint, in the label of a row


@dataclass(frozen=True, kw_only=True)
class MetricsSpec:
    """One comparison of images with a reference set; see configs/metrics.yaml.

    Attributes:
        images: a folder of images, or an .npz with `arr_0`, uint8 (N, H, W, C); None where only `out` is written.
        reference: a folder, such an .npz, or one with `mu` and `sigma`; None takes the data set.
        data: the data set.
        metric: what to measure.
        device: where features are extracted.
        out: write mean and covariance of the reference there, and measure nothing.
        overwrite: replace that file.
        size, channels: of the images in folders; None takes those of the first image of each folder.
        resize, convert: see `DataSpec`; for folders.
        label: name of the row in tables; None takes the path of the images.
        name, output_dir, reference_dir, logger, table: as in an evaluation.

    Raises:
        ValueError: neither or both of `images` and `out`, size or channels out of range, TensorBoard, or a wrong name.
    """

    images: FilePath | None
    data: DataSpec
    metric: MetricSpec
    device: str
    name: str
    output_dir: FilePath
    reference: FilePath | None = None
    out: FilePath | None = None
    overwrite: bool = False
    size: tuple[int, int] | None = None
    channels: int | None = None
    resize: bool = False
    convert: bool = False
    label: str | None = None
    reference_dir: FilePath = "outputs/reference"
    logger: LoggerSpec = field(default_factory=LoggerSpec)
    table: TableSpec = field(default_factory=TableSpec)

    def __post_init__(self) -> None:
        check_name(self.name)
        if (self.images is None) == (self.out is None):
            raise ValueError(
                "give images=PATH, a folder or an .npz of samples, to measure them, or out=FILE.npz, to write the "
                "statistics of the reference; one of them."
            )
        if self.metric.reference_npz is not None:
            raise ValueError("metric.reference_npz is for evaluations of a checkpoint; write reference=FILE.npz here.")
        if of_classes := self.metric.class_metrics:
            raise ValueError(
                f"metric.metrics={of_classes[0]} needs the labels that images were sampled with; measure the "
                "checkpoint with scripts/evaluate.py."
            )
        self.logger.check_evaluation()

    @property
    def title(self) -> str:
        """The comparison in a few words."""
        return f"{self.label or self.images} against {self.reference or self.data.name}"

    @property
    def repetitions(self) -> Sequence["MetricsSpec"]:
        """The comparison itself, as a sequence; an evaluation can have several."""
        return [self]

    @cached_property
    def reference_metric(self) -> MetricSpec:
        """The metric with published statistics in place of the data set, where the reference is a file of those."""
        if self.reference is None or not self.reference.endswith(".npz"):
            return self.metric
        of_samples = {"kd", "prc"} & set(self.metric.metrics)
        if SAMPLES in (held := _arrays(self.reference)):
            of_this_extractor = [*map(str, held.get("mu", ()))] == [EXTRACTORS[self.metric.extractor].feature_layer]
            has_statistics = of_this_extractor and "sigma" in held
            if not has_statistics or (of_samples and "fd" not in self.metric.metrics):
                return self.metric
            if of_samples:  # the reference batches of ADM: statistics of a whole data set, and 10,000 of its images
                raise UserError(
                    f"{self.reference} holds mean and covariance, which fd takes, and samples, perhaps fewer, which "
                    f"{min(of_samples)} takes; give metric.metrics=[fd], and the others in a second command."
                )
        try:
            return dataclasses.replace(self.metric, reference_npz=self.reference)
        except ValueError as error:
            if not of_samples:
                raise UserError(str(error)) from error
            raise UserError(
                f"{self.reference} holds mean and covariance only, and {', '.join(sorted(of_samples))} needs the "
                "features of the reference; give reference=FOLDER, or other metric.metrics."
            ) from error

    @cached_property
    def reference_data(self) -> DataSpec:
        """The reference set as a data set; not read where the reference is a file of statistics."""
        if self.reference is None or self.reference_metric.reference_npz is not None:
            return self.data
        return self._data(self.reference)

    def prepare(self, session: Session) -> Job:
        """Check everything and load what is needed, without extracting a feature.

        Raises:
            UserError: bad input.
        """
        device, metric = session.processes.local_device(self.device), self.reference_metric
        images, fingerprint = self.load(session)
        with _own_keys(self.reference):
            reference = reference_settings(session, self.reference_data, metric, device, len(images), images.shape)
        settings = {
            "kind": IMAGES,
            "images": {"name": images.name, "images": len(images), "fingerprint": fingerprint},
            "n": len(images),
            "reference": reference,
            "metric": session.metric_description(metric, device),
        }
        metadata = {
            "label": f"{self.label or self.images} ({fingerprint[:LABEL_DIGITS]})",
            "S": len(images),  # the column of its table
            "spacing": FULL,
            "config": dataclasses.asdict(self),
        }
        return Job(
            title=self.title,
            output_dir=Path(self.output_dir),
            records=session.records(self.output_dir),
            settings=settings,
            metadata=metadata,
            indices=range(len(images)),
            steps=0,
            model=None,
            compute=ComputeSpec(device, batch_size=self.metric.batch_size),
            extractor=session.extractor(metric, device),
        )

    def load(self, session: Session) -> tuple[Images, str]:
        """Return the images and their fingerprint.

        Raises:
            UserError: they cannot be read.
        """
        assert self.images is not None
        with _own_keys(self.images):
            data = self._data(self.images)  # which refuses folders that may be splits or classes
            if data.name == "folder" and (splits := split_folders(Path(self.images))):
                raise UserError(
                    f"images={self.images} holds {' and '.join(splits)}; give one of them, such as "
                    f"images={Path(self.images) / splits[0]}."
                )
            images, fingerprint = session.samples(data)
            session.warn_once(_lossy_warning(images, self.images))
            return images, fingerprint

    def _data(self, path: str) -> DataSpec:
        """Return what is at a path as a data set.

        Raises:
            UserError: it is neither a folder nor an .npz of samples.
        """
        options: dict[str, Any] = {"flip": False, "root": path}
        if path.endswith(".npz"):
            channels, *size = samples_shape(Path(path))
            return DataSpec("npz", (size[0], size[1]), channels, **options)
        channels, *size = first_image_shape(Path(path), self.metric.reference_split)
        options |= {"resize": self.resize, "convert": self.convert, "in_memory": False}
        return DataSpec("folder", self.size or (size[0], size[1]), self.channels or channels, **options)


def evaluate(spec: MetricsSpec, session: Session | None = None) -> tuple[Record, bool]:
    """Return the record of a comparison, and whether it was computed now; see `ddim.evaluation.fidelity.evaluate`."""
    session = session or Session()
    processes = session.processes
    with processes.barrier():
        job = spec.prepare(session)
        images, fingerprint = spec.load(session)
    assert job.extractor is not None
    with job.lock_unless_done(processes) as record:
        if record is not None:
            return record, False
        start = time.perf_counter()
        metric, device = spec.reference_metric, job.compute.device
        reference = session.reference_stats(spec.reference_data, metric, device, spec.reference_dir, images.shape)
        folder = job.shards.folder  # deleted when there is a record
        generated = measure_reference(
            images, {"images": fingerprint}, job.extractor, folder, processes, with_features=True
        )
        results: dict[str, Any] = {}
        with processes.barrier():
            if processes.is_main:
                results = {**_measure(job, generated, reference, metric), "seconds_sampling": 0.0}
                results["seconds_metrics"] = time.perf_counter() - start
        return job.append_record(results, processes), True


def write_statistics(spec: MetricsSpec, session: Session | None = None) -> Path:
    """Write mean and covariance of the features of the reference set to `spec.out`, and return its path.

    Raises:
        UserError: bad input, or the file exists.
    """
    session = session or Session()
    assert spec.out is not None
    path = Path(spec.out)
    with session.processes.barrier(), _own_keys(spec.reference):
        if path.suffix != ".npz":
            raise UserError(f"out={path} must end in .npz, the format of the statistics.")
        if spec.reference_metric.reference_npz is not None:
            raise UserError(f"{spec.reference} is a file of statistics already; give a folder or a data set.")
        check_can_write(path, spec.overwrite, "out")
        shape = session.images(spec.reference_data, spec.metric.reference_split).shape
    device = session.processes.local_device(spec.device)
    moments_only = dataclasses.replace(spec.metric, metrics=("fd",))
    stats = session.reference_stats(spec.reference_data, moments_only, device, spec.reference_dir, shape)
    with session.processes.barrier(), explain_write_errors(path, "out"):
        if session.processes.is_main:
            save_moments(stats, path)
    return path


def _measure(job: Job, generated: FeatureSet, reference: FeatureSet, metric: MetricSpec) -> dict[str, Any]:
    assert job.extractor is not None
    metrics = compute_metrics(generated, reference, metric, len(job.indices))
    features = generated.features[job.extractor.layers[0]]
    influences = compute_influences(generated, reference, metric, [features], job.extractor.device)
    return {"metrics": metrics, "intervals": keep_intervals(job, metrics, influences)}


@contextmanager
def _own_keys(path: str | None) -> Iterator[None]:
    """Name the keys of this command in the errors of a folder of images, which name those of a data set."""
    try:
        yield
    except UserError as error:
        if path is None:
            raise
        raise UserError(re.sub(r"\bdata\.(?=(size|channels|resize|convert)\b)", "", str(error))) from error


def _lossy_warning(images: Images, path: str) -> str | None:
    """Return a warning where samples were compressed with loss, else None."""
    if not isinstance(images, FileImages):
        return None
    kinds = [LOSSY[suffix] for file in images.files if (suffix := file.suffix.lower()) in LOSSY]
    if not kinds:
        return None
    return (
        f"{len(kinds):,} of the {len(images):,} images in {path} are {' or '.join(sorted(set(kinds)))} files, and "
        "compression with loss alone raises an FID by points (5.80 for about 2.5 in one report); measure PNG files."
    )


def _arrays(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays in an .npz; of one that is missing or damaged none: the reader refuses it."""
    if not zipfile.is_zipfile(path):
        return {}
    with explain_read_errors(path), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy"): array_header(archive, name)[0] for name in archive.namelist()}
