"""The loss of images that are not trained on, at fixed times and noise."""

import dataclasses
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ddim.checkpoints import LoadedModel
from ddim.data.datasets import DataSpec, load_images
from ddim.data.images import Images, normalize
from ddim.diffusion import multinomial
from ddim.diffusion.objective import per_sample_loss
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.inference.batching import map_batches, split
from ddim.inference.compute import ComputeSpec
from ddim.random import gaussian, random_words

VALIDATION = 8  # a stream of random numbers, beside those in ddim/random.py


class HeldoutBatch(NamedTuple):
    """Images of a batch: their numbers, pixels, uint8 (b, C, H, W), and labels, int64 (b,), where there are any."""

    numbers: range
    pixels: Tensor
    labels: Tensor | None


Batches = list[HeldoutBatch]


def heldout_images(images: Images, n: int) -> Tensor:
    """Return which images are held out, int64 (n,): the first ones, or with labels the first of each class in turn.

    If there are fewer than n images, all of them.
    """
    if images.labels is None:
        return torch.arange(min(n, len(images)))
    turn = torch.empty_like(images.labels)  # of each image within its class
    for y in images.labels.unique():
        turn[images.labels == y] = torch.arange(int((images.labels == y).sum()))
    return turn.argsort(stable=True)[:n]


def load_heldout(data: DataSpec, n: int, batch_size: int, processes: Processes) -> Batches:
    """Return this process's share of n images of the test split (`heldout_images`), in batches.

    Raises:
        UserError: there is no test split, or it cannot be read.
    """
    if not n:
        return []
    if data.name in ("celeba", "folder"):  # of which few are needed
        data = dataclasses.replace(data, in_memory=False)
    try:
        images = load_images(data, "test")
    except UserError as error:
        raise UserError(f"eval.heldout={n} takes images of the test split, and eval.heldout=0 none: {error}") from error
    chosen = heldout_images(images, n)
    batches = split(range(len(chosen)), batch_size)[processes.rank :: processes.world_size]
    return [
        HeldoutBatch(
            batch,
            images.batch(chosen[batch.start : batch.stop]),
            None if images.labels is None else images.labels[chosen[batch.start : batch.stop]],
        )
        for batch in batches
    ]


def heldout_loss(
    model: LoadedModel, share: Batches, reduction: str, seed: int, compute: ComputeSpec, processes: Processes
) -> dict[str, float]:
    """Return the mean loss at fixed times and noise, and that of each quarter of the times 1..T that has images.

    The time and the noise of image i are functions of (seed, i): the number depends on neither the step, nor the
    number of processes, nor the batch size, up to the rounding of the network. A conditional network is given the
    labels.

    Args:
        model: on the device of `compute`, in eval mode.
        share: of this process.
        reduction: over an image, a key of REDUCTIONS.
        seed: of times and noise.
        compute: the device.
        processes: each with a share of its own; all return the loss of all.
    """
    spec, T = model.spec, model.spec.schedule.T
    alpha_bar = spec.schedule.alpha_bar.to(compute.device)

    @torch.inference_mode()
    def rows(held: HeldoutBatch, numbers: range) -> Tensor:
        here = slice(numbers.start - held.numbers.start, numbers.stop - held.numbers.start)
        pixels = held.pixels[here]
        labelled = model if held.labels is None else partial(model, y=held.labels[here].to(compute.device))
        indices = torch.arange(numbers.start, numbers.stop, device=compute.device)
        t = 1 + (random_words(seed, VALIDATION, 0, indices)[:, 0] * T >> 32)
        x0 = normalize(pixels.to(compute.device))
        if spec.categories is not None:  # the cross-entropy, whatever is trained on
            words = multinomial.words_of(seed, VALIDATION, 1, indices, spec.image_shape)
            losses = multinomial.per_sample_loss(labelled, alpha_bar, x0, t, words, spec.categories)
        else:
            eps = gaussian(seed, VALIDATION, 1, indices, spec.image_shape)
            losses = per_sample_loss(labelled, alpha_bar, x0, t, eps, prediction=spec.prediction, reduction=reduction)
        return torch.stack([indices, t, losses], dim=1).double().cpu()

    parts = [torch.empty(0, 3, dtype=torch.float64)]
    with processes.barrier():
        for held in share:
            parts += [part for _, part in map_batches([held.numbers], partial(rows, held))]
    table = torch.cat(processes.gather(torch.cat(parts)))
    _, t, losses = table[table[:, 0].argsort()].T
    quarters = ((t - 1) * 4 // T).long()
    means = {f"loss_quarter_{k + 1}": losses[quarters == k].mean() for k in range(4) if (quarters == k).any()}
    return {"loss": float(losses.mean())} | {name: float(mean) for name, mean in means.items()}
