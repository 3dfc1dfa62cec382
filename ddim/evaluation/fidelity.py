"""A cell of Tables 1 and 3: generate exactly n images, measure them against real ones, keep a record."""

import dataclasses
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.checkpoints import LoadedModel
from ddim.config import choose
from ddim.data.datasets import DataSpec
from ddim.data.images import Images
from ddim.diffusion.labels import asked_steps, title
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.evaluation.feature_stats import FeatureSet, moments
from ddim.evaluation.job import (
    Cell,
    cached_fingerprint,
    cached_images,
    cached_model,
    check_shape,
    common_facts,
    model_facts,
    on_local_device,
    once,
    sampler_facts,
)
from ddim.evaluation.metrics import (
    FeatureExtractor,
    MetricSpec,
    check_sizes,
    compute_metrics,
    describe,
    keeps_features,
)
from ddim.evaluation.reference_stats import file_hash, measure_reference, published_reference
from ddim.evaluation.shards import Parts
from ddim.image_io import grid, save_png
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import check_sampler, generate_batch, progress
from ddim.io import Tensors
from ddim.random import check_seed
from ddim.results.paper import PAPER_TABLES
from ddim.results.records import Record, record_key
from ddim.results.wandb import LoggerSpec

SECONDS, SHOWN = "seconds", "shown"  # of a part, beside the features: sampling and extracting; images of the grid


@dataclass(frozen=True)
class EvaluateSpec:
    """A cell; see configs/evaluate.yaml.

    Attributes:
        checkpoint: path of the model.
        name: of the sweep.
        output_dir: its folder: records.jsonl, the tables, a grid of each cell.
        data: the reference set.
        metric, sampler, compute: what to measure, how to sample, how to compute.
        n: number of images, exactly.
        first: number of the first image.
        repeats: how often the cell is measured, each time on the n images after those of the time before.
        seed: of their noise, 0 .. 2**64 - 1.
        weights: ema, online, or ema_RATE for another average of the training.
        grid: images shown in the grid of the cell; 0 for none.
        save_images: also write each image as a PNG, named by its number.
        reference_dir: where statistics of reference sets are kept for all sweeps.
        paper: the table of the paper that the numbers stand beside.
        logger: W&B, if at all.

    Raises:
        ValueError: n or repeats below 1, a seed or image number out of range, or a negative grid.
    """

    checkpoint: str
    name: str
    output_dir: str
    data: DataSpec
    metric: MetricSpec
    sampler: SamplerSpec
    compute: ComputeSpec
    n: int = 50_000
    first: int = 0
    repeats: int = 1
    seed: int = 0
    weights: str = "ema"
    grid: int = 64
    save_images: bool = False
    reference_dir: str = "outputs/reference"
    paper: str | None = None
    logger: LoggerSpec = field(default_factory=LoggerSpec)

    def __post_init__(self) -> None:
        for name in ("n", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        check_seed(self.seed)
        if self.grid < 0:
            raise ValueError(f"grid={self.grid} must not be negative.")
        if self.logger.tensorboard:
            raise ValueError("logger=tensorboard is for training; choose logger=wandb or wandb_offline.")
        if self.paper is not None:
            choose("table of the paper", self.paper, PAPER_TABLES)
        if not 0 <= self.first <= (1 << 32) - self.n * self.repeats:
            raise ValueError(f"first={self.first} is out of range: image numbers lie in 0 .. 2**32 - 1.")

    @property
    def single(self) -> list["EvaluateSpec"]:
        """The same cell on each of its ranges of images, which do not overlap."""
        firsts = range(self.first, self.first + self.n * self.repeats, self.n)
        return [dataclasses.replace(self, first=first, repeats=1) for first in firsts]

    @property
    def title(self) -> str:
        """The cell in a few words."""
        where = f" from image {self.first:,}" if self.first else ""
        return f"{title(self.sampler)}{where}"

    @property
    def evaluations(self) -> int:
        """Network evaluations of one image, over all repeats, as far as the numbers asked for tell."""
        return self.repeats * self.n * asked_steps(self.sampler)

    def prepare(self, processes: Processes = SINGLE_PROCESS) -> Cell:
        """Check everything and load what is needed, without generating an image.

        The model, the extractor and the reference set are loaded once and kept for the next cell.

        Raises:
            UserError: bad input.
        """
        model, compute = cached_model(self.checkpoint, self.weights, on_local_device(self.compute, processes))
        spec = dataclasses.replace(self, compute=compute)
        tau = check_sampler(model, spec.sampler)
        reference = cached_images(spec.data, spec.metric.reference_split)
        check_shape(model, reference)
        extractor = _extractor(spec.metric, spec.compute.device)
        check_sizes(spec.metric, spec.n, None if spec.metric.reference_npz else len(reference))
        identity = _identity(spec, model, tau, reference)
        facts = {"kind": "fidelity", "paper": spec.paper, "config": dataclasses.asdict(self)}
        measurement = _Measurement(spec, model, extractor, record_key(identity))
        return Cell(
            title=self.title,
            output_dir=Path(spec.output_dir),
            identity=identity,
            facts=facts | common_facts(model, spec.sampler, tau),
            indices=range(spec.first, spec.first + spec.n),
            steps=len(tau),
            model=model,
            compute=spec.compute,
            measure=measurement,
            look=extractor.extract,
        )


def evaluate_cell(spec: EvaluateSpec, processes: Processes = SINGLE_PROCESS) -> tuple[Record, bool]:
    """Return the record of a cell, and whether it was computed now rather than found among the records.

    Of `spec.repeats` this is the first; see `EvaluateSpec.single`.

    Raises:
        UserError: bad input; before any image is generated.
    """
    return once(spec.prepare, processes)


@dataclass(frozen=True, eq=False)
class _Measurement:
    """Generates and measures the images of a cell, part by part."""

    spec: EvaluateSpec
    model: LoadedModel
    extractor: FeatureExtractor
    key: str

    def __call__(self, parts: Parts, processes: Processes) -> dict[str, Any]:
        spec = self.spec
        reference = _reference(spec.data, spec.metric, spec.compute.device, spec.reference_dir, processes)
        steps = len(check_sampler(self.model, spec.sampler))
        parts.require(self._suffices, processes)
        with progress(spec.n * steps, spec.title) as bar:

            def compute(batch: range) -> Tensors:
                start = time.perf_counter()
                images = generate_batch(self.model, spec.sampler, batch, spec.seed, spec.compute, bar)
                sampled = time.perf_counter()
                features = self.extractor.extract(images)
                if spec.save_images:
                    self._save_images(images, batch)
                seconds = torch.tensor([sampled - start, time.perf_counter() - sampled], dtype=torch.float64)
                return {**features, SHOWN: images[: self._shown(batch)], SECONDS: seconds}

            parts.fill(spec.compute.batch_size, compute, processes, lambda count: bar.reset(count * steps))
        start = time.perf_counter()
        layer = self.extractor.layers[0]
        generated = FeatureSet(*moments(parts.read(layer, processes), self.extractor.device, processes))
        found: dict[str, Any] = {}
        with processes.barrier():
            if processes.is_main:
                if keeps_features(spec.metric):
                    features = {name: torch.cat([*parts.read(name)]) for name in self.extractor.layers}
                    generated = dataclasses.replace(generated, features=features)
                found["metrics"] = compute_metrics(generated, reference, spec.metric, spec.n)
                found |= self._save_grid(parts) if spec.grid else {}
                sampling, extracting = torch.stack([*parts.read(SECONDS)]).sum(0).tolist()
                found["seconds_sampling"] = sampling
                found["seconds_metrics"] = extracting + time.perf_counter() - start
        return found

    def _shown(self, batch: range) -> int:
        """How many images of a batch stand in the grid."""
        return min(len(batch), max(0, self.spec.first + self.spec.grid - batch.start))

    def _suffices(self, batch: range, tensors: Tensors) -> bool:
        saved = not self.spec.save_images or all(self._file(i).exists() for i in batch)
        return saved and len(tensors[SHOWN]) >= self._shown(batch)

    def _file(self, i: int) -> Path:
        return Path(self.spec.output_dir) / "images" / self._name() / f"{i:06d}.png"

    def _save_images(self, images: Tensor, batch: range) -> None:
        for i, image in zip(batch, images, strict=True):
            save_png(image, self._file(i))

    def _save_grid(self, parts: Parts) -> dict[str, str]:
        name = f"grids/{self._name()}.png"
        save_png(grid(torch.cat([*parts.read(SHOWN)])[: self.spec.grid]), Path(self.spec.output_dir) / name)
        return {"grid": name}

    def _name(self) -> str:
        """A name for files of this cell that tells it from others."""
        sampler = self.spec.sampler
        rule = sampler.rule if sampler.eta is None else f"{sampler.rule}_eta_{sampler.eta}"
        clip = "" if sampler.clip == "none" else f"_clip_{sampler.clip}"
        return f"S{asked_steps(sampler):04d}_{rule}{clip}_{self.key[:6]}"


def _identity(spec: EvaluateSpec, model: LoadedModel, tau: tuple[int, ...], reference: Images) -> dict[str, Any]:
    split, npz = spec.metric.reference_split, spec.metric.reference_npz
    real = {"name": reference.name, "images": len(reference), "fingerprint": cached_fingerprint(spec.data, split)}
    return {
        "model": model_facts(model),
        "sampler": sampler_facts(spec.sampler, tau),
        "n": spec.n,
        "first": spec.first,
        "seed": spec.seed,
        "bf16": spec.compute.bf16,
        "pixels": "uint8, rounded half up",
        "reference": real if npz is None else {"name": Path(npz).name, "images": None, "fingerprint": file_hash(npz)},
        "metric": _extractor_facts(spec.metric, spec.compute.device),
    }


@lru_cache(maxsize=1)
def _extractor(metric: MetricSpec, device: str) -> FeatureExtractor:
    return FeatureExtractor(metric, device)


@lru_cache(maxsize=1)
def _extractor_facts(metric: MetricSpec, device: str) -> dict[str, Any]:
    return describe(metric, _extractor(metric, device))


@lru_cache(maxsize=1)
def _reference(data: DataSpec, metric: MetricSpec, device: str, folder: str, processes: Processes) -> FeatureSet:
    images, extractor = cached_images(data, metric.reference_split), _extractor(metric, device)
    if metric.reference_npz is not None:
        with processes.barrier():
            known = published_reference(metric, extractor, images.shape)
        return known
    features = ("extractor", "extractor_name", "resize", "weights_hash", "torch_fidelity")
    facts = {key: _extractor_facts(metric, device)[key] for key in features} | {"layers": extractor.layers}
    identity = {"images": cached_fingerprint(data, metric.reference_split), "extractor": facts}
    return measure_reference(images, identity, extractor, Path(folder), processes)
