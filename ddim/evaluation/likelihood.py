"""Bits per dimension of real images: by the probability-flow equation, or by DDPM's variational bound."""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel
from ddim.config import config_context
from ddim.data.datasets import DataSpec
from ddim.data.images import Images, normalize
from ddim.diffusion.gaussians import PIXEL
from ddim.diffusion.labels import asked_steps, row_label, title
from ddim.diffusion.likelihood import (
    Solved,
    adaptive_steps,
    ascending_times,
    bits_per_dim,
    dequantise,
    draw_probes,
    fixed_steps,
)
from ddim.diffusion.sampling import count_evaluations
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.variational_bound import bound_terms, check_bound, check_rule
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.evaluation.influence import keep_intervals, mean_influence
from ddim.evaluation.job import Job, JobSpec, check_shape, model_settings, run_job, sampler_settings, table_position
from ddim.evaluation.metrics import count_name
from ddim.evaluation.session import Session
from ddim.image_io import grid, save_png
from ddim.inference.batching import map_batches
from ddim.inference.compute import ComputeSpec, autocast
from ddim.inference.conditioning import unlabelled
from ddim.inference.generate import check_numbers, check_sampler, progress
from ddim.io import Tensors
from ddim.random import check_seed
from ddim.results.protocol import ADAPTIVE
from ddim.results.records import Record
from ddim.results.table import rounded

BITS, TERMS, EVALUATIONS, SECONDS = "bits", "terms", "evaluations", "seconds"  # in a shard
ADAPTIVE_EVALUATIONS = 150  # a guess, for the forecast; the record states what was counted


@dataclass(frozen=True, kw_only=True)
class LikelihoodSpec(JobSpec):
    """One evaluation; see configs/likelihood.yaml.

    Attributes:
        data, split: the images.
        method: `ode`, the probability-flow equation for images with uniform noise of one grey level; `bound`, the
            variational bound for the pixels themselves.
        sampler: of `ode`, where the data stand, its last_time; with tolerance=null also the rule, a deterministic one
            that can go up, and the times. Of `bound`, ddim with eta > 0, sigma_hat or learned_variance: the variance,
            the times and the clip policy.
        probe, probes: of `ode`, which random vectors Hutchinson's estimate takes, and how many.
        tolerance: of `ode`, the error of a step of the adaptive rule; null for the fixed steps of the sampler.
        n: number of images, the first ones of the split; null for all.
        seed: of all noise, 0 .. 2**64 - 1.
        grid: images shown, half with the fewest bits and half with the most; 0 for none.

    The others are those of `JobSpec`.

    Raises:
        ValueError: n or probes below 1, a tolerance or seed out of range, a sampler that the method cannot use, or what
             `JobSpec` refuses.
    """

    data: DataSpec
    split: Literal["train", "test"] = "test"
    method: Literal["ode", "bound"] = "ode"
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    probes: int = 1
    tolerance: float | None = 1e-3
    n: int | None = None
    seed: int = 0
    grid: int = 0

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("probes", self.probes)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1{', or null for all images' * (name == 'n')}.")
        check_seed(self.seed)
        super().__post_init__()
        rule = self.sampler.build_rule()
        if self.sampler.corrector_steps:
            raise ValueError("a sampler with a corrector has no likelihood; set sampler.corrector_steps=0.")
        if self.method == "bound":
            check_rule(rule)
            if self.tolerance is not None:
                raise ValueError(f"tolerance={self.tolerance} is of method=ode; set tolerance=null.")
            if self.sampler.last_time:
                raise ValueError("last_time=1 has no bound for pixels, which are at time 0; set sampler.last_time=0.")
            return
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance} must lie between 0 and 1, such as 1e-4.")
        if self.tolerance is not None and dataclasses.replace(self.sampler, last_time=0) != SamplerSpec():
            raise ValueError(
                f"tolerance={self.tolerance} takes steps of its own, not those of the sampler; set tolerance=null, or "
                "leave the sampler out."
            )
        if rule.convergence is None:
            raise ValueError(
                f"{row_label(self.sampler)} adds noise, and method=ode follows a deterministic trajectory; take "
                "sampler=heun, or method=bound."
            )
        if self.sampler.clip != "none":
            raise ValueError(f"clip={self.sampler.clip} has no likelihood by method=ode; set sampler.clip=none.")

    @property
    def title(self) -> str:
        """The evaluation in a few words."""
        steps = title(self.sampler) if self.tolerance is None else f"Dormand-Prince, tolerance {self.tolerance:g}"
        return f"bits/dim, {self.method}: {steps}"

    @property
    def network_evaluations(self) -> int | None:
        """Network evaluations of single images; None where more than the specification decides it."""
        return self.n * asked_steps(self.sampler) if self.n and self.method == "bound" else None

    def prepare(self, session: Session) -> Job:
        """Check everything and load what is needed, without evaluating the network.

        Raises:
            UserError: bad input.
        """
        compute = self.compute
        if self.method == "ode" and self.tolerance is not None:
            # Fewer and fewer images are unfinished, and it would be compiled for each number of them.
            compute = dataclasses.replace(compute, compile=bool(compute.compile), graphs=bool(compute.graphs))
        model, compute = session.model(self.checkpoint, self.weights, compute)
        # The adaptive rule has times of its own; S = 1 exists for every T.
        sampler = self.sampler if self.tolerance is None else dataclasses.replace(self.sampler, S=1)
        check_numbers(model)
        unlabelled(model, "the likelihood")
        tau = check_sampler(model, sampler)
        times, steps = self._check_times(model, tau)
        images = session.images(self.data, self.split)
        check_shape(model, images)
        n = len(images) if self.n is None else self.n
        if n > len(images):
            raise UserError(f"n={n} images are more than the {len(images)} of {images.name}; n=null takes all.")
        ode = self.method == "ode"
        settings = {
            "kind": "likelihood",
            "model": model_settings(model),
            "sampler": sampler_settings(self.sampler, times),
            "n": n,
            "seed": self.seed,
            **compute.precision,
            "pixels": "dequantised uniformly" if ode else "256 grey levels",
            "reference": {
                "name": images.name,
                "images": len(images),
                "fingerprint": session.fingerprint(self.data, self.split),
            },
            "metric": {"name": f"bits_per_dim_{self.method}", "scale": "bits for each value of a pixel"}
            | ({"probe": self.probe, "probes": self.probes, "tolerance": self.tolerance} if ode else {}),
        }
        position = table_position(model, sampler, tau) | {"nfe": steps}
        if self.tolerance is not None:
            settings["sampler"] = {"rule": "dormand_prince", "last_time": self.sampler.last_time, "tau": list(times)}
            position |= {"label": f"Dormand-Prince {self.tolerance:g}", "spacing": ADAPTIVE}
        return Job(
            title=self.title,
            output_dir=Path(self.output_dir),
            records=session.records(self.output_dir),
            settings=settings,
            metadata={"paper": self.paper, "config": dataclasses.asdict(self)} | position,
            indices=range(n),
            steps=steps,
            model=model,
            compute=compute,
        )

    def _check_times(self, model: LoadedModel, tau: tuple[float, ...]) -> tuple[tuple[int, ...], int]:
        """Return the times in 1..T that the evaluation uses, and its network evaluations of one image."""
        schedule, prediction = model.spec.schedule, model.spec.prediction
        times = tuple(int(t) for t in tau)
        with config_context("sampler"):
            if self.method == "bound":
                check_bound(schedule, times, self.sampler.build_rule(), prediction)
                return times, len(times)
            first = self.sampler.last_time
            if prediction == "x0" and first == 0:
                raise UserError("a network that predicts x0 gives no ε at t=0; set sampler.last_time=1.")
            if self.tolerance is not None:
                return (schedule.T,), ADAPTIVE_EVALUATIONS
            if schedule[times[-1]] == 0:
                raise UserError("σ̄ is infinite at alpha_bar=0; set tolerance=1e-4 for the adaptive rule, without σ̄.")
            ascending = ascending_times(times, first)
            return times, count_evaluations(self.sampler.build_rule(), schedule, ascending)


def evaluate(spec: LikelihoodSpec, session: Session | None = None) -> tuple[Record, bool]:
    """Return the record of an evaluation, and whether it was computed now; see `ddim.evaluation.fidelity.evaluate`."""

    def compute(job: Job, session: Session) -> dict[str, Any]:
        images = session.images(spec.data, spec.split)
        measure_shards(spec, job, images, session.processes)
        return summarize(spec, job, images, session.processes)

    return run_job(spec, session, compute)


def measure_shards(spec: LikelihoodSpec, job: Job, images: Images, processes: Processes) -> None:
    """Store the bits per dimension of the missing images, each process its share."""
    batches = job.shards.missing(job.compute.batch_size, processes)
    total = sum(map(len, batches)) * job.steps
    with progress(total, job.title, processes) as bar, job.shards.writer(processes) as write:
        for batch, tensors in map_batches(batches, lambda batch: _measure_batch(spec, job, images, batch, bar)):
            write(batch, tensors)


def summarize(spec: LikelihoodSpec, job: Job, images: Images, processes: Processes) -> dict[str, Any]:
    """Return the mean over the images and what a record states with it; {} but in the main process."""
    results: dict[str, Any] = {}
    shards, n = job.shards, len(job.indices)
    with processes.barrier():
        if processes.is_main:
            bits, evaluations = shards.read_all(BITS), shards.read_all(EVALUATIONS)
            name = f"bits_per_dim_{spec.method}_{count_name(n)}"
            results["metrics"] = {name: float(bits.mean())}
            results["intervals"] = keep_intervals(job, results["metrics"], {name: mean_influence(bits)})
            results["network_evaluations"] = int(evaluations.sum())
            if spec.tolerance is not None:
                results["nfe"] = results["S"] = int(evaluations.median())
            if spec.method == "bound":
                terms = shards.read_all(TERMS)  # from L_0 to L_T
                results["terms"] = [rounded(term) for term in terms.mean(0).tolist()]
            results["seconds_sampling"] = float(sum(shards.read(SECONDS)))
            results["seconds_metrics"] = 0.0
            if spec.grid:
                order = bits.argsort(stable=True)
                shown = [*order[: spec.grid // 2], *order[spec.grid // 2 :][-(spec.grid - spec.grid // 2) :]]
                results["grid"] = f"grids/likelihood_{spec.method}_{job.key[:6]}.png"
                save_png(grid(images.batch(torch.stack(shown))), job.output_dir / results["grid"])
    return results


def log_likelihood(
    model: LoadedModel,
    spec: LikelihoodSpec,
    x_0: Tensor,
    indices: range,
    compute: ComputeSpec,
    bar: tqdm | None = None,
) -> Solved:
    """Return log p of the dequantised images x_0, (B, C, H, W) in [-1, 1], numbered `indices`; by method=ode."""
    schedule, sampler = model.spec.schedule, spec.sampler
    x = dequantise(x_0, spec.seed, indices)
    probes = draw_probes(spec.probe, spec.probes, x, spec.seed, indices)
    named: dict[str, Any] = {"prediction": model.spec.prediction, "first_time": sampler.last_time}
    count = (lambda evaluations: None) if bar is None else bar.update
    with autocast(compute):
        if spec.tolerance is not None:
            return adaptive_steps(model, schedule, x, spec.tolerance, probes, **named, after_evaluation=count)
        tau = sampler.tau(schedule.T)
        return fixed_steps(model, schedule, x, tau, sampler.build_rule(), probes, **named, after_evaluation=count)


def _measure_batch(spec: LikelihoodSpec, job: Job, images: Images, batch: range, bar: tqdm) -> Tensors:
    start = time.perf_counter()
    model, compute = job.model, job.compute
    assert model is not None
    x_0 = normalize(images.batch(torch.tensor(batch)).to(compute.state_device))
    D = math.prod(x_0.shape[1:])
    if spec.method == "ode":
        try:
            solved = log_likelihood(model, spec, x_0, batch, compute, bar)
        except ValueError as error:  # of the adaptive rule
            raise UserError(str(error)) from error
        tensors = {BITS: bits_per_dim(solved.log_likelihood + D * math.log(PIXEL), D), EVALUATIONS: solved.evaluations}
    else:
        with autocast(compute):
            terms = bound_terms(
                model,
                model.spec.schedule,
                x_0,
                spec.sampler.tau(model.spec.schedule.T),
                spec.sampler.build_rule(),
                prediction=model.spec.prediction,
                clip=spec.sampler.build_clip(),
                seed=spec.seed,
                indices=batch,
                after_evaluation=bar.update,
            )
        terms = bits_per_dim(-terms, D)
        tensors = {BITS: terms.sum(1), TERMS: terms, EVALUATIONS: torch.full((len(batch),), job.steps)}
    if not bool(tensors[BITS].isfinite().all()):
        raise UserError(
            "the likelihood is not a finite number; set compute.bf16=false, and if that does not help, the checkpoint "
            "is of a training that diverged."
        )
    seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    return {name: values.cpu() for name, values in tensors.items()} | {SECONDS: seconds}
