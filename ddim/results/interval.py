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


def mean_interval(value: float, records: Sequence[Record], metric: str) -> Interval | None:
    """Return the interval of the mean `value` of a metric over the records of an entry; None where one has none."""
    intervals = [record.get("intervals", {}).get(metric) for record in records]
    if None in intervals:
        return None
    sums = [sum((intervals[i][1] - intervals[i][0]) / 2 for i in same) for same in _of_the_same_images(records)]
    half_width = math.hypot(*sums) / len(records)
    return value - half_width, value + half_width


def _of_the_same_images(records: Sequence[Record]) -> list[list[int]]:
    """Return the positions of the records of each set of images; sets do not overlap, and vary on their own.

    Two seeds give two sets of samples. A likelihood is of images of the data set, the same for all seeds.
    """
    sets: dict[tuple[Any, Any], list[int]] = {}
    for i, record in enumerate(records):
        seed = None if record.get("kind") == "likelihood" else record.get("seed")
        sets.setdefault((seed, record.get("first")), []).append(i)
    return [*sets.values()]


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
    values, influences = [], []
    for a, b in zip(ours, others, strict=True):
        of_a, of_b = (load_influence(folder, record["key"], metric) for record in (a, b))
        if of_a is None or of_b is None:
            return None
        values.append(a["metrics"][metric] - b["metrics"][metric])
        influences.append(of_a - of_b)
    difference = sum(values) / len(values)
    variances = [_variance(np.sum([influences[i] for i in same], axis=0)) for same in _of_the_same_images(ours)]
    half_width = QUANTILE * math.sqrt(sum(variances)) / len(values)
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
