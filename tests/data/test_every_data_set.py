"""What training and evaluation rely on, of every data set in DATASETS."""

from pathlib import Path

import numpy as np
import pytest
import torch
from folders import noise

from ddim.config import build
from ddim.data import DATASETS, DataSpec, Images, load_images

# The fixture with small files of a data set, where it needs some, and the options to read them with.
SMALL = {
    "cifar10": ("cifar_root", {"size": [32, 32], "labels": "classes", "download": False}),
    "celeba": ("celeba_root", {"size": [64, 64], "labels": "Young", "download": False}),
    "lsun": ("lsun_root", {"size": [32, 32], "category": "bedroom"}),
    "digits": (None, {"size": [8, 8], "channels": 1, "labels": "classes"}),
    "folder": ("folder_root", {"size": [4, 6], "labels": "folders"}),
    "npz": ("npz_root", {"size": [4, 6]}),
}


@pytest.fixture
def folder_root(tmp_path: Path) -> Path:
    for i, name in enumerate(("a/1.png", "a/2.png", "b/1.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise((4, 6), i).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def npz_root(tmp_path: Path) -> Path:
    np.savez(tmp_path / "samples.npz", np.stack([noise((4, 6), i) for i in range(3)]))
    return tmp_path / "samples.npz"


def read(name: str, request: pytest.FixtureRequest) -> Images:
    fixture, options = SMALL[name]
    root = request.getfixturevalue(fixture) if fixture else "data"
    root = root[0] if isinstance(root, tuple) else root
    return load_images(build(DataSpec, {"name": name, "channels": 3, "root": str(root)} | options, "data"))


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_gives_bytes_of_its_shape(name: str, request: pytest.FixtureRequest) -> None:
    images = read(name, request)
    size = SMALL[name][1]["size"]
    assert images.shape[1:] == tuple(size)
    assert len(images) >= 2
    for i in (0, len(images) - 1):
        assert images[i].dtype == torch.uint8
        assert images[i].shape == images.shape
    assert not torch.equal(images[0], images[len(images) - 1])
    assert not set(images.name) & set("/ .")  # it is a part of file names


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_reads_the_same_again(name: str, request: pytest.FixtureRequest) -> None:
    first = read(name, request)
    pixels, fingerprint = [first[i].clone() for i in range(len(first))], first.fingerprint()
    if hasattr(first, "close"):
        first.close()
    again = read(name, request)
    assert again.fingerprint() == fingerprint
    assert all(torch.equal(again[i], image) for i, image in enumerate(pixels))
    if "labels" in SMALL[name][1]:
        assert torch.equal(again.labels, first.labels)
        assert again.classes == first.classes != ()
    if hasattr(again, "close"):
        again.close()
