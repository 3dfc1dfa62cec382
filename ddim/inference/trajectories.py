"""Sample from given starting points and record what happens on the way, for figures and animations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.checkpoints import LoadedModel
from ddim.diffusion.sampling import State
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.inference.batching import map_shared, split
from ddim.inference.compute import ComputeSpec, autocast
from ddim.inference.generate import check_sampler, sample_steps

Record = Callable[[Tensor, State], Tensor]  # (x_t before a step, the state after it), images first -> (B, ...)


@dataclass(frozen=True, eq=False)
class SamplingContext:
    """What a sample depends on besides the sampler.

    Attributes:
        model: on its device (`ddim.inference.compute.prepare_model`).
        seed: of x_T and of the noise of the steps.
        compute: how to compute.
        processes: that share the batches; each gets all results.
        given: starting points in place of noise, (N, C, H, W), such as images that were encoded; image i is the i-th.
    """

    model: LoadedModel
    seed: int
    compute: ComputeSpec
    processes: Processes = SINGLE_PROCESS
    given: Tensor | None = None

    def x_T(self, indices: Sequence[int]) -> Tensor:
        """Return the starting points of images, float32 (B, C, H, W) on the CPU; always the same for image i."""
        if self.given is not None:
            return self.given[list(indices)]
        return self.model.spec.x_T(indices, self.seed)

    def tau(self, sampler: SamplerSpec) -> tuple[float, ...]:
        """Return the times of a sampler on this model's schedule."""
        return check_sampler(self.model, sampler)


@torch.inference_mode()
def record_steps(
    context: SamplingContext,
    sampler: SamplerSpec,
    x_T: Tensor,
    indices: Sequence[int],
    steps: Sequence[int],
    record: Record,
    advance: Callable[[int], object],
    second: Tensor | None = None,
) -> Tensor:
    """Sample from x_T in batches and return what `record` takes from some of the steps.

    Args:
        context: model, seed and batch size.
        sampler: how to sample.
        x_T: (N, C, H, W), on the CPU.
        indices: (N,) image numbers, which the noise of the steps depends on.
        steps: which steps, increasing, of 1..len(tau).
        record: called as record(x_t, state) with x_t before the step and the state after it; returns (B, ...).
        advance: called after each step with its number of network evaluations of single images.
        second: the states after the first step, (N, C, H, W), where they are known; there is no first step then.

    Returns:
        (N, len(steps), ...) on the CPU.
    """

    def record_batch(batch: range) -> Tensor:
        x_t, images = x_T[batch.start : batch.stop].to(context.compute.state_device), indices[batch.start : batch.stop]
        x_2 = None if second is None else second[batch.start : batch.stop].to(context.compute.state_device)
        recorded: list[Tensor] = []
        counted = 0
        with autocast(context.compute):
            for state in sample_steps(context.model, sampler, x_t, images, context.seed, x_2):
                if state.k in steps:
                    recorded.append(record(x_t, state).cpu())
                x_t = state.x
                advance(len(x_t) * (state.evaluations - counted))
                counted = state.evaluations
        return torch.stack(recorded, dim=1)

    batches = split(range(len(x_T)), context.compute.batch_size)
    return torch.cat(map_shared(batches, record_batch, context.processes))


def sample_from(
    context: SamplingContext,
    sampler: SamplerSpec,
    x_T: Tensor,
    indices: Sequence[int],
    advance: Callable[[int], object],
) -> Tensor:
    """Return the samples that start from x_T, float32 (N, C, H, W) on the CPU, not rounded to pixels.

    Arguments are those of `record_steps`.
    """
    last = (len(context.tau(sampler)),)
    return record_steps(context, sampler, x_T, indices, last, lambda _, state: state.x, advance)[:, 0]


def evenly_spaced(count: int, steps: int) -> tuple[int, ...]:
    """Return `count` of the steps 1..steps at even distances, with the first and the last; all if there are fewer.

    Args:
        count: at least 2.
        steps: of the trajectory.
    """
    if count >= steps:
        return tuple(range(1, steps + 1))
    return tuple(1 + i * (steps - 1) // (count - 1) for i in range(count))
