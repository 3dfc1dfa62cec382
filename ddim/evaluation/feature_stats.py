"""Statistics of features: mean and covariance, from which distances between sets of images are computed."""

import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.io import atomic_write, check_regular_file

# Of the largest entry or eigenvalue of a covariance: what rounding may make asymmetric or negative, also in float32.
TOLERANCE = 1e-4
Features = dict[str, Tensor]  # layer name -> (N, D) float32 on the CPU, rows in the order of the images


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A set of images, as the metrics see it.

    Attributes:
        count: number of images; None for published statistics, which do not state it.
        mean: float64 (D,), of the features that distances are computed from.
        covariance: float64 (D, D), unbiased.
        features: of every layer; {} where the metrics need none, or only moments are known.
        labels: of the images, int64 (N,); None where they have none, or no metric needs them.
        neighbours: layer name -> distance of each image to its k-th nearest other, float64 (N,), once it was asked for
            (`metrics.neighbour_distances`); shared with copies by `replace`, which must not change the features.
    """

    count: int | None
    mean: Tensor
    covariance: Tensor
    features: Features = field(default_factory=dict)
    labels: Tensor | None = None
    neighbours: dict[str, Tensor] = field(default_factory=dict)

    def of_class(self, label: int, layer: str) -> "FeatureSet":
        """Return the images of a class, in a set that has labels; mean and covariance are those of `layer`."""
        assert self.labels is not None
        chosen = self.labels == label
        return feature_set({name: values[chosen] for name, values in self.features.items()}, layer)

    def has_moments_of(self, other: "FeatureSet") -> bool:
        """Whether mean and covariance are those of another set, to the last bit."""
        return torch.equal(self.mean, other.mean) and torch.equal(self.covariance, other.covariance)


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


def load_moments(path: Path, dimension: int) -> FeatureSet:
    """Read an .npz with `mu` (D,) and `sigma` (D, D), of this code base or another.

    Args:
        path: of the file; nothing in it is believed.
        dimension: D, the number of features that they must be of.

    Raises:
        UserError: there is no such file, or it does not hold the mean and the covariance of D features.
    """
    check_regular_file(path, "file of statistics")
    try:
        with zipfile.ZipFile(path) as archive:
            mean = _read_array(archive, "mu", (dimension,), "f")
            covariance = _read_array(archive, "sigma", (dimension, dimension), "f")
            count = int(_read_array(archive, "images", (), "iu")) if "images.npy" in archive.namelist() else None
        _check_moments(count, mean, covariance)
    except Exception as error:  # a damaged or unknown file can make the readers raise anything
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(
            f"the statistics {path} cannot be used ({reason}); give an .npz file with the arrays mu and sigma, "
            f"the mean and covariance of {dimension} features of the same extractor."
        ) from error
    return FeatureSet(count, mean, covariance)


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], kinds: str) -> Tensor:
    """Return an array of an .npz as float64; another shape or kind is refused by the header, before memory is taken."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unfold more than is asked for
        raise ValueError(f"{name} is compressed by another method than numpy's")
    with archive.open(entry) as file:
        if (version := np.lib.format.read_magic(file)) != (1, 0):  # later ones are for headers of more than 64 KiB
            raise ValueError(f"{name} has the header version {version}, not (1, 0)")
        found, _, dtype = np.lib.format.read_array_header_1_0(file)
        if found != shape or dtype.kind not in kinds or dtype.itemsize > 8:
            needed = f"{'float' if kinds == 'f' else 'integer'} {shape}"
            raise ValueError(f"{name} is {dtype} of shape {found} where {needed} is needed")
        file.seek(0)
        return torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False).astype(np.float64))


def _check_moments(count: int | None, mean: Tensor, covariance: Tensor) -> None:
    if count is not None and count < 1:
        raise ValueError(f"images={count} is no number of images")
    if not math.isfinite(mean.square().sum() + covariance.square().sum()):
        raise ValueError("mu or sigma holds a value that is not finite, or too large to be squared")
    if (covariance - covariance.T).abs().max() > TOLERANCE * covariance.abs().max():
        raise ValueError("sigma is not symmetric, so it is no covariance")
    eigenvalues = torch.linalg.eigvalsh(covariance)  # in rising order
    if eigenvalues[0] < -TOLERANCE * eigenvalues[-1]:
        raise ValueError(f"sigma has the negative eigenvalue {float(eigenvalues[0]):.3g}, so it is no covariance")
