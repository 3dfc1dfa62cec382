"""The nearest training images of samples, in pixels and in features, to see whether a model copies.

Ho et al. (2020) show such images in their appendix. A distance alone says little: it is compared with the distances of
images that were not made from the training images, those of the test set, or where there is none, of training images
to the others. And a blurred or empty image is near to many images. A copy is much nearer to one of them than to the
others, which the relative distance shows: that to the nearest, divided by the mean to the 50 nearest (Carlini et al.,
2023, without their factor).
"""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.checkpoints import LoadedModel
from ddim.data.datasets import DataSpec, load_images
from ddim.errors import UserError
from ddim.evaluation.job import check_data
from ddim.evaluation.metrics import MetricSpec
from ddim.evaluation.session import Session

log = logging.getLogger(__name__)
PIXELS = "pixels"
HELD_OUT = 1000  # images at most whose distances are compared with those of samples
NEAREST = 50  # training images that the relative distance is of, or all others
TINY = 1e-12  # for images that are all alike
MOST_ROWS, MOST_VALUES = 1000, 2**22  # of a block of images: 33 MB in float64, and 8 MB of distances to another one


class Neighbours(NamedTuple):
    """The k nearest training images of Q images, the nearest first.

    Attributes:
        distances: Euclidean, float64 (Q, k).
        numbers: of the training images, int64 (Q, k).
        mirrored: bool (Q, k), whether the training image is nearer when it is mirrored left to right.
    """

    distances: Tensor
    numbers: Tensor
    mirrored: Tensor


class Comparison(NamedTuple):
    """The nearest training images of samples in one space.

    Attributes:
        samples: their neighbours.
        relative: distance to the nearest, divided by the mean to the NEAREST, float64 (Q,); 0 of a copy, 1 at most.
        held_out: distances of held-out images to their nearest training image, float64 (H,).
        held_out_relative: as `relative`, of the held-out images.
    """

    samples: Neighbours
    relative: Tensor
    held_out: Tensor
    held_out_relative: Tensor


class NearestSearch:
    """What samples of a model are compared with. Features of the training images are extracted when they are needed.

    Args:
        data: the data set. Where it is mirrored in training, the nearer of an image and its mirror image counts.
        metric: its extractor gives the features; None for pixels alone.
        k: number of nearest images.
        model: that makes the samples.
        session: loads the images and the extractor; its processes compute together.
        device: where features and distances are computed.
        reference_dir: where the features of the training images are kept.

    Attributes:
        train: the training images.
        among: how many of the nearest the relative distance is of.
        spaces: the names of the spaces: pixels, and the extractor.
        held_out: uint8 (H, C, H', W').
        held_out_split: train where the data set has no test split of its own.

    Raises:
        UserError: the data set or the extractor cannot be used, has images of another shape, or not more than k.
    """

    def __init__(
        self,
        data: DataSpec,
        metric: MetricSpec | None,
        k: int,
        model: LoadedModel,
        session: Session,
        device: str,
        reference_dir: str,
    ) -> None:
        if metric is not None and (metric.reference_npz is not None or metric.reference_split != "train"):
            raise UserError(
                "samples are compared with training images here; leave metric.reference_npz=null and "
                "metric.reference_split=train."
            )
        self.data, self.k, self.session, self.device, self.reference_dir = data, k, session, device, reference_dir
        self.train = session.images(data, "train")
        check_data(session, model, data, self.train)
        if k >= len(self.train):
            raise UserError(f"k={k} must be less than the number of training images, {len(self.train)}.")
        self.among = min(NEAREST, len(self.train) - 1)
        self.metric = None
        if metric is not None and metric.extractor != PIXELS:
            self.metric = dataclasses.replace(metric, metrics=("prc",))  # which needs features, so that they are kept
            self.extractor = session.extractor(self.metric, device)
            self.extractor.extract(torch.zeros(1, *self.train.shape, dtype=torch.uint8))  # it may refuse the shape
        self.spaces = [PIXELS] if self.metric is None else [PIXELS, self.metric.extractor]
        self._take_held_out()

    def _take_held_out(self) -> None:
        """Choose held-out images, evenly spaced: of the test set, or of the training set if that is the same."""
        numbers = evenly_spaced_numbers(len(self.train))
        self.held_out = self.train.batch(numbers)
        self.own: Tensor | None = numbers  # of the held-out images among the training images
        self.held_out_split = "train"
        try:
            test = load_images(self.data, "test")  # not through the session, which keeps one data set
        except UserError as error:
            log.warning("%s Distances are compared with those of training images to the others.", error)
            return
        chosen = test.batch(evenly_spaced_numbers(len(test)))
        if not torch.equal(chosen, self.held_out):
            self.held_out, self.own, self.held_out_split = chosen, None, "test"

    def find(self, samples: Tensor) -> dict[str, Comparison]:
        """Return the nearest training images of samples, uint8 (Q, C, H, W), in each space.

        Distances in pixels are those of values in [0, 1]. All processes must call this together.
        """
        images = torch.cat([samples, self.held_out])
        views = [images, images.flip(-1)] if self.data.flip else [images]
        blocks = torch.arange(len(self.train)).split(block_rows(images[0].numel()))
        pixels = (self.train.batch(block).flatten(1) for block in blocks)
        bar = tqdm(pixels, total=len(blocks), desc="nearest in pixels", unit=" blocks", disable=None)
        count = max(self.among + 1, self.k)  # 1 more, since a held-out image may be one of them
        found = [nearest([view.flatten(1) for view in views], bar, count, self.device)]
        found[0].distances.div_(255)
        if self.metric is not None:
            layer, shape = self.extractor.layers[0], self.train.shape
            stats = self.session.reference_stats(self.data, self.metric, self.device, self.reference_dir, shape)
            features = stats.features[layer].split(block_rows(stats.features[layer].shape[1]))
            rows = [self.extractor.extract(view)[layer] for view in views]
            found.append(nearest(rows, features, count, self.device))
        return {name: self._compare(one, len(samples)) for name, one in zip(self.spaces, found, strict=True)}

    def shown(self, neighbours: Neighbours) -> Tensor:
        """Return the training images, mirrored where that is nearer, uint8 (Q, k, C, H, W)."""
        images = self.train.batch(neighbours.numbers.flatten()).unflatten(0, neighbours.numbers.shape)
        return torch.where(neighbours.mirrored[..., None, None, None], images.flip(-1), images)

    def _compare(self, found: Neighbours, count: int) -> Comparison:
        """Split what was found into `count` samples and the held-out images, which are not their own neighbours."""
        samples, held_out = found.distances[:count], found.distances[count:]
        if self.own is not None:
            itself = found.numbers[count:] == self.own[:, None]
            held_out = held_out.masked_fill(itself, torch.inf).sort(dim=1).values
        neighbours = Neighbours(*(values[:count, : self.k] for values in found))
        relative = [d[:, 0] / d[:, : self.among].mean(1).clamp_min(TINY) for d in (samples, held_out)]
        return Comparison(neighbours, relative[0], held_out[:, 0], relative[1])


def evenly_spaced_numbers(count: int) -> Tensor:
    """Return the numbers of HELD_OUT of `count` images, or of all: a folder is sorted by its names."""
    chosen = min(count, HELD_OUT)
    return torch.arange(chosen) * count // chosen


def block_rows(values: int) -> int:
    """Return how many images of so many values make a block."""
    return max(1, min(MOST_ROWS, MOST_VALUES // values))


def nearest(views: Sequence[Tensor], blocks: Iterable[Tensor], k: int, device: str | torch.device) -> Neighbours:
    """Return the k nearest rows y of each x by Euclidean distance, in float64; of equal distances the first.

    Args:
        views: x (Q, D), and the same images mirrored if the nearer of the two counts.
        blocks: y (B, D), any number of rows in each; k at least in all.
        k: how many.
        device: where to compute; distances of one block of each are in memory at once.
    """
    count, width = views[0].shape
    best = torch.full((count, k), torch.inf, dtype=torch.float64, device=device)
    codes = torch.zeros(count, k, dtype=torch.int64, device=device)  # number of y * number of views + view
    seen = 0
    for block in blocks:
        y = block.to(device, torch.float64)
        for part in torch.arange(count).split(block_rows(width)):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            to_views = torch.stack([torch.cdist(x[rows].to(device, torch.float64), y) for x in views])
            distances, view = to_views.min(0)
            numbers = torch.arange(seen, seen + len(y), device=device)
            distances, order = torch.cat([best[rows], distances], 1).sort(dim=1, stable=True)
            best[rows] = distances[:, :k]
            codes[rows] = torch.cat([codes[rows], numbers * len(views) + view], 1).gather(1, order[:, :k])
        seen += len(y)
    codes = codes.cpu()
    return Neighbours(best.cpu(), codes // len(views), codes % len(views) == 1)
