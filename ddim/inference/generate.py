"""Generating exactly the images asked for, each a function of (weights, sampler, seed, index) alone."""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel
from ddim.config import config_context
from ddim.data.images import to_uint8
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.sampling import State
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference.batching import in_batches, split
from ddim.inference.compute import ComputeSpec, autocast

log = logging.getLogger(__name__)


def check_sampler(model: LoadedModel, sampler: SamplerSpec) -> tuple[int, ...]:
    """Return the times tau of a sampler on this model's schedule.

    Raises:
        UserError: the sampler does not fit the schedule.
    """
    with config_context("sampler"):
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
        model: on its device (`prepare_model`).
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
        model: on its device (`prepare_model`).
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
