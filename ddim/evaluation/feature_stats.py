"""What distances between sets of images are computed from: moments of features, and the features where needed."""

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
        count: number of images; None for published statistics, which do not say.
        mean: float64 (D,), of the features that distances are taken in.
        covariance: float64 (D, D), unbiased.
        features: of every layer; {} where the metrics need none, or only moments are known.
    """

    count: int | None
    mean: Tensor
    covariance: Tensor
    features: Features = field(default_factory=dict)


def feature_set(features: Features, layer: str) -> FeatureSet:
    """Return the set whose features are all at hand; moments are of `layer`."""
    count, mean, covariance = moments([features[layer]])
    return FeatureSet(count, mean, covariance, features)


def moments(
    features: Iterable[Tensor], device: torch.device | str | None = None, processes: Processes = SINGLE_PROCESS
) -> tuple[int, Tensor, Tensor]:
    """Return number, mean (D,) and unbiased covariance (D, D), float64 on the CPU, of features that come in parts.

    Args:
        features: (n, D) each, at least one.
        device: where to multiply.
        processes: each with parts of its own, which are summed over them; all return the same.
    """
    with processes.barrier():
        count, mean, scatter = _scatter(features, device)
    size = max(processes.gather(len(mean)))
    if not count:  # more processes than parts
        mean, scatter = mean.new_zeros(size), scatter.new_zeros(size, size)
    total = int(processes.sum(torch.tensor(count)))
    centre = processes.sum(count * mean) / total
    mean = mean.cpu() - centre
    return total, centre, processes.sum(scatter.cpu() + count * torch.outer(mean, mean)) / max(1, total - 1)


def _scatter(features: Iterable[Tensor], device: torch.device | str | None) -> tuple[int, Tensor, Tensor]:
    """Return number, mean m and sum of (x - m)(x - m)ᵀ, float64; merged part by part (Chan, Golub, LeVeque, 1979)."""
    count, mean, scatter = 0, torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
    for part in features:
        x = part.to(device, torch.float64)
        m = x.mean(0)
        if not count:
            mean, scatter = torch.zeros_like(m), x.new_zeros(len(m), len(m))
        together, apart = count + len(x), m - mean
        scatter.addmm_((x - m).T, x - m).addr_(apart, apart, alpha=count * len(x) / together)
        mean += apart * (len(x) / together)
        count = together
    return count, mean, scatter


def save_moments(images: FeatureSet, path: Path) -> None:
    """Write the usual .npz with `mu` and `sigma`, float64, and the number of images beside them."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez(file, mu=images.mean.numpy(), sigma=images.covariance.numpy(), images=np.array(images.count))


def load_moments(path: Path) -> FeatureSet:
    """Read an .npz with `mu` (D,) and `sigma` (D, D), from here or of another code base.

    Raises:
        UserError: no such file, or one of another content.
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
