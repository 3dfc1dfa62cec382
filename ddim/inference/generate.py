"""Generate exactly the images asked for, each a function of (weights, sampler, seed, index) alone, and of its label."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel, ModelSpec
from ddim.config import config_context
from ddim.data.images import to_uint8
from ddim.diffusion.analytic import AnalyticVariance
from ddim.diffusion.sampling import Model as Network
from ddim.diffusion.sampling import State
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.tau_search import exact_sampler
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.inference.batching import map_batches, map_shared, share, split
from ddim.inference.compute import ComputeSpec, autocast
from ddim.inference.conditioning import guided_states
from ddim.inference.diffusers_scheduler import check_scheduler, scheduler_tau, scheduler_trajectory

Numbers = Sequence[int] | Tensor  # of images
# Image numbers -> x_T, and the state after the first step where it is known, (B, C, H, W): see `encoded_files`.
Start = Callable[[Numbers], tuple[Tensor, Tensor | None]]


def check_sampler(model: LoadedModel, sampler: SamplerSpec) -> tuple[float, ...]:
    """Return the times tau of a sampler on this model's schedule; they can be fractions where a scheduler's are.

    Raises:
        UserError: the sampler does not fit the schedule, what the network predicts, or its weights.
    """
    with config_context("sampler"):
        if sampler.scheduler is not None and model.spec.categories is None:
            check_scheduler(sampler, model.spec.schedule, model.spec.prediction)
            return scheduler_tau(sampler, model.spec.schedule, model.spec.prediction)
        spec = model.spec
        sampler.check(spec.schedule, spec.prediction, spec.variance, spec.categories)
        if sampler.nfe and model.condition is not None and model.condition.guidance.most_evaluations > 1:
            raise UserError(
                f"sampler: nfe={sampler.nfe} counts one evaluation of the network where guidance makes two; give S "
                "in its place, and nfe=null."
            )
        rule = sampler.build_rule()
        if isinstance(rule, AnalyticVariance) and model.condition is not None and model.condition.label is not None:
            raise UserError(
                "sampler: the variances of sampler=analytic are estimated without labels; leave label out, or take "
                "sampler=ddpm."
            )
        if isinstance(rule, AnalyticVariance) and rule.weights_hash not in (None, model.weights_hash):
            raise UserError(
                f"sampler: the variances in {(sampler.kwargs or {})['file']} were estimated with the weights "
                f"{str(rule.weights_hash)[:8]}, not with {model.weights_hash[:8]} ({model.weights}); run "
                "scripts/estimate_variance.py for these."
            )
        return sampler.tau(model.spec.schedule.T)


def check_exact(model: LoadedModel, sampler: SamplerSpec) -> SamplerSpec:
    """Return the sampler whose trajectories of this model stand for the exact ones.

    Raises:
        UserError: it does not fit the model, as one whose ᾱ at T is 0.
    """
    spec, T = model.spec, model.spec.schedule.T
    if spec.schedule[T] == 0:
        raise UserError(
            "exact trajectories cannot start at alpha_bar=0 (zero terminal SNR), and this needs them; compare samples "
            "of such a checkpoint with scripts/evaluate.py."
        )
    exact = exact_sampler(sampler, T)
    with config_context("sampler"):  # in one step, of DDIM: what can fail, without the cost of T steps
        dataclasses.replace(exact, order=1, S=1).check(spec.schedule, spec.prediction, spec.variance)
    return exact


def check_numbers(model: LoadedModel) -> None:
    """Refuse a model of categories (multinomial diffusion) where pixels have to be numbers.

    Raises:
        UserError: it is one.
    """
    if (K := model.spec.categories) is not None:
        raise UserError(
            f"this needs pixels that are numbers, and those of the checkpoint are one of {K} categories, of which "
            "images can be sampled and evaluated; take a checkpoint that was trained without objective=multinomial."
        )


def network_evaluations(model: LoadedModel, sampler: SamplerSpec, skipped: int = 0) -> int:
    """Return how often a sample evaluates the network (NFE), with the second evaluation where there is guidance.

    The first `skipped` predictions are not made.
    """
    spec = model.spec
    if sampler.scheduler is not None:
        count = len(scheduler_tau(sampler, spec.schedule, spec.prediction))
    else:
        count = sampler.evaluations(spec.schedule)
    if model.condition is None:
        return count - skipped
    return model.condition.evaluations(lambda network, x: _steps(spec, sampler, network, x, [0], 0), count, skipped)


def generate(
    model: LoadedModel,
    sampler: SamplerSpec,
    indices: Numbers,
    seed: int,
    compute: ComputeSpec,
    title: str = "sampling",
    processes: Processes = SINGLE_PROCESS,
    start: Start | None = None,
) -> Tensor:
    """Return the images numbered `indices`, uint8 (len(indices), C, H, W) on the CPU; see `generate_batch`.

    A batch that does not fit into memory is halved. The progress bar, called `title`, shows on terminals only. Of
    several processes each computes its share of the batches, and all return all images.

    Raises:
        UserError: no images are asked for, the sampler does not fit the schedule, or the samples are not finite.
    """
    if len(indices) < 1:
        raise UserError(f"n={len(indices)} images were asked for; n must be at least 1.")
    if compute.batch_size < 1:
        raise UserError("batch_size=0 was not replaced by a number; see with_batch_size.")
    check_sampler(model, sampler)
    batches = split(range(len(indices)), compute.batch_size)  # of the list of indices, which need not be consecutive
    own = sum(map(len, share(batches, processes)))
    with progress(own * network_evaluations(model, sampler), title, processes) as bar:

        def generate_part(part: range) -> Tensor:
            return generate_batch(model, sampler, indices[part.start : part.stop], seed, compute, bar, start)

        return torch.cat(map_shared(batches, generate_part, processes))


def generate_batches(
    model: LoadedModel,
    sampler: SamplerSpec,
    batches: Sequence[range],
    seed: int,
    compute: ComputeSpec,
    bar: tqdm,
    start: Start | None = None,
) -> Iterator[tuple[range, Tensor]]:
    """Yield (batch, its images) for each batch of consecutive numbers, halved where it does not fit into memory.

    Arguments and errors are those of `generate_batch`.
    """
    return map_batches(batches, lambda batch: generate_batch(model, sampler, batch, seed, compute, bar, start))


def sample_batches(
    model: LoadedModel, sampler: SamplerSpec, batches: Sequence[range], seed: int, compute: ComputeSpec, bar: tqdm
) -> Iterator[tuple[range, Tensor]]:
    """Yield (batch, its samples x_0), see `generate_batches` and `sample_batch`."""
    return map_batches(batches, lambda batch: sample_batch(model, sampler, batch, seed, compute, bar))


def generate_batch(
    model: LoadedModel,
    sampler: SamplerSpec,
    indices: Numbers,
    seed: int,
    compute: ComputeSpec,
    bar: tqdm,
    start: Start | None = None,
) -> Tensor:
    """Return the images numbered `indices`, uint8 (len(indices), C, H, W) on the CPU, in one batch; see `sample_batch`.

    Raises:
        UserError: the samples are not finite.
    """
    return to_pixels(sample_batch(model, sampler, indices, seed, compute, bar, start))


@torch.inference_mode()
def sample_batch(
    model: LoadedModel,
    sampler: SamplerSpec,
    indices: Numbers,
    seed: int,
    compute: ComputeSpec,
    bar: tqdm,
    start: Start | None = None,
) -> Tensor:
    """Return the samples x_0 numbered `indices`, (len(indices), C, H, W) in about [-1, 1] on the device.

    Args:
        model: on its device (`prepare_model`).
        sampler: how to sample.
        indices: image numbers; image i is the same whatever else is asked for, up to the rounding of the network.
        seed: of x_T and of the noise of the steps.
        compute: device and precision.
        bar: counts network evaluations of single images.
        start: of the images, in place of noise.
    """
    if start is None:
        x_T, second = model.spec.x_T(indices, seed, compute.state_device), None
    else:
        x_T, second = start(indices)
        x_T, second = x_T.to(compute.state_device), None if second is None else second.to(compute.state_device)
    counted = 0
    with autocast(compute):
        for state in sample_steps(model, sampler, x_T, indices, seed, second):
            bar.update(len(state.x) * (state.evaluations - counted))
            counted = state.evaluations
    # Records state this number; it must be what was computed.
    assert counted == network_evaluations(model, sampler, skipped=second is not None), (counted, sampler)
    return state.x


def sample_steps(
    model: LoadedModel, sampler: SamplerSpec, x_T: Tensor, indices: Numbers, seed: int, second: Tensor | None = None
) -> Iterator[State]:
    """Yield the state after each step of the sampler from given x_T, (B, C, H, W) on the device of the model.

    The noise of the steps depends on `seed` and the image numbers `indices`, (B,). `second` is as in `trajectory`, of a
    rule of this package.
    """
    return guided_states(
        model, indices, x_T.device, lambda network: _steps(model.spec, sampler, network, x_T, indices, seed, second)
    )


def _steps(
    spec: ModelSpec,
    sampler: SamplerSpec,
    network: Network,
    x_T: Tensor,
    indices: Numbers,
    seed: int,
    second: Tensor | None = None,
) -> Iterator[State]:
    """Yield the states of a network that takes no labels; see `sample_steps`."""
    if sampler.scheduler is not None:
        return scheduler_trajectory(
            sampler, network, spec.schedule, x_T, prediction=spec.prediction, seed=seed, indices=indices
        )
    return sampler.trajectory(
        network, spec.schedule, x_T, prediction=spec.prediction, seed=seed, indices=indices, second=second
    )


def progress(evaluations: int, title: str, processes: Processes = SINGLE_PROCESS) -> tqdm:
    """Return a bar that counts network evaluations of single images, with the time left.

    It shows on terminals only, and of several processes, whose shares are alike, for the first.
    """
    hidden = None if processes.is_main else True  # None: unless it is a terminal
    return tqdm(total=evaluations, desc=title, unit=" evaluations", unit_scale=True, disable=hidden)


def to_pixels(x: Tensor) -> Tensor:
    """Return samples in [-1, 1] as uint8 of the same shape, on the CPU.

    Raises:
        UserError: a value is infinite or not a number.
    """
    if not bool(torch.isfinite(x).all()):
        raise UserError(
            "the samples are not finite numbers; sample with compute.bf16=false, and if that does not help, the "
            "checkpoint is of a training that diverged."
        )
    return to_uint8(x).cpu()
