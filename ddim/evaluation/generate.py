"""Generating exactly the images asked for, each a function of (weights, sampler, seed, index) alone."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel
from ddim.config import blame
from ddim.data.images import to_uint8
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.sampling import SamplerSpec, State
from ddim.errors import UserError
from ddim.evaluation.parts import in_batches, split
from ddim.networks import tune_network

log = logging.getLogger(__name__)
LONG = 5.0  # seconds, for one network evaluation of a search


@dataclass(frozen=True)
class ComputeSpec:
    """How to compute; what is computed does not depend on it, but for rounding.

    Attributes:
        device: a torch device, such as cuda or cpu.
        batch_size: images in one network evaluation; 0 asks `with_batch_size` for a short search.
        bf16: run the network in bfloat16 under autocast; the state of the sampler stays float32.
        channels_last, compile, graphs, winograd: see `ddim.networks.tune_network`.

    Raises:
        ValueError: batch_size below 0, or 0 where each size would be compiled anew; bf16 with winograd, which is for
            float32.
    """

    device: str
    batch_size: int = 250
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    graphs: bool = False
    winograd: bool = False

    def __post_init__(self) -> None:
        if self.bf16 and self.winograd:
            raise ValueError("bf16 and winograd exclude each other: Winograd's algorithm needs float32.")
        if self.batch_size < 0:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1, or 0 for a search.")
        if self.batch_size == 0 and (self.compile or self.graphs):
            raise ValueError("batch_size=0 would compile the network for each size; give a number, or do not compile.")


def place(model: LoadedModel, compute: ComputeSpec) -> LoadedModel:
    """Move a model to its device and tune it, as `compute` says; returns the same model.

    Raises:
        UserError: the device is not there, or cannot do what `compute` says.
    """
    try:
        model.network.to(compute.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={compute.device} cannot be used here ({reason}); cpu always can.") from error
    ways = {name: getattr(compute, name) for name in ("channels_last", "compile", "graphs", "winograd")}
    tune_network(model.network, torch.device(compute.device), **ways)
    return model


def with_batch_size(model: LoadedModel, compute: ComputeSpec, most: int = 1024) -> ComputeSpec:
    """Return `compute` with a batch size of at least 1: where it is 0, that of a search up to `most` images.

    Args:
        model: on its device (`place`).
    """
    if compute.batch_size:
        return compute
    found = find_batch_size(lambda count: evaluate_zeros(model, compute, count), most)
    log.info("compute.batch_size=%d is about the fastest here.", found)
    return replace(compute, batch_size=found)


def find_batch_size(evaluate: Callable[[int], object], most: int) -> int:
    """Return the smallest of 1, 2, 4, ... images with which one takes at most 5 % longer than with the best number.

    The search ends at `most`, where memory does, where one evaluation takes `LONG` seconds, and where two sizes in a
    row were no faster than those before.

    Args:
        evaluate: what is timed, with so many images at once.
    """
    paces: dict[int, float] = {}  # seconds for an image
    count, slower = 1, 0
    while count <= most and slower < 2:
        fitted, took = time_second(evaluate, count)
        pace = took / fitted
        slower = slower + 1 if paces and pace >= min(paces.values()) else 0
        paces[fitted] = min(pace, paces.get(fitted, pace))
        if fitted < count or took > LONG:
            break
        count *= 2
    return min(size for size, pace in paces.items() if pace <= 1.05 * min(paces.values()))


def time_second(call: Callable[[int], object], count: int) -> tuple[int, float]:
    """Return the seconds of the second of two calls for `count` images, and for how many it was.

    The first one compiles, and allocates. What does not fit into memory is halved, as when images are generated.
    """

    def seconds(batch: range) -> float:
        call(len(batch))
        start = time.perf_counter()
        call(len(batch))
        return time.perf_counter() - start

    batch, took = next(in_batches([range(count)], seconds))
    return len(batch), took


@torch.inference_mode()
def evaluate_zeros(model: LoadedModel, compute: ComputeSpec, count: int) -> None:
    """Evaluate the network once, for timing, and wait for it."""
    x = torch.zeros(count, *model.spec.image_shape, device=compute.device)
    with autocast(compute):
        model(x, torch.ones(count, dtype=torch.int64, device=compute.device)).cpu()


def check_sampler(model: LoadedModel, sampler: SamplerSpec) -> tuple[int, ...]:
    """Return the times tau of a sampler on this model's schedule.

    Raises:
        UserError: the sampler does not fit the schedule.
    """
    with blame("sampler"):
        return sampler.tau(model.spec.schedule.T)


def generate(
    model: LoadedModel, sampler: SamplerSpec, indices: range, seed: int, compute: ComputeSpec, title: str = "sampling"
) -> Tensor:
    """Return the images numbered `indices`, uint8 (len(indices), C, H, W) on the CPU; see `generate_batch`.

    A batch that does not fit into memory is halved. The progress bar, called `title`, shows on terminals only.

    Raises:
        UserError: no images are asked for, the sampler does not fit the schedule, or the samples are not finite.
    """
    if len(indices) < 1:
        raise UserError(f"n={len(indices)} images were asked for; n must be at least 1.")
    if compute.batch_size < 1:
        raise UserError("batch_size=0 was not replaced by a number; see with_batch_size.")
    tau = check_sampler(model, sampler)
    places = split(range(len(indices)), compute.batch_size)
    with progress(len(indices) * len(tau), title) as bar:

        def images(batch: range) -> Tensor:
            return generate_batch(model, sampler, indices[batch.start : batch.stop], seed, compute, bar)

        return torch.cat([found for _, found in in_batches(places, images)])


def generate_batch(
    model: LoadedModel, sampler: SamplerSpec, indices: range, seed: int, compute: ComputeSpec, bar: tqdm
) -> Tensor:
    """Return the images numbered `indices`, uint8 (len(indices), C, H, W) on the CPU, all at once.

    Args:
        model: on its device (`place`).
        sampler: how to sample.
        indices: image numbers; image i is the same whatever else is asked for, up to the rounding of the network.
        seed: of x_T and of the noise in between.
        compute: device and precision.
        bar: counts network evaluations of one image.

    Raises:
        UserError: the samples are not finite.
    """
    x_T = initial_noise(indices, model.spec.image_shape, seed, device=compute.device)
    return to_pixels(sample_batch(model, sampler, x_T, indices, seed, compute, lambda state: bar.update(len(state.x))))


@torch.inference_mode()
def sample_batch(
    model: LoadedModel,
    sampler: SamplerSpec,
    x_T: Tensor,
    indices: Sequence[int],
    seed: int,
    compute: ComputeSpec,
    watch: Callable[[State], object],
) -> Tensor:
    """Return the samples that start from given x_T, float32 (B, C, H, W) on the device; all in one batch.

    Args:
        model: on its device (`place`).
        sampler: how to sample.
        x_T: (B, C, H, W), on that device.
        indices, seed: address of the noise in between.
        compute: the precision.
        watch: called with the state after each step.
    """
    states = sampler.trajectory(
        model, model.spec.schedule, x_T, prediction=model.spec.prediction, seed=seed, indices=indices
    )
    with autocast(compute):
        for state in states:
            watch(state)
    return state.x


def autocast(compute: ComputeSpec) -> torch.autocast:
    """Return the context in which the network runs as `compute` says."""
    return torch.autocast(torch.device(compute.device).type, torch.bfloat16, enabled=compute.bf16)


def progress(evaluations: int, title: str) -> tqdm:
    """Return a bar that counts network evaluations of one image, with the time left; it shows only on a terminal."""
    return tqdm(total=evaluations, desc=title, unit=" evaluations", unit_scale=True, disable=None)


def to_pixels(x: Tensor) -> Tensor:
    """Return samples in [-1, 1] as uint8 of the same shape, on the CPU.

    Raises:
        UserError: a value is infinite or not a number.
    """
    if not bool(torch.isfinite(x).all()):
        raise UserError(
            "the samples are not finite numbers; sample with compute.bf16=false, and if that does not help the "
            "checkpoint is of a training that diverged."
        )
    return to_uint8(x).cpu()
