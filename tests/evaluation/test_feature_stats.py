"""Moments of features, and the file they are kept in."""

import io
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

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
    again = load_moments(tmp_path / "reference.npz", 4)
    assert again.count == measured.count == 50
    assert torch.equal(again.mean, measured.mean)
    assert torch.equal(again.covariance, measured.covariance)
    with np.load(tmp_path / "reference.npz") as arrays:  # as pytorch-fid does
        mu, sigma = arrays["mu"][:], arrays["sigma"][:]
    assert (mu.dtype, mu.shape, sigma.shape) == (np.float64, (4,), (4, 4))


def test_statistics_of_other_code_bases_are_read(tmp_path: Path) -> None:
    mu, sigma = np.arange(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "theirs.npz", mu=mu, sigma=sigma, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
        loaded = load_moments(tmp_path / "theirs.npz", 3)
        assert loaded.count is None
        assert torch.equal(loaded.mean, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
        assert torch.equal(loaded.covariance, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 2000])
def test_covariances_summed_in_float32_are_accepted(tmp_path: Path, n: int) -> None:
    """Rounding leaves them with a smallest eigenvalue below 0: of order D, or with fewer images than dimensions."""
    x = features(n, 64)
    mean = x.mean(0)
    covariance = (x.T @ x - n * torch.outer(mean, mean)) / (n - 1)
    assert n > 2 or torch.linalg.eigvalsh(covariance)[0] < 0
    np.savez(tmp_path / "theirs.npz", mu=mean.numpy(), sigma=covariance.numpy())
    assert torch.equal(load_moments(tmp_path / "theirs.npz", 64).covariance, covariance.double())


def changed(array: np.ndarray, index: Any, value: float) -> np.ndarray:
    array[index] = value
    return array


def header(shape: tuple[int, ...], dtype: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


GOOD = {"mu": np.zeros(3), "sigma": np.eye(3)}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "lacks sigma": ({"sigma": None}, "sigma"),
    "nan": ({"mu": changed(np.zeros(3), 1, np.nan)}, "not finite"),
    "infinite": ({"sigma": changed(np.eye(3), (1, 1), np.inf)}, "not finite"),
    "overflowing": ({"mu": np.full(3, 1e200)}, "too large"),
    "asymmetric": ({"sigma": changed(np.eye(3), (0, 1), 0.01)}, "not symmetric"),
    "negative": ({"sigma": changed(np.eye(3), (2, 2), -0.01)}, "negative eigenvalue -0.01"),
    "indefinite": ({"sigma": np.eye(3) * 3 - 2}, "negative eigenvalue -3"),
    "all negative": ({"sigma": -np.eye(3)}, "negative eigenvalue"),
    "complex": ({"sigma": np.eye(3) + 0j}, "sigma is complex128"),
    "integers": ({"mu": np.zeros(3, np.int64)}, "mu is int64"),
    "text": ({"mu": np.array(["x"] * 3)}, "mu is <U1"),
    "objects": ({"mu": np.array([None] * 3)}, "mu is object"),
    "other size": (
        {"mu": np.zeros(5), "sigma": np.eye(5)},
        r"mu is float64 of shape \(5,\) where float \(3,\) is needed",
    ),
    "flat": ({"sigma": np.zeros(9)}, r"sigma is float64 of shape \(9,\) where float \(3, 3\)"),
    "column": ({"mu": np.zeros((3, 1))}, "mu is float64"),
    "8 TB": ({"mu": header((1 << 40,))}, "mu is float64"),
    "short": ({"sigma": header((3, 3))}, "EOF"),
    "subarrays": ({"mu": header((3,), "(3,)<f8")}, "mu is"),
    "later header": ({"mu": b"\x93NUMPY\x02\x00" + b"\xff" * 4}, "header version"),
    "no array": ({"mu": b"nonsense"}, "magic"),
    "deep header": ({"mu": header((3,)).replace(b"(3,)", b"(" * 60)}, "cannot be used"),
    "images": ({"images": np.zeros((4, 2, 2, 3), np.uint8)}, r"images is uint8 of shape \(4, 2, 2, 3\)"),
    "no images": ({"images": np.array(0)}, "images=0"),
    "half an image": ({"images": np.array(1.5)}, "images is float64"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_arrays_are_refused_in_one_sentence(tmp_path: Path, fault: str) -> None:
    changes, message = FAULTS[fault]
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        for name, value in {**GOOD, **changes}.items():
            if value is not None:
                archive.writestr(f"{name}.npy", value if isinstance(value, bytes) else npy(value))
    with pytest.raises(UserError, match=message) as caught:
        load_moments(tmp_path / "bad.npz", 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x05\x06" + 18 * b"\0", npy(np.zeros(3)), b"PK\x03\x04"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "reference.npz").write_bytes(content)
    os.mkfifo(tmp_path / "fifo.npz")
    for name in ("reference.npz", "nowhere.npz"):
        with pytest.raises(UserError, match=r"cannot be used .*arrays mu and sigma"):
            load_moments(tmp_path / name, 3)
    with pytest.raises(UserError, match="is a fifo"):
        load_moments(tmp_path / "fifo.npz", 3)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("shape", [(3,), (1 << 20,)])
def test_an_archive_does_not_unfold(tmp_path: Path, method: int, shape: tuple[int, ...]) -> None:
    size = 8 << 20
    with zipfile.ZipFile(tmp_path / "big.npz", "w", method, compresslevel=1) as archive:
        archive.writestr("mu.npy", header(shape) + bytes(size))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="cannot be used"):
            load_moments(tmp_path / "big.npz", 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 10


def test_an_interrupted_save_leaves_no_file(tmp_path: Path) -> None:
    broken = FeatureSet(3, torch.zeros(2), "no tensor")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        save_moments(broken, tmp_path / "reference.npz")
    assert [*tmp_path.iterdir()] == []
