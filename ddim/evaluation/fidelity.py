"""The numbers of Tables 1 and 3: generate exactly n images and measure them against real ones."""

import dataclasses
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.checkpoints import LoadedModel
from ddim.config import FilePath
from ddim.data.datasets import DataSpec
from ddim.diffusion.guidance import GuidanceSpec, guidance_suffix
from ddim.diffusion.labels import asked_evaluations, asked_steps, title
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.evaluation.class_labels import check_class_metrics, share_warning
from ddim.evaluation.feature_stats import FeatureSet, moments
from ddim.evaluation.influence import compute_influences, keep_intervals
from ddim.evaluation.job import Job, JobSpec, check_data, count_shown, model_settings, sampler_settings, table_position
from ddim.evaluation.metrics import MetricSpec, check_sizes, compute_class_metrics, compute_metrics
from ddim.evaluation.session import Session
from ddim.image_io import save_png
from ddim.inference.conditioning import arrange, condition_settings, conditioned
from ddim.inference.generate import check_sampler, generate_batches, network_evaluations, progress
from ddim.io import Tensors
from ddim.networks import float32_products
from ddim.random import check_image_numbers, check_seed
from ddim.results.paper import times_warning
from ddim.results.records import Record

log = logging.getLogger(__name__)

# Entries of a shard besides features: seconds (sampling, extraction), and the images of the grid.
SECONDS, SHOWN = "seconds", "shown"
MOST_IMAGES, MOST_REPEATS = 10_000_000, 1000  # of one evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec(JobSpec):
    """One evaluation; see configs/evaluate.yaml.

    Attributes:
        data: the reference set; not read where `metric.reference_npz` takes its place.
        metric: what to measure.
        n: number of images, exactly.
        first: number of the first image.
        repeats: how many disjoint ranges of n images are measured, one after the other.
        seed: of the noise, 0 .. 2**64 - 1.
        label, guidance: of a conditional model, see `ddim.inference.conditioning.conditioned`.
        save_images: also write each image as a PNG, named by its number.
        reference_dir: where statistics of reference sets are kept for all sweeps.

    The others are those of `JobSpec`.

    Raises:
        ValueError: n not in 1..10,000,000, repeats not in 1..1000, a seed or image number out of range, or what
            `JobSpec` refuses.
    """

    data: DataSpec
    metric: MetricSpec
    n: int = 50_000
    first: int = 0
    repeats: int = 1
    seed: int = 0
    label: int | str | None = None
    guidance: GuidanceSpec = field(default_factory=GuidanceSpec)
    save_images: bool = False
    reference_dir: FilePath = "outputs/reference"

    def __post_init__(self) -> None:
        for name, most in (("n", MOST_IMAGES), ("repeats", MOST_REPEATS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, and at most {most:,}.")
        check_seed(self.seed)
        super().__post_init__()
        check_image_numbers(self.first, self.n * self.repeats)

    @property
    def indices(self) -> range:
        """The numbers of the generated images (of the first range, where there are several)."""
        return range(self.first, self.first + self.n)

    @property
    def repetitions(self) -> Sequence["EvaluateSpec"]:
        """The same evaluation on each of its ranges of images, which do not overlap."""
        firsts = range(self.first, self.first + self.n * self.repeats, self.n)
        return [dataclasses.replace(self, first=first, repeats=1) for first in firsts]

    @property
    def title(self) -> str:
        """The evaluation in a few words."""
        where = f" from image {self.first:,}" if self.first else ""
        return f"{title(self.sampler)}{guidance_suffix(self.label, self.guidance)}{where}"

    @property
    def network_evaluations(self) -> int:
        """Network evaluations of single images, over all repeats; fewer where guidance has an interval."""
        return self.repeats * self.n * asked_evaluations(self.sampler) * self.guidance.most_evaluations

    def prepare(self, session: Session) -> Job:
        """Check everything and load what is needed, without generating an image.

        Raises:
            UserError: bad input.
        """
        model, compute = session.model(self.checkpoint, self.weights, self.compute, self.network_evaluations, self.n)
        model = conditioned(model, self.label, self.guidance)
        tau = check_sampler(model, self.sampler)
        if self.sampler.rule != "sigma_hat" and len(tau) < model.spec.schedule.T:  # σ̂'s times are not known
            # Beside a file of statistics the data set is not read, and cifar10 unless it was given.
            of = self.data.name if self.metric.reference_npz is None else model.spec.data or self.data.name
            session.warn_once(times_warning(of, self.metric.extractor, self.sampler.spacing))
        settings = {
            "model": model_settings(model),
            "sampler": sampler_settings(self.sampler, tau),
            "n": self.n,
            "first": self.first,
            "seed": self.seed,
            **compute.precision,
            "pixels": "uint8, rounded half up",
            "reference": self._check_reference(session, model, compute.state_device),
            "metric": session.metric_description(self.metric, compute.state_device),
            **condition_settings(model),
        }
        metadata = {"kind": "fidelity", "paper": self.paper, "config": dataclasses.asdict(self)}
        return Job(
            title=self.title,
            output_dir=Path(self.output_dir),
            records=session.records(self.output_dir),
            settings=settings,
            metadata=metadata | table_position(model, self.sampler, tau),
            indices=self.indices,
            steps=network_evaluations(model, self.sampler),
            model=model,
            compute=compute,
            extractor=session.extractor(self.metric, compute.state_device),
        )

    def _check_reference(self, session: Session, model: LoadedModel, device: str) -> dict[str, Any]:
        """Return what a record states about the reference set."""
        images = None
        if self.metric.reference_npz is None:
            images = session.images(self.data, self.metric.reference_split)
            check_data(session, model, self.data, images)
            session.warn_once(share_warning(model, images))
        settings = reference_settings(session, self.data, self.metric, device, self.n, model.spec.image_shape)
        extractor = session.extractor(self.metric, device)
        return settings | check_class_metrics(self.metric, model, self.indices, extractor, images)


def reference_settings(
    session: Session, data: DataSpec, metric: MetricSpec, device: str, n: int, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Return what a record states about the reference set of n images (C, H, W).

    Raises:
        UserError: the reference cannot be used, has images of another shape, or a set is too small for the metric.
    """
    if metric.reference_npz is not None:
        stats, fingerprint = session.published_stats(metric.reference_npz, metric, device, shape)
        check_sizes(metric, n, stats.count)
        return {"name": Path(metric.reference_npz).name, "images": None, "fingerprint": fingerprint}
    images = session.images(data, metric.reference_split)
    if images.shape != shape:
        raise UserError(
            f"the images are of (channels, height, width) {shape}, {images.name} has {images.shape}; make them alike, "
            "for folders by size=[H,W] resize=true, or channels=... convert=true."
        )
    check_sizes(metric, n, len(images))
    return {
        "name": images.name,
        "images": len(images),
        "fingerprint": session.fingerprint(data, metric.reference_split),
    }


def evaluate(
    spec: EvaluateSpec, session: Session | None = None, more: Mapping[str, float] | None = None
) -> tuple[Record, bool]:
    """Return the record of an evaluation, and whether it was computed now rather than found among the records.

    Args:
        spec: what to evaluate; of `spec.repeats` ranges this is the first, see `repetitions`.
        session: what this evaluation shares with others, and the processes that compute it.
        more: further metrics of the same weights, for a new record.

    Raises:
        UserError: bad input, before any image is generated; another run is computing the same; or a batch cannot be
            computed. What was done stays, and the next call continues.
    """
    steps = evaluate_in_steps(spec, session or Session(), more)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def evaluate_in_steps(
    spec: EvaluateSpec,
    session: Session,
    more: Mapping[str, float] | None = None,
    pool: Executor | None = None,
    report: Callable[[Record], object] | None = None,
) -> Generator[None, None, tuple[Record, bool]]:
    """Evaluate, and yield when the images are sampled: meanwhile the main process computes the metrics in `pool`.

    The caller may begin other evaluations, and then continues this one, which waits for its record and returns what
    `evaluate` does. All processes must do the same in the same order.

    Args:
        spec, session, more: see `evaluate`.
        pool: of one thread of the main process; None computes the metrics here.
        report: called in the main process, in `pool`, with a new record.
    """
    processes = session.processes
    with processes.barrier():
        job = spec.prepare(session)
    with job.lock_unless_done(processes) as record:
        if record is not None:
            if processes.is_main:
                _warn_of_missing_images(spec, job)
            return record, False
        assert job.model is not None
        assert job.extractor is not None
        shape = job.model.spec.image_shape
        reference = session.reference_stats(spec.data, spec.metric, job.compute.state_device, spec.reference_dir, shape)
        if spec.metric.class_metrics and spec.metric.reference_npz is None:
            labels = session.images(spec.data, spec.metric.reference_split).labels
            reference = dataclasses.replace(reference, labels=labels)
        generate_shards(spec, job, processes)
        start = time.perf_counter()
        features = job.shards.read(job.extractor.layers[0], processes)
        generated = FeatureSet(*moments(features, job.extractor.device, processes))
        seconds = time.perf_counter() - start

        def finish() -> Record:
            results = measure(spec, job, reference, generated)
            results["metrics"] |= more or {}
            results["seconds_metrics"] += seconds
            record = job.write_record(results, processes)
            if report is not None:
                report(record)
            return record

        future = pool.submit(finish) if pool is not None and processes.is_main else None
        if pool is not None:
            yield
        return processes.run_on_main(finish if future is None else future.result), True


def generate_shards(spec: EvaluateSpec, job: Job, processes: Processes) -> None:
    """Generate the missing images and store their features, each process its share."""
    assert job.extractor is not None
    assert job.model is not None
    shards = job.shards
    shards.discard_unless(lambda batch, tensors: _suffices(spec, job, batch, tensors), processes)
    batches = shards.missing(job.compute.batch_size, processes)
    with (
        float32_products(tf32=False),  # between batches too: a thread extracts features meanwhile
        progress(sum(map(len, batches)) * job.steps, job.title, processes) as bar,
        shards.writer(processes) as write,
    ):
        start = time.perf_counter()
        for batch, images in generate_batches(job.model, spec.sampler, batches, spec.seed, job.compute, bar):
            extract = partial(_extract, spec, job, batch, images, time.perf_counter() - start)
            write(batch, extract if job.overlaps else extract())
            start = time.perf_counter()


def _extract(spec: EvaluateSpec, job: Job, batch: range, images: Tensor, sampling: float) -> Tensors:
    """Return what is stored of a batch of images that took `sampling` seconds, and save its pictures."""
    assert job.extractor is not None
    start = time.perf_counter()
    features = job.extractor.extract(images)
    if spec.save_images:
        _save_images(spec, job, images, batch)
    seconds = torch.tensor([sampling, time.perf_counter() - start], dtype=torch.float64)
    return {**features, SHOWN: images[: count_shown(spec.grid, batch, spec.first)], SECONDS: seconds}


def measure(spec: EvaluateSpec, job: Job, reference: FeatureSet, generated: FeatureSet) -> dict[str, Any]:
    """Return the metrics of the stored features, whose moments `generated` has, and what a record states with them."""
    assert job.extractor is not None
    assert job.model is not None
    start = time.perf_counter()
    shards, layers = job.shards, job.extractor.layers
    results: dict[str, Any] = {}
    if spec.metric.needs_features:
        generated = dataclasses.replace(generated, features={name: shards.read_all(name) for name in layers})
    of_classes: dict[str, dict[int, float]] = {}
    if spec.metric.class_metrics and (condition := job.model.condition) is not None:
        generated = dataclasses.replace(generated, labels=condition.labels(job.indices))
        of_classes = compute_class_metrics(generated, reference, spec.metric, spec.n)
        results["per_class"] = {
            metric: {condition.classes[y]: value for y, value in values.items()}
            for metric, values in of_classes.items()
        }
    results["metrics"] = compute_metrics(generated, reference, spec.metric, spec.n, of_classes)
    influences = compute_influences(generated, reference, spec.metric, shards.read(layers[0]), job.extractor.device)
    results["intervals"] = keep_intervals(job, results["metrics"], influences)
    if spec.grid:
        results["grid"] = f"grids/{_file_stem(spec, job)}.png"
        shown = shards.read_all(SHOWN)[: spec.grid]
        save_png(arrange(job.model, shown, job.indices[: len(shown)]), job.output_dir / results["grid"])
    sampling, extracting = torch.stack([*shards.read(SECONDS)]).sum(0).tolist()
    results["seconds_sampling"] = sampling
    results["seconds_metrics"] = extracting + time.perf_counter() - start
    return results


def _suffices(spec: EvaluateSpec, job: Job, batch: range, tensors: Tensors) -> bool:
    saved = not spec.save_images or all(_image_path(spec, job, i).exists() for i in batch)
    return saved and len(tensors[SHOWN]) >= count_shown(spec.grid, batch, spec.first)


def _warn_of_missing_images(spec: EvaluateSpec, job: Job) -> None:
    if spec.save_images and not all(_image_path(spec, job, i).exists() for i in job.indices):
        log.warning("%s is in the records, and its images were not kept; output_dir=OTHER makes them.", job.title)


def _save_images(spec: EvaluateSpec, job: Job, images: Tensor, batch: range) -> None:
    for i, image in zip(batch, images, strict=True):
        save_png(image, _image_path(spec, job, i))


def _image_path(spec: EvaluateSpec, job: Job, i: int) -> Path:
    return job.output_dir / "images" / _file_stem(spec, job) / f"{i:06d}.png"


def _file_stem(spec: EvaluateSpec, job: Job) -> str:
    """Return a name for files of this evaluation that distinguishes it from others."""
    sampler = spec.sampler
    rule = sampler.scheduler or sampler.rule if sampler.eta is None else f"{sampler.rule}_eta_{sampler.eta}"
    clip = "" if sampler.clip == "none" else f"_clip_{sampler.clip}"
    return f"S{asked_steps(sampler):04d}_{rule}{clip}_{job.key[:6]}"
