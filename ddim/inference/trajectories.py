"""Sampling from given starting points, and what is seen on the way: the ground of figures and animations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.checkpoints import LoadedModel
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.sampling import State
from ddim.diffusion.spec import SamplerSpec
from ddim.inference.batching import in_batches, split
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import sample_batch

Keep = Callable[[Tensor, State], Tensor]  # (x_t before a step, the state after it), images first -> (B, ...)


@dataclass(frozen=True, eq=False)
class Source:
    """What samples come from besides the sampler.

    Attributes:
        model: on its device (`ddim.inference.compute.place`).
        seed: of x_T and of the noise in between.
        compute: how.
    """

    model: LoadedModel
    seed: int
    compute: ComputeSpec

    def x_T(self, indices: Sequence[int]) -> Tensor:
        """Return the starting points of images, float32 (B, C, H, W) on the CPU; always the same for image i."""
        return initial_noise(indices, self.model.spec.image_shape, self.seed)

    def tau(self, sampler: SamplerSpec) -> tuple[int, ...]:
        """Return the times of a sampler on this model's schedule."""
        return sampler.tau(self.model.spec.schedule.T)


@torch.inference_mode()
def along(
    source: Source,
    sampler: SamplerSpec,
    x_T: Tensor,
    indices: Sequence[int],
    steps: Sequence[int],
    keep: Keep,
    advance: Callable[[int], object],
) -> Tensor:
    """Sample from x_T in batches and return what `keep` takes out of some of the steps.

    Args:
        source: model, seed and batch size.
        sampler: how to sample.
        x_T: (N, C, H, W), on the CPU.
        indices: (N,) image numbers, which address the noise of the steps.
        steps: which steps, rising, of 1..len(tau).
        keep: called as keep(x_t, state) with x_t before the step and the state after it; returns (B, ...).
        advance: called with the number of images after each step.

    Returns:
        (N, len(steps), ...) on the CPU.
    """

    def kept(batch: range) -> Tensor:
        part = slice(batch.start, batch.stop)
        return _batch_along(source, sampler, x_T[part], indices[part], steps, keep, advance)

    return torch.cat([found for _, found in in_batches(split(range(len(x_T)), source.compute.batch_size), kept)])


def _batch_along(
    source: Source,
    sampler: SamplerSpec,
    x_T: Tensor,
    indices: Sequence[int],
    steps: Sequence[int],
    keep: Keep,
    advance: Callable[[int], object],
) -> Tensor:
    x_t = x_T.to(source.compute.device)
    kept: list[Tensor] = []

    def watch(state: State) -> None:
        nonlocal x_t
        if state.k in steps:
            kept.append(keep(x_t, state).cpu())
        x_t = state.x
        advance(len(x_t))

    sample_batch(source.model, sampler, x_t, indices, source.seed, source.compute, watch)
    return torch.stack(kept, dim=1)


def samples_from(
    source: Source, sampler: SamplerSpec, x_T: Tensor, indices: Sequence[int], advance: Callable[[int], object]
) -> Tensor:
    """Return the samples that start from x_T, float32 (N, C, H, W) on the CPU, not rounded to pixels; see `along`."""
    end = (len(source.tau(sampler)),)
    return along(source, sampler, x_T, indices, end, lambda _, state: state.x, advance)[:, 0]


def evenly(count: int, steps: int) -> tuple[int, ...]:
    """Return `count` steps of 1..steps at even distances, the first and the last among them; all if there are fewer.

    Args:
        count: at least 2.
        steps: of the trajectory.
    """
    if count >= steps:
        return tuple(range(1, steps + 1))
    return tuple(1 + i * (steps - 1) // (count - 1) for i in range(count))
