"""95 % intervals of metrics, and of differences between two evaluations that start from the same x_T.

A number over n images is an average over the images, to first order: each image moves it by its *influence* (Hampel,
1974), and its variance over sets of n images is that of the influences, over n. This is the variance of the bootstrap
without its resampling (the infinitesimal jackknife of Efron, 1982). The interval is about the number at this n: what
other sets of n images give on average. A Fréchet distance of n images is above that of infinitely many, by about c / n;
a bootstrap adds this bias a second time, since its sets repeat images, and its percentiles lie beside the number.

It is first order: where a distance is hardly more than its bias, between sets that are nearly alike or of not many more
images than features, the interval is too wide, in trials by up to
two thirds; the bootstrap's would be wider still.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddim.io import atomic_write, explain_read_errors
from ddim.results.records import Record
from ddim.results.schema import IMAGES

INFLUENCE = "influence"  # in a folder of results: KEY.npz with the influences of each image
QUANTILE = 1.959964  # of the normal distribution: 95 % lie within ± as many standard deviations
Interval = tuple[float, float]


def interval(value: float, influence: np.ndarray) -> Interval:
    """Return the 95 % interval of a number.

    Args:
        value: the number.
        influence: (n,), of each image.
    """
    half_width = QUANTILE * math.sqrt(_variance(influence))
    return value - half_width, value + half_width


def mean_interval(value: float, intervals: Sequence[Interval]) -> Interval:
    """Return the interval of the mean `value` of numbers with these intervals, over sets of images without overlap."""
    half_width = math.sqrt(sum(((high - low) / 2) ** 2 for low, high in intervals)) / len(intervals)
    return value - half_width, value + half_width


def paired_difference(
    ours: Sequence[Record], others: Sequence[Record], metric: str, folder: Path
) -> tuple[float, Interval] | None:
    """Return the mean difference of a metric, ours minus the others', with its interval.

    Both are from the same x_T, image by image, so that what the images have in common does not widen the interval.

    Args:
        ours, others: records of one table.
        metric: its name.
        folder: of the records; the influences are in it.

    Returns:
        None where they are not of the same images, by seeds and numbers, or a record has no influences.
    """
    starts = [[(record.get("seed"), record.get("first")) for record in records] for records in (ours, others)]
    if starts[0] != starts[1] or any(record.get("kind") == IMAGES for record in ours):
        return None
    differences, variances = [], []
    for a, b in zip(ours, others, strict=True):
        influences = [load_influence(folder, record["key"], metric) for record in (a, b)]
        if influences[0] is None or influences[1] is None:
            return None
        differences.append(a["metrics"][metric] - b["metrics"][metric])
        variances.append(_variance(influences[0] - influences[1]))
    difference = sum(differences) / len(differences)
    half_width = QUANTILE * math.sqrt(sum(variances)) / len(variances)
    return difference, (difference - half_width, difference + half_width)


def save_influences(folder: Path, key: str, influences: Mapping[str, np.ndarray]) -> None:
    """Keep the influences of each image on each metric, (n,), for the record `key` in `folder`."""
    with atomic_write(_path(folder, key)) as partial, partial.open("wb") as file:
        arrays: dict[str, Any] = {name: values.astype(np.float32) for name, values in influences.items()}
        np.savez(file, **arrays)


def load_influence(folder: Path, key: str, metric: str) -> np.ndarray | None:
    """Return the influences of each image on a metric, float64 (n,), None if they were not kept.

    Raises:
        UserError: the file is damaged.
    """
    path = _path(folder, key)
    if not path.is_file():
        return None
    with explain_read_errors(path), np.load(path, allow_pickle=False) as arrays:
        return arrays[metric].astype(np.float64) if metric in arrays else None


def _path(folder: Path, key: str) -> Path:
    return folder / INFLUENCE / f"{key}.npz"


def _variance(influence: np.ndarray) -> float:
    """Return the variance of the mean of influences (n,)."""
    return float(influence.var()) / max(1, len(influence) - 1)
