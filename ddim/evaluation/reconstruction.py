"""A cell of Table 2: encode real images, decode them again, and say how far off they come back (section 5.4)."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel
from ddim.config import choose
from ddim.data.datasets import DataSpec
from ddim.data.images import Images, normalize
from ddim.diffusion.labels import asked_steps, title
from ddim.diffusion.sampling import DDIM, trajectory
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation.job import (
    Cell,
    cached_fingerprint,
    cached_images,
    cached_model,
    check_shape,
    common_facts,
    model_facts,
    on_local_device,
    sampler_facts,
)
from ddim.evaluation.metrics import count_name
from ddim.evaluation.shards import Parts
from ddim.image_io import grid, save_png
from ddim.inference.compute import ComputeSpec, autocast
from ddim.inference.generate import check_sampler, progress, to_pixels
from ddim.io import Tensors
from ddim.results.paper import PAPER_TABLES
from ddim.results.wandb import LoggerSpec

ERRORS, SHOWN, SECONDS = "errors", "shown", "seconds"  # of a part


@dataclass(frozen=True)
class ReconstructSpec:
    """A cell; see configs/reconstruct.yaml.

    Attributes:
        checkpoint: path of the model.
        name: of the sweep.
        output_dir: its folder: records.jsonl, the tables, pictures.
        data, split: the images to encode and decode.
        sampler: the times, the same ones up and down; deterministic, eta=0.
        compute: how to compute.
        n: number of images, the first ones of the split; null for all.
        weights: ema, online, or ema_RATE for another average of the training.
        grid: images shown beside their reconstructions; 0 for none.
        paper: the table of the paper that the numbers stand beside.
        logger: W&B, if at all.

    Raises:
        ValueError: n below 1, a negative grid, or a sampler that is not deterministic or does not end at t = 0.
    """

    checkpoint: str
    name: str
    output_dir: str
    data: DataSpec
    sampler: SamplerSpec
    compute: ComputeSpec
    split: Literal["train", "test"] = "test"
    n: int | None = None
    weights: str = "ema"
    grid: int = 32
    paper: str | None = None
    logger: LoggerSpec = field(default_factory=LoggerSpec)

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1, or null for all images.")
        if self.grid < 0:
            raise ValueError(f"grid={self.grid} must not be negative.")
        if self.logger.tensorboard:
            raise ValueError("logger=tensorboard is for training; choose logger=wandb or wandb_offline.")
        if self.paper is not None:
            choose("table of the paper", self.paper, PAPER_TABLES)
        if self.sampler.build_rule() != DDIM(0.0) or self.sampler.last_time:
            raise ValueError("encoding is deterministic and starts at the image: take sampler.eta=0 and last_time=0.")

    @property
    def single(self) -> list["ReconstructSpec"]:
        """The cell itself: there is nothing random to repeat."""
        return [self]

    @property
    def title(self) -> str:
        """The cell in a few words."""
        return f"reconstruction {title(self.sampler)}"

    @property
    def evaluations(self) -> int | None:
        """Network evaluations of one image, there and back, as far as the numbers asked for tell."""
        return None if self.n is None else 2 * self.n * asked_steps(self.sampler)

    def prepare(self, processes: Processes = SINGLE_PROCESS) -> Cell:
        """Check everything and load what is needed, without encoding an image.

        Raises:
            UserError: bad input.
        """
        model, compute = cached_model(self.checkpoint, self.weights, on_local_device(self.compute, processes))
        tau = check_sampler(model, self.sampler)
        images = cached_images(self.data, self.split)
        check_shape(model, images)
        n = len(images) if self.n is None else self.n
        if n > len(images):
            raise UserError(f"n={n} images are more than the {len(images)} of {images.name}; n=null takes all.")
        if model.spec.prediction == "x0":
            raise UserError("a network that predicts x0 says nothing of ε at t=0, where encoding starts.")
        identity = {
            "kind": "reconstruction",
            "model": model_facts(model),
            "sampler": sampler_facts(self.sampler, tau),
            "n": n,
            "bf16": self.compute.bf16,
            "pixels": "float32, neither rounded nor clamped",
            "reference": {
                "name": images.name,
                "images": len(images),
                "fingerprint": cached_fingerprint(self.data, self.split),
            },
            "metric": {"name": "reconstruction", "scale": "mean squared error of a value in [0, 1]"},
        }
        facts = {"paper": self.paper, "config": dataclasses.asdict(self)}
        measurement = _Measurement(self, compute, model, images, n)
        return Cell(
            title=self.title,
            output_dir=Path(self.output_dir),
            identity=identity,
            facts=facts | common_facts(model, self.sampler, tau),
            indices=range(n),
            steps=2 * len(tau),
            model=model,
            compute=compute,
            measure=measurement,
        )


@torch.inference_mode()
def reconstruct(
    model: LoadedModel, sampler: SamplerSpec, x_0: Tensor, compute: ComputeSpec, bar: tqdm | None = None
) -> Tensor:
    """Return x_0, (B, C, H, W) in [-1, 1], encoded to x_T (Eq. 13 upwards) and decoded over the same times."""
    tau = sampler.tau(model.spec.schedule.T)
    x = x_0
    with autocast(compute):
        for times in ((0, *tau), (*reversed(tau), 0)):
            states = trajectory(
                model, model.spec.schedule, x, times, DDIM(), prediction=model.spec.prediction, clip=sampler.clip
            )
            for state in states:
                x = state.x
                if bar is not None:
                    bar.update(len(x))
    return x


@dataclass(frozen=True, eq=False)
class _Measurement:
    """Encodes, decodes and compares the images of a cell, part by part."""

    spec: ReconstructSpec
    compute: ComputeSpec
    model: LoadedModel
    images: Images
    n: int

    def __call__(self, parts: Parts, processes: Processes) -> dict[str, Any]:
        spec, steps = self.spec, 2 * len(check_sampler(self.model, self.spec.sampler))
        parts.require(lambda batch, tensors: len(tensors[SHOWN]) >= self._shown(batch), processes)
        with progress(self.n * steps, spec.title) as bar:

            def compute(batch: range) -> Tensors:
                start = time.perf_counter()
                pixels = torch.stack([self.images[i] for i in batch])
                x_0 = normalize(pixels.to(self.compute.device))
                x = reconstruct(self.model, spec.sampler, x_0, self.compute, bar)
                errors = ((x - x_0).double() / 2).square().flatten(1).mean(1).cpu()  # [0, 1] is half as wide as [-1, 1]
                pairs = torch.stack([pixels, to_pixels(x)], dim=1)[: self._shown(batch)]
                seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
                return {ERRORS: errors, SHOWN: pairs, SECONDS: seconds}

            parts.fill(self.compute.batch_size, compute, processes, lambda count: bar.reset(count * steps))
        found: dict[str, Any] = {}
        with processes.barrier():
            if processes.is_main:
                error = float(torch.cat([*parts.read(ERRORS)]).mean())
                found["metrics"] = {f"reconstruction_mse_{count_name(self.n)}": error}
                found["seconds_sampling"] = float(sum(parts.read(SECONDS)))
                found["seconds_metrics"] = 0.0
                found |= self._save_grid(parts) if spec.grid else {}
        return found

    def _shown(self, batch: range) -> int:
        """How many images of a batch stand in the grid."""
        return min(len(batch), max(0, self.spec.grid - batch.start))

    def _save_grid(self, parts: Parts) -> dict[str, str]:
        name = f"grids/reconstruction_S{asked_steps(self.spec.sampler):04d}_{parts.folder.name[:6]}.png"
        pairs = torch.cat([*parts.read(SHOWN)])[: self.spec.grid]
        save_png(grid(pairs.flatten(0, 1), columns=8), Path(self.spec.output_dir) / name)
        return {"grid": name}
