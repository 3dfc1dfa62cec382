"""The error of a solver: how far its samples are from the exact trajectory's, from the same x_T."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddim.diffusion.labels import asked_evaluations, row_label, title
from ddim.diffusion.tau_search import exact_sampler
from ddim.distributed import Processes
from ddim.evaluation.influence import keep_intervals, mean_influence
from ddim.evaluation.job import Job, JobSpec, count_shown, model_settings, run_job, sampler_settings, table_position
from ddim.evaluation.metrics import count_name
from ddim.evaluation.session import Session
from ddim.evaluation.shards import Shards
from ddim.image_io import grid, save_png
from ddim.inference.conditioning import unlabelled
from ddim.inference.generate import check_exact, check_numbers, check_sampler, progress, sample_batches, to_pixels
from ddim.random import check_seed
from ddim.results.records import Record, record_key

X_0, ERRORS, SHOWN, SECONDS = "x_0", "errors", "shown", "seconds"  # in a shard
MOST_IMAGES = 100_000  # whose x_0 are in memory at once


@dataclass(frozen=True, kw_only=True)
class TrajectoryErrorSpec(JobSpec):
    """One evaluation; see configs/solver_error.yaml.

    Attributes:
        sampler: a deterministic one.
        n: number of images.
        seed: of x_T, 0 .. 2**64 - 1.
        grid: images shown; 0 for none.

    The others are those of `JobSpec`.

    Raises:
        ValueError: n not in 1..100,000, a seed out of range, a sampler that adds noise, or what `JobSpec` refuses.
    """

    n: int = 100
    seed: int = 0
    grid: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n <= MOST_IMAGES:
            raise ValueError(f"n={self.n} must be at least 1, and at most {MOST_IMAGES:,}.")
        check_seed(self.seed)
        super().__post_init__()
        if not self.sampler.deterministic:
            raise ValueError(
                f"{row_label(self.sampler)} adds noise, so no exact trajectory belongs to it; choose a deterministic "
                "sampler, such as sampler=ddim."
            )

    @property
    def title(self) -> str:
        """The evaluation in a few words."""
        return f"trajectory error {title(self.sampler)}"

    @property
    def network_evaluations(self) -> int:
        """Network evaluations of single images, without those of the exact trajectory."""
        return self.n * asked_evaluations(self.sampler)

    def prepare(self, session: Session) -> Job:
        """Check everything and load what is needed, without evaluating the network.

        Raises:
            UserError: bad input.
        """
        model, compute = session.model(self.checkpoint, self.weights, self.compute, self.network_evaluations, self.n)
        check_numbers(model)
        tau = check_sampler(model, self.sampler)
        unlabelled(model, "this error")
        T = model.spec.schedule.T
        exact = check_exact(model, self.sampler)
        described = {
            "model": model_settings(model),
            "sampler": sampler_settings(exact, exact.tau(T)),
            "n": self.n,
            "seed": self.seed,
        }
        settings = described | {
            "kind": "trajectory",
            "sampler": sampler_settings(self.sampler, tau),
            **compute.precision,
            "pixels": "float32, neither rounded nor clamped",
            "reference": {
                "name": f"{row_label(exact)} over all {T:,} times",
                "images": self.n,
                "fingerprint": record_key(described),
            },
            "metric": {"name": "trajectory_rmse", "scale": "root of the mean squared difference of values in [-1, 1]"},
        }
        metadata = {"paper": self.paper, "config": dataclasses.asdict(self)}
        return Job(
            title=self.title,
            output_dir=Path(self.output_dir),
            records=session.records(self.output_dir),
            settings=settings,
            metadata=metadata | table_position(model, self.sampler, tau),
            indices=range(self.n),
            steps=self.sampler.evaluations(model.spec.schedule),
            model=model,
            compute=compute,
        )


def evaluate(spec: TrajectoryErrorSpec, session: Session | None = None) -> tuple[Record, bool]:
    """Return the record of an evaluation, and whether it was computed now; see `ddim.evaluation.fidelity.evaluate`."""

    def compute(job: Job, session: Session) -> dict[str, Any]:
        exact = exact_samples(spec, job, session.processes)
        compare_shards(spec, job, exact, session.processes)
        return measure(spec, job, exact, session.processes)

    return run_job(spec, session, compute)


def exact_samples(spec: TrajectoryErrorSpec, job: Job, processes: Processes) -> Shards:
    """Return x_0 of the exact trajectories, (n, C, H, W) as X_0, in float32 without TF32; they stay in exact/HASH."""
    shards = Shards(job.output_dir / "exact" / job.settings["reference"]["fingerprint"], job.indices)
    assert job.model is not None
    T = job.model.spec.schedule.T
    sampler, compute = exact_sampler(spec.sampler, T), dataclasses.replace(job.compute, bf16=False, tf32=False)
    with shards.lock(processes, wait=True):  # the jobs of a sweep may start together
        if processes.is_main:
            shards.warn_of_other_code(f"the exact trajectories of {job.title}")
        batches = shards.missing(compute.batch_size, processes)
        with (
            progress(sum(map(len, batches)) * T, "exact trajectory", processes) as bar,
            shards.writer(processes) as write,
        ):
            for batch, x_0 in sample_batches(job.model, sampler, batches, spec.seed, compute, bar):
                to_pixels(x_0)  # refuses what is not finite
                write(batch, {X_0: x_0.cpu()})
    return shards


def compare_shards(spec: TrajectoryErrorSpec, job: Job, exact: Shards, processes: Processes) -> None:
    """Sample the missing images and store their errors, each process its share."""
    assert job.model is not None
    shards, compute, reference = job.shards, job.compute, exact.read_all(X_0)
    shards.discard_unless(lambda batch, tensors: len(tensors[SHOWN]) >= count_shown(spec.grid, batch), processes)
    batches = shards.missing(compute.batch_size, processes)
    with progress(sum(map(len, batches)) * job.steps, job.title, processes) as bar, shards.writer(processes) as write:
        start = time.perf_counter()
        for batch, x_0 in sample_batches(job.model, spec.sampler, batches, spec.seed, compute, bar):
            pixels, x_0 = to_pixels(x_0), x_0.cpu()
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            errors = (x_0 - reference[batch.start : batch.stop]).double().square().flatten(1).mean(1)
            write(batch, {ERRORS: errors, SHOWN: pixels[: count_shown(spec.grid, batch)], SECONDS: seconds})
            start = time.perf_counter()


def measure(spec: TrajectoryErrorSpec, job: Job, exact: Shards, processes: Processes) -> dict[str, Any]:
    """Return the root of the mean of the stored errors and what a record states with it; {} but in the main process."""
    results: dict[str, Any] = {}
    shards = job.shards
    with processes.barrier():
        if processes.is_main:
            errors, name = shards.read_all(ERRORS), f"trajectory_rmse_{count_name(spec.n)}"
            error = float(errors.mean().sqrt())
            results |= {"metrics": {name: error}, "other_revisions": exact.other_revisions()}
            influence = mean_influence(errors, 0.5 / error if error else 0.0)  # the derivative of the root
            results["intervals"] = keep_intervals(job, results["metrics"], {name: influence})
            results["seconds_sampling"] = float(sum(shards.read(SECONDS)))
            results["seconds_metrics"] = 0.0
            if spec.grid:
                results["grid"] = f"grids/trajectory_NFE{job.steps:04d}_{job.key[:6]}.png"
                save_png(grid(shards.read_all(SHOWN)[: spec.grid]), job.output_dir / results["grid"])
    return results
