"""The numbers of Table 2: encode real images, decode them again, and measure the error (section 5.4)."""

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel
from ddim.checkpoints.model import weights_hash
from ddim.config import config_context
from ddim.data.datasets import DataSpec
from ddim.data.images import Images, normalize
from ddim.diffusion.guidance import OWN, GuidanceSpec, guidance_suffix
from ddim.diffusion.inversion import Inversion
from ddim.diffusion.labels import asked_steps, row_label, title
from ddim.diffusion.sampling import Model, State, last_state
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.evaluation.encoding import check_encoding, counted, encode_batch, inversion_evaluations
from ddim.evaluation.influence import keep_intervals, mean_influence
from ddim.evaluation.job import (
    Job,
    JobSpec,
    check_shape,
    count_shown,
    model_settings,
    run_job,
    sampler_settings,
    table_position,
)
from ddim.evaluation.metrics import count_name
from ddim.evaluation.session import Session
from ddim.image_io import grid, save_png
from ddim.inference.batching import map_batches
from ddim.inference.compute import ComputeSpec, autocast
from ddim.inference.conditioning import condition_settings, condition_suffix, conditioned, guided_states, one_label
from ddim.inference.generate import Numbers, check_numbers, check_sampler, progress, to_pixels
from ddim.io import Tensors
from ddim.results.records import Record

ERRORS, SHOWN, SECONDS = "errors", "shown", "seconds"  # in a shard
ROW = Inversion().label  # what tables call the sampler itself


@dataclass(frozen=True, kw_only=True)
class ReconstructSpec(JobSpec):
    """One evaluation; see configs/reconstruct.yaml.

    Attributes:
        data, split: the images to encode and decode.
        sampler: the times, the same in both directions; deterministic, eta=0.
        n: number of images, the first ones of the split; null for all.
        grid: images shown with their reconstructions; 0 for none.
        inversion, iterations: how to encode, see `ddim.diffusion.inversion.Inversion`.
        label, guidance: of a conditional model, see `ddim.inference.conditioning.conditioned`; label=own for those of
            the images.

    The others are those of `JobSpec`.

    Raises:
        ValueError: n below 1, a sampler that is not deterministic or does not end at t = 0, or what `JobSpec` and
            `Inversion` refuse.
    """

    data: DataSpec
    split: Literal["train", "test"] = "test"
    n: int | None = None
    grid: int = 32
    inversion: str = "paper"
    iterations: int | None = None
    label: int | str | None = None
    guidance: GuidanceSpec = field(default_factory=GuidanceSpec)

    def __post_init__(self) -> None:
        if self.n is not None and self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1, or null for all images.")
        super().__post_init__()
        check_encoding(self.sampler, self.how)

    @property
    def how(self) -> Inversion:
        """How images are encoded and decoded."""
        return Inversion(self.inversion, self.iterations)

    @property
    def title(self) -> str:
        """The evaluation in a few words."""
        name = title(self.sampler).replace(ROW, self.how.label)
        return f"reconstruction {name}{guidance_suffix(self.label, self.guidance)}"

    @property
    def network_evaluations(self) -> int | None:
        """Network evaluations of single images, there and back, at most; None for all images of the split."""
        each = self.guidance.most_evaluations * sum(self.how.evaluations(asked_steps(self.sampler)))
        return None if self.n is None else self.n * each

    def prepare(self, session: Session) -> Job:
        """Check everything and load what is needed, without encoding an image.

        Raises:
            UserError: bad input.
        """
        images = session.images(self.data, self.split)
        n = len(images) if self.n is None else self.n
        evaluations = n * self.guidance.most_evaluations * sum(self.how.evaluations(asked_steps(self.sampler)))
        model, compute = session.model(self.checkpoint, self.weights, self.compute, evaluations, n)
        check_numbers(model)
        tau = check_sampler(model, self.sampler)
        model = conditioned(model, self.label, self.guidance, images)
        one_label(model, "a reconstruction")
        check_shape(model, images)
        if n > len(images):
            raise UserError(f"n={n} images are more than the {len(images)} of {images.name}; n=null takes all.")
        with config_context("inversion"):
            self.how.check_levels(model.spec.schedule, self.sampler.tau(model.spec.schedule.T), model.spec.prediction)
        fingerprint = session.fingerprint(self.data, self.split)
        settings = {
            "kind": "reconstruction",
            "model": model_settings(model),
            "sampler": sampler_settings(self.sampler, tau),
            "n": n,
            **compute.precision,
            "pixels": "float32, neither rounded nor clamped",
            "reference": {"name": images.name, "images": len(images), "fingerprint": fingerprint},
            "metric": {"name": "reconstruction", "scale": "mean squared error of a value in [0, 1]"},
            **condition_settings(model),
        }
        if model.condition is not None and self.label == OWN:  # the same images may be given other labels
            settings["reference"]["labels"] = weights_hash({"labels": model.condition.labels(range(n))})
        encoding, decoding = inversion_evaluations(model, self.how, self.sampler)
        counts = {"nfe_encoding": encoding, "nfe_decoding": decoding}
        metadata = {"paper": self.paper, "config": dataclasses.asdict(self), **counts}
        position = table_position(model, self.sampler, tau)
        if self.inversion != "paper":  # whose records keep their keys
            settings["inversion"] = self.how.settings()
            position["label"] = row_label(self.sampler).replace(ROW, self.how.label) + condition_suffix(model)
        if self.inversion != "paper" or encoding + decoding != 2 * len(tau):
            del position["nfe"]  # the columns of these tables are S
        if self.guidance.most_evaluations > 1:
            position["label"] += " (up to twice the NFE)"
        return Job(
            title=self.title,
            output_dir=Path(self.output_dir),
            records=session.records(self.output_dir),
            settings=settings,
            metadata=metadata | position,
            indices=range(n),
            steps=encoding + decoding,
            model=model,
            compute=compute,
        )


def evaluate(spec: ReconstructSpec, session: Session | None = None) -> tuple[Record, bool]:
    """Return the record of an evaluation, and whether it was computed now; see `ddim.evaluation.fidelity.evaluate`."""

    def compute(job: Job, session: Session) -> dict[str, Any]:
        reconstruct_shards(spec, job, session.images(spec.data, spec.split), session.processes)
        return measure(spec, job, session.processes)

    return run_job(spec, session, compute)


def reconstruct_shards(spec: ReconstructSpec, job: Job, images: Images, processes: Processes) -> None:
    """Encode and decode the missing images and store their errors, each process its share."""
    shards = job.shards
    shards.discard_unless(lambda batch, tensors: len(tensors[SHOWN]) >= count_shown(spec.grid, batch), processes)
    batches = shards.missing(job.compute.batch_size, processes)
    with progress(sum(map(len, batches)) * job.steps, job.title, processes) as bar, shards.writer(processes) as write:
        for batch, tensors in map_batches(batches, lambda batch: _reconstruct_batch(spec, job, images, batch, bar)):
            write(batch, tensors)


def measure(spec: ReconstructSpec, job: Job, processes: Processes) -> dict[str, Any]:
    """Return the mean of the stored errors and what a record states with it; {} but in the main process."""
    results: dict[str, Any] = {}
    shards, n = job.shards, len(job.indices)
    with processes.barrier():
        if processes.is_main:
            errors, name = shards.read_all(ERRORS), f"reconstruction_mse_{count_name(n)}"
            results["metrics"] = {name: float(errors.mean())}
            results["intervals"] = keep_intervals(job, results["metrics"], {name: mean_influence(errors)})
            results["seconds_sampling"] = float(sum(shards.read(SECONDS)))
            results["seconds_metrics"] = 0.0
            if spec.grid:
                results["grid"] = f"grids/reconstruction_S{asked_steps(spec.sampler):04d}_{job.key[:6]}.png"
                pairs = shards.read_all(SHOWN)[: spec.grid]
                save_png(grid(pairs.flatten(0, 1), columns=8), job.output_dir / results["grid"])
    return results


@torch.inference_mode()
def reconstruct(
    model: LoadedModel,
    how: Inversion,
    sampler: SamplerSpec,
    x_0: Tensor,
    compute: ComputeSpec,
    bar: tqdm | None = None,
    indices: Numbers | None = None,
) -> Tensor:
    """Return x_0, (B, C, H, W) in [-1, 1], encoded to x_T and decoded over the same times (section 5.4).

    Arguments are those of `encode_batch`.
    """
    indices = range(len(x_0)) if indices is None else indices
    x_T, second = encode_batch(model, how, sampler, x_0, compute, bar, indices)
    tau, clip, spec = sampler.tau(model.spec.schedule.T), sampler.build_clip(), model.spec

    def walk(network: Model) -> Iterator[State]:
        return how.decode(network, spec.schedule, x_T, tau, second=second, prediction=spec.prediction, clip=clip)

    with autocast(compute):
        states = guided_states(model, indices, x_T.device, walk)
        return last_state(counted(states, inversion_evaluations(model, how, sampler)[1], bar))


def _reconstruct_batch(spec: ReconstructSpec, job: Job, images: Images, batch: range, bar: tqdm) -> Tensors:
    assert job.model is not None
    start = time.perf_counter()
    pixels = torch.stack([images[i] for i in batch])
    x_0 = normalize(pixels.to(job.compute.state_device))
    x = reconstruct(job.model, spec.how, spec.sampler, x_0, job.compute, bar, batch)
    errors = ((x - x_0).double() / 2).square().flatten(1).mean(1).cpu()  # [0, 1] is half as wide as [-1, 1]
    pairs = torch.stack([pixels, to_pixels(x)], dim=1)[: count_shown(spec.grid, batch)]
    return {ERRORS: errors, SHOWN: pairs, SECONDS: torch.tensor(time.perf_counter() - start, dtype=torch.float64)}
