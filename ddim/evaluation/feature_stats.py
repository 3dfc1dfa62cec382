"""Statistics of features: mean and covariance, from which distances between sets of images are computed."""

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.io import atomic_write

Features = dict[str, Tensor]  # layer name -> (N, D) float32 on the CPU, rows in the order of the images


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A set of images, as the metrics see it.

    Attributes:
        count: number of images; None for published statistics, which do not state it.
        mean: float64 (D,), of the features that distances are computed from.
        covariance: float64 (D, D), unbiased.
        features: of every layer; {} where the metrics need none, or only moments are known.
    """

    count: int | None
    mean: Tensor
    covariance: Tensor
    features: Features = field(default_factory=dict)


def feature_set(features: Features, layer: str) -> FeatureSet:
    """Return the set of these features; mean and covariance are those of `layer`."""
    count, mean, covariance = moments([features[layer]])
    return FeatureSet(count, mean, covariance, features)


def moments(
    features: Iterable[Tensor], device: torch.device | str | None = None, processes: Processes = SINGLE_PROCESS
) -> tuple[int, Tensor, Tensor]:
    """Return number, mean (D,) and unbiased covariance (D, D), float64 on the CPU, of features in batches.

    Args:
        features: (n, D) each, at least one.
        device: where to multiply.
        processes: each with batches of its own; all return the moments of all.
    """
    with processes.barrier():
        count, mean, scatter = _scatter(features, device)
    size = max(processes.gather(len(mean)))
    if not count:  # more processes than batches
        mean, scatter = mean.new_zeros(size), scatter.new_zeros(size, size)
    total = int(processes.sum(torch.tensor(count)))
    centre = processes.sum(count * mean) / total
    mean = mean.cpu() - centre
    return total, centre, processes.sum(scatter.cpu() + count * torch.outer(mean, mean)) / max(1, total - 1)


def _scatter(features: Iterable[Tensor], device: torch.device | str | None) -> tuple[int, Tensor, Tensor]:
    """Return number, mean m and sum of (x - m)(x - m)ᵀ, float64; merged batch by batch (Chan, Golub, LeVeque, 1979)."""
    count, mean, scatter = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
    for batch in features:
        x = batch.to(device, torch.float64)
        m = x.mean(0)
        if not count:
            mean, scatter = torch.zeros_like(m), x.new_zeros(len(m), len(m))
        total, delta = count + len(x), m - mean
        scatter.addmm_((x - m).T, x - m).addr_(delta, delta, alpha=count * len(x) / total)
        mean += delta * (len(x) / total)
        count = total
    return count, mean, scatter


def save_moments(images: FeatureSet, path: Path) -> None:
    """Write the usual .npz with `mu` and `sigma`, float64, and the number of images."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, mu=images.mean.numpy(), sigma=images.covariance.numpy(), images=np.array(images.count))


def load_moments(path: Path) -> FeatureSet:
    """Read an .npz with `mu` (D,) and `sigma` (D, D), of this code base or another.

    Raises:
        UserError: there is no such file, or it has other content.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
            count = int(arrays["images"]) if "images" in arrays else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the statistics {path} cannot be read ({' '.join(str(error).split())[:100]}); give an .npz file with the "
            "arrays mu and sigma."
        ) from error
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"the statistics {path} have mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}; they must be "
            "(D,) and (D, D)."
        )
    return FeatureSet(count, mean, covariance)
