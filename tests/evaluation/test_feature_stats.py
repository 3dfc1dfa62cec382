"""Moments of features, and the file they are kept in."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ddim.errors import UserError
from ddim.evaluation.feature_stats import FeatureSet, feature_set, load_moments, moments, save_moments


def features(n: int, dimension: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dimension, generator=generator) @ torch.randn(dimension, dimension, generator=generator) + 3


@pytest.mark.parametrize("cuts", [[], [1], [7, 8, 300], [499]])
def test_moments_do_not_depend_on_the_batches(cuts: list[int]) -> None:
    x = features(500, 12)
    count, mean, covariance = moments(torch.tensor_split(x, cuts))
    assert count == 500
    assert mean.numpy() == pytest.approx(x.double().numpy().mean(0), rel=1e-13)
    assert covariance.numpy() == pytest.approx(np.cov(x.double().numpy(), rowvar=False), rel=1e-10)


def test_moments_are_float64_although_features_are_float32() -> None:
    """A spread of 1e-4 about 1,000: sums in float32 would lose it, and so would online sums of squares in float64."""
    x = 1000 + 1e-4 * features(4000, 1).double()
    _, _, covariance = moments(x.split(300))
    assert float(covariance) == pytest.approx(float(x.var()), rel=1e-9)


def test_moments_survive_the_file_bitwise(tmp_path: Path) -> None:
    measured = feature_set({"a": features(50, 4)}, "a")
    save_moments(measured, tmp_path / "reference.npz")
    again = load_moments(tmp_path / "reference.npz")
    assert again.count == measured.count == 50
    assert torch.equal(again.mean, measured.mean)
    assert torch.equal(again.covariance, measured.covariance)
    with np.load(tmp_path / "reference.npz") as arrays:  # as pytorch-fid does
        mu, sigma = arrays["mu"][:], arrays["sigma"][:]
    assert (mu.dtype, mu.shape, sigma.shape) == (np.float64, (4,), (4, 4))


def test_statistics_of_other_code_bases_are_read(tmp_path: Path) -> None:
    mu, sigma = np.arange(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    loaded = load_moments(tmp_path / "theirs.npz")
    assert loaded.count is None
    assert torch.equal(loaded.mean, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    assert torch.equal(loaded.covariance, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"nonsense", "cannot be read"),
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"must be \(D,\) and \(D, D\)"),
        ({"mu": np.zeros((3, 1)), "sigma": np.zeros((3, 3))}, r"must be \(D,\)"),
        ({"mu": np.array(["x"]), "sigma": np.zeros((1, 1))}, "cannot be read"),
        ({"mu": np.array([None]), "sigma": np.zeros((1, 1))}, "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "reference.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        load_moments(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_moments(tmp_path / "nowhere.npz")


def test_an_interrupted_save_leaves_no_file(tmp_path: Path) -> None:
    broken = FeatureSet(3, torch.zeros(2), "no tensor")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        save_moments(broken, tmp_path / "reference.npz")
    assert [*tmp_path.iterdir()] == []
