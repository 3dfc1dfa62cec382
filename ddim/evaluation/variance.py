"""E||ε̂||² / d of a checkpoint at each time, for the optimal variance of `sampler=analytic`, in a file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel, load_model
from ddim.config import FilePath, check_name, config_context
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import normalize
from ddim.diffusion.analytic import mean_squares, table_hash
from ddim.diffusion.sampling import Model
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.job import check_shape
from ddim.inference.batching import map_batches, split
from ddim.inference.compute import ComputeSpec, autocast, prepare_model, with_batch_size
from ddim.inference.conditioning import unlabelled
from ddim.inference.generate import check_numbers, progress
from ddim.io import atomic_write, check_can_write, explain_write_errors
from ddim.random import check_seed
from ddim.results.records import code_revision


@dataclass(frozen=True, kw_only=True)
class EstimateVarianceSpec:
    """See configs/estimate_variance.yaml.

    Attributes:
        checkpoint: path of the model.
        output_dir, name: of the file, without .json.
        data, split: the images, those that the model was trained on.
        compute: how to compute.
        sampler: whose times to estimate at; null for all of 1..T, which any sampler can then take.
        n: number of images, the first ones of the split.
        seed: of the noise, 0 .. 2**64 - 1.
        weights: ema, online, or ema_RATE for an additional EMA.
        overwrite: replace an earlier file.

    Raises:
        ValueError: n below 2, a seed out of range, or a name that is none.
    """

    checkpoint: FilePath
    output_dir: FilePath
    name: str
    data: DataSpec
    compute: ComputeSpec
    sampler: SamplerSpec | None = None
    split: Literal["train", "test"] = "train"
    n: int = 256
    seed: int = 0
    weights: str = "ema"
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        check_seed(self.seed)
        if self.n < 2:
            raise ValueError(f"n={self.n} must be at least 2, for a mean and its standard error.")

    @property
    def path(self) -> Path:
        """Where the file is written."""
        return Path(self.output_dir) / f"{self.name}.json"


def write_variance(spec: EstimateVarianceSpec) -> dict[str, Any]:
    """Estimate, write the file, and return its content.

    Raises:
        UserError: bad input, or a file that would be overwritten; before any network evaluation.
    """
    revision = code_revision()  # of the code in memory, whatever is checked out meanwhile
    check_can_write(spec.path, spec.overwrite)
    model = load_model(spec.checkpoint, spec.weights)
    schedule = model.spec.schedule
    check_numbers(model)
    unlabelled(model, "the variance")
    with config_context("sampler"):
        times = range(1, schedule.T + 1) if spec.sampler is None else sorted(set(spec.sampler.tau(schedule.T)))
    images = load_images(spec.data, spec.split)
    check_shape(model, images)
    if spec.n > len(images):
        raise UserError(f"n={spec.n} images are more than the {len(images)} of {images.name}; ask for fewer.")
    compute = with_batch_size(model, prepare_model(model, spec.compute, spec.n * len(times), spec.n), spec.n)

    def x_0(batch: range) -> Tensor:
        return normalize(images.batch(torch.tensor(batch)).to(compute.state_device))

    with progress(spec.n * len(times), "variance") as bar:
        mean, error = estimate(model, schedule, x_0, spec.n, times, model.spec.prediction, spec.seed, compute, bar)
    levels = [schedule[t] for t in times]
    content = {
        "t": list(times),
        "alpha_bar": levels,
        "mean_square": mean,
        "standard_error": error,
        "hash": table_hash(list(zip(levels, mean, strict=True))),
        **_provenance(spec, model, compute),
        "revision": revision,
        "data": {"name": images.name, "images": len(images), "fingerprint": images.fingerprint()},
    }
    with explain_write_errors(spec.path), atomic_write(spec.path) as partial:
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return content


def _provenance(spec: EstimateVarianceSpec, model: LoadedModel, compute: ComputeSpec) -> dict[str, Any]:
    return {
        "T": model.spec.schedule.T,
        "schedule": model.spec.schedule.name,
        "prediction": model.spec.prediction,
        "weights": model.weights,
        "weights_hash": model.weights_hash,
        "step": model.step,
        "n": spec.n,
        "seed": spec.seed,
        **compute.precision,
    }


@torch.inference_mode()
def estimate(
    model: Model,
    schedule: NoiseSchedule,
    x_0: Callable[[range], Tensor],
    n: int,
    times: Sequence[int],
    prediction: str,
    seed: int,
    compute: ComputeSpec,
    bar: tqdm | None = None,
) -> tuple[list[float], list[float]]:
    """Return the mean of ||ε̂||² / d over n images, and its standard error, at each time.

    It is summed image by image, so that it does not depend on the batch size, up to the rounding of the network.

    Args:
        model, schedule, times, prediction, seed: as in `mean_squares`.
        x_0: returns the images with such numbers, in [-1, 1], (B, C, H, W), on the device of `compute`.
        n: number of images, 2 or more.
        compute: device, batch size and precision.
        bar: counts network evaluations of single images.
    """

    def counted(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t)
        if bar is not None:
            bar.update(len(x))
        return output

    def squares(batch: range) -> Tensor:
        images = x_0(batch)
        return mean_squares(counted, schedule, images, times, prediction=prediction, seed=seed, indices=batch).cpu()

    mean, deviation = torch.zeros(2, len(times), dtype=torch.float64)
    with autocast(compute):
        rows = (row for _, part in map_batches(split(range(n), compute.batch_size), squares) for row in part)
        for count, row in enumerate(rows, start=1):  # Welford's sums
            change = row - mean
            mean = mean + change / count
            deviation = deviation + change * (row - mean)
    return mean.tolist(), (deviation / (n - 1) / n).sqrt().tolist()
