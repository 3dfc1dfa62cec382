"""Search the times of a sampler for one checkpoint, and write them to a file that `sampler.spacing` takes."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel, load_model
from ddim.config import FilePath, check_name
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.sampling import Model
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.tau_file import SUFFIX
from ddim.diffusion.tau_search import STRIDES, end_error, fine_trajectory, named_spacings, search_tau
from ddim.diffusion.timesteps import quadratic_tau
from ddim.errors import UserError
from ddim.inference.batching import map_batches, split
from ddim.inference.compute import ComputeSpec, autocast, prepare_model, with_batch_size
from ddim.inference.conditioning import unlabelled
from ddim.inference.generate import check_exact, check_numbers, check_sampler, progress
from ddim.io import atomic_write, check_can_write, explain_write_errors
from ddim.random import check_image_numbers, check_seed
from ddim.results.records import code_revision

log = logging.getLogger(__name__)
MOST_CANDIDATES = 200
SEARCHED = "searched"  # its name among the errors of the named spacings


@dataclass(frozen=True)
class SearchTauSpec:
    """See configs/search_tau.yaml.

    Attributes:
        checkpoint: path of the model.
        output_dir, name: of the file, without .json.
        compute: how to compute.
        sampler: deterministic, with S; its spacing does not count.
        n: images to search with, and as many to check with.
        first: number of the first image; the n after those of the search are the check's.
        seed: of x_T, 0 .. 2**64 - 1.
        weights: ema, online, or ema_RATE for an additional EMA.
        candidates: how many times to choose from, by the quadratic rule; all of 1..T where there are fewer.
        overwrite: replace the file of an earlier search.

    Raises:
        ValueError: n below 1, image numbers or a seed out of range, a stochastic sampler, S or candidates out of
            range, or a name that is none.
    """

    checkpoint: FilePath
    output_dir: FilePath
    name: str
    compute: ComputeSpec
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    n: int = 256
    first: int = 1_000_000
    seed: int = 0
    weights: str = "ema"
    candidates: int = 60
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1.")
        check_image_numbers(self.first, 2 * self.n)
        check_seed(self.seed)
        if not self.sampler.deterministic:
            raise ValueError("the search needs a deterministic sampler, such as sampler=ddim with sampler.eta=0.")
        if self.sampler.S is None or self.sampler.has_file:
            raise ValueError("the search chooses the times: give sampler.S and leave sampler.spacing and times out.")
        if self.sampler.S > MOST_CANDIDATES:
            raise ValueError(
                f"sampler.S={self.sampler.S} is more than {MOST_CANDIDATES}, the most that a search takes."
            )
        if not self.sampler.S <= self.candidates <= MOST_CANDIDATES:
            raise ValueError(
                f"candidates={self.candidates} must lie in {self.sampler.S} .. {MOST_CANDIDATES}: sampler.S at least, "
                "and every three of them are tried."
            )

    @property
    def path(self) -> Path:
        """Where the file is written."""
        return Path(self.output_dir) / f"{self.name}{SUFFIX}"


def write_tau(spec: SearchTauSpec) -> dict[str, Any]:
    """Search, write the file, and return its content.

    Raises:
        UserError: bad input, or a file that would be overwritten, before any network evaluation; samples that are not
            finite.
    """
    revision = code_revision()  # of the code in memory, whatever is checked out meanwhile
    check_can_write(spec.path, spec.overwrite)
    model = load_model(spec.checkpoint, spec.weights)
    check_numbers(model)
    unlabelled(model, "the error")
    check_sampler(model, spec.sampler)
    check_exact(model, spec.sampler)
    T = model.spec.schedule.T
    candidates = quadratic_tau(T, min(spec.candidates, T))
    if sum(t > spec.sampler.last_time for t in candidates) < (spec.sampler.S or 0):
        raise UserError(f"sampler.S={spec.sampler.S} is more than there are times above last_time=1; take fewer.")
    most = spec.n * _most_evaluations(model, spec.sampler)
    compute = with_batch_size(model, prepare_model(model, spec.compute, most, spec.n), spec.n)
    log.info("a search of at most %s network evaluations of single images.", f"{most:,}")
    with progress(most, "search") as bar, torch.inference_mode(), autocast(compute):
        tau, errors = _search(model, spec, candidates, compute, bar)
    if not all(map(math.isfinite, errors[SEARCHED].values())):
        raise UserError("the samples are not finite numbers; the checkpoint is of a training that diverged.")
    content = {
        "tau": list(tau),
        "T": T,
        "sampler": spec.sampler.settings(),
        "S": len(tau),
        "weights": model.weights,
        "weights_hash": model.weights_hash,
        "schedule": model.spec.schedule.name,
        "prediction": model.spec.prediction,
        "seed": spec.seed,
        "first": spec.first,
        "n": spec.n,
        **compute.precision,
        "candidates": list(candidates),
        "errors": errors,
        "revision": revision,
    }
    with explain_write_errors(spec.path), atomic_write(spec.path) as partial:
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return content


def _search(
    model: LoadedModel, spec: SearchTauSpec, candidates: Sequence[int], compute: ComputeSpec, bar: tqdm
) -> tuple[tuple[int, ...], dict[str, dict[str, float]]]:
    """Return tau, and the errors of each spacing on the images of the search and on those held out."""
    schedule, prediction, sampler = model.spec.schedule, model.spec.prediction, spec.sampler
    network = _in_batches(model, compute.batch_size, bar)
    x_T, held_out = (
        initial_noise(range(first, first + spec.n), model.spec.image_shape, spec.seed, compute.state_device)
        for first in (spec.first, spec.first + spec.n)
    )
    tau, end = search_tau(network, schedule, x_T, sampler, candidates, prediction)
    held_out_end = fine_trajectory(network, schedule, held_out, sampler, (), prediction).end
    samplers = {SEARCHED: sampler.at_times(tau), **named_spacings(sampler, schedule.T)}
    return tau, {
        name: {
            "search": end_error(network, schedule, x_T, chosen, end, prediction),
            "held_out": end_error(network, schedule, held_out, chosen, held_out_end, prediction),
        }
        for name, chosen in samplers.items()
    }


def _in_batches(model: LoadedModel, batch_size: int, bar: tqdm) -> Model:
    """Return the model as a function that evaluates batches and counts single images."""

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        def batch(part: range) -> Tensor:
            output = model(x[part.start : part.stop], t[part.start : part.stop])
            bar.update(len(part))
            return output

        return torch.cat([output for _, output in map_batches(split(range(len(x)), batch_size), batch)])

    return evaluate


def _most_evaluations(model: LoadedModel, sampler: SamplerSpec) -> int:
    """Return the most evaluations of the network for each image."""
    schedule = model.spec.schedule
    named, steps = len(named_spacings(sampler, schedule.T)), sampler.S or 0
    trials = named + 2 * (1 + 2 * len(STRIDES) * steps) + 2 * (named + 1)
    return 2 * (schedule.T - sampler.last_time) + trials * sampler.evaluations(schedule)
