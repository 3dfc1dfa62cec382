"""One cell of a sweep: generate exactly n images, measure them, keep a record."""

import dataclasses
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ddim.checkpoints import LoadedModel, load_model
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import Images
from ddim.data.pictures import grid, save_png
from ddim.diffusion.noise import check_seed
from ddim.diffusion.sampling import SamplerSpec
from ddim.diffusion.timesteps import distinct_evaluations
from ddim.errors import UserError
from ddim.evaluation.generate import ComputeSpec, check_sampler, generate, place
from ddim.evaluation.metrics import FeatureExtractor, Features, MetricSpec, check_sizes, compute_metrics, describe
from ddim.evaluation.records import Record, RecordFile, provenance, record_key

RECORDS = "records.jsonl"


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
        seed: of their noise, 0 .. 2**64 - 1.
        weights: ema, raw, or ema_RATE for another average of the training.
        grid: images shown in the grid of the cell; 0 for none.

    Raises:
        ValueError: n below 1, a seed out of range, or a negative grid.
    """

    checkpoint: str
    name: str
    output_dir: str
    data: DataSpec
    metric: MetricSpec
    sampler: SamplerSpec
    compute: ComputeSpec
    n: int = 50_000
    seed: int = 0
    weights: str = "ema"
    grid: int = 64

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1.")
        check_seed(self.seed)
        if self.grid < 0:
            raise ValueError(f"grid={self.grid} must not be negative.")


def evaluate_cell(spec: EvaluateSpec) -> tuple[Record, bool]:
    """Return the record of a cell, and whether it was computed now rather than found among the records.

    The model, the extractor and the features of the reference set are loaded once and kept for the next cell.

    Raises:
        UserError: bad input; before any image is generated.
    """
    model = _model(
        spec.checkpoint,
        Path(spec.checkpoint).stat().st_mtime_ns if Path(spec.checkpoint).exists() else 0,
        spec.weights,
        spec.compute,
    )
    tau = check_sampler(model, spec.sampler)
    reference = _images(spec.data, spec.metric.reference_split)
    extractor = _extractor(spec.metric, spec.compute.device)
    if model.spec.image_shape != reference.shape:
        raise UserError(
            f"the checkpoint makes images of (channels, height, width) {model.spec.image_shape}, the reference set has "
            f"{reference.shape}; choose the data the model was trained on."
        )
    check_sizes(spec.metric, spec.n, len(reference))
    identity = _identity(spec, model, tau, reference)
    key = record_key(identity)
    records = RecordFile(Path(spec.output_dir) / RECORDS)
    if (found := records.find(key)) is not None:
        return found, False
    reference_features = _reference_features(spec.data, spec.metric, spec.compute.device)
    start = time.perf_counter()
    images = generate(model, spec.sampler, range(spec.n), spec.seed, spec.compute, title=label(spec.sampler))
    sampled = time.perf_counter()
    metrics = compute_metrics(extractor.extract(images), reference_features, spec.metric, spec.n)
    record = {
        "key": key,
        **identity,
        "metrics": metrics,
        "trained_on": model.spec.data,
        "S": len(tau),
        "label": row_label(spec.sampler),
        "spacing": _spacing(spec.sampler, tau, model.spec.schedule.T),
        "distinct_evaluations": distinct_evaluations(tau),
        "network_evaluations": spec.n * len(tau),
        "seconds_sampling": sampled - start,
        "seconds_metrics": time.perf_counter() - sampled,
        "config": dataclasses.asdict(spec),
        **provenance(),
    }
    if spec.grid:
        record["grid"] = _save_grid(images[: spec.grid], spec, key)
    records.append(record)
    return record, True


def row_label(sampler: SamplerSpec) -> str:
    """Return how a sampler is named in a table's first column: η=0.5, or σ̂, with a clip policy if there is one."""
    plain = sampler.rule if sampler.eta is None else f"{sampler.rule} η={sampler.eta}"
    name = {"ddim": f"η={sampler.eta}", "sigma_hat": "σ̂"}.get(sampler.rule, plain)
    return name if sampler.clip == "none" else f"{name} (clip {sampler.clip})"


def label(sampler: SamplerSpec) -> str:
    """Return a sampler in a few words."""
    steps = f"S={_steps(sampler)}" if sampler.times is None else f"{_steps(sampler)} times"
    return f"{row_label(sampler)} {steps} {sampler.spacing}"


def _steps(sampler: SamplerSpec) -> int:
    """Return the number of steps asked for; `uniform` may take more."""
    return len(sampler.times) if sampler.times is not None else sampler.S or 0


def _identity(spec: EvaluateSpec, model: LoadedModel, tau: tuple[int, ...], reference: Images) -> dict[str, Any]:
    """Everything that decides the numbers, and nothing else: not the batch size, not the device."""
    # The same weights give other numbers behind another schedule, or with other groups in a normalisation.
    description = model.spec.to_dict() | {"schedule": model.spec.schedule.alpha_bar.tolist()}
    return {
        "model": {
            "weights": model.weights,
            "weights_hash": model.weights_hash,
            "step": model.step,
            "schedule": model.spec.schedule.name,
            "T": model.spec.schedule.T,
            "prediction": model.spec.prediction,
            "description_hash": record_key(description),
        },
        "sampler": {
            "rule": spec.sampler.rule,
            "eta": spec.sampler.eta,
            "clip": spec.sampler.clip,
            "last_time": spec.sampler.last_time,
            "tau": list(tau),
        },
        "n": spec.n,
        "seed": spec.seed,
        "bf16": spec.compute.bf16,
        "pixels": "uint8, rounded half up",
        "reference": {
            "name": reference.name,
            "images": len(reference),
            "fingerprint": _fingerprint(spec.data, spec.metric.reference_split),
        },
        "metric": _extractor_facts(spec.metric, spec.compute.device),
    }


def _spacing(sampler: SamplerSpec, tau: tuple[int, ...], T: int) -> str:
    """Return the name of the times; cells with the same name, S and T have the same times."""
    if tau == tuple(range(1, T + 1)):
        return "full"
    return sampler.spacing if sampler.times is None else f"explicit {','.join(map(str, tau))}"


def _save_grid(images: Tensor, spec: EvaluateSpec, key: str) -> str:
    rule = spec.sampler.rule if spec.sampler.eta is None else f"{spec.sampler.rule}_eta_{spec.sampler.eta}"
    clip = "" if spec.sampler.clip == "none" else f"_clip_{spec.sampler.clip}"
    name = f"grids/S{_steps(spec.sampler):04d}_{rule}{clip}_{key[:6]}.png"
    save_png(grid(images), Path(spec.output_dir) / name)
    return name


@lru_cache(maxsize=1)
def _model(checkpoint: str, modified: int, weights: str, compute: ComputeSpec) -> LoadedModel:
    # `modified` makes a checkpoint that was trained on a new one.
    return place(load_model(checkpoint, weights), compute)


@lru_cache(maxsize=1)
def _images(data: DataSpec, split: Literal["train", "test"]) -> Images:
    return load_images(data, split)


@lru_cache(maxsize=1)
def _fingerprint(data: DataSpec, split: Literal["train", "test"]) -> str:
    return _images(data, split).fingerprint()


@lru_cache(maxsize=1)
def _extractor(metric: MetricSpec, device: str) -> FeatureExtractor:
    return FeatureExtractor(metric, device)


@lru_cache(maxsize=1)
def _extractor_facts(metric: MetricSpec, device: str) -> dict[str, Any]:
    return describe(metric, _extractor(metric, device))


@lru_cache(maxsize=1)
def _reference_features(data: DataSpec, metric: MetricSpec, device: str) -> Features:
    return _extractor(metric, device).extract(_images(data, metric.reference_split))
