"""What training and evaluation rely on, of every data set in DATASETS."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import noise

from ddim.config import build
from ddim.data import DATASETS, DataSpec, Images, load_images
from ddim.data.lsun import LSUNImages

# The fixture with small files of a data set, where it needs some, and the options to read them with.
SMALL = {
    "cifar10": ("cifar_root", {"size": [32, 32], "labels": "classes", "download": False}),
    "celeba": ("celeba_root", {"size": [64, 64], "labels": "Smiling", "download": False}),
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


@pytest.fixture
def read(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Images]]:
    """read(name): the images of a data set; those that were read before are closed, as LSUN's database must be."""
    opened: list[Images] = []

    def close() -> None:
        for images in opened:
            if isinstance(images, LSUNImages):
                images.close()

    def read(name: str) -> Images:
        close()
        fixture, options = SMALL[name]
        root = request.getfixturevalue(fixture) if fixture else "data"
        root = root[0] if isinstance(root, tuple) else root
        values = {"name": name, "channels": 3, "root": str(root)} | options
        opened.append(load_images(build(DataSpec, values, "data")))
        return opened[-1]

    yield read
    close()


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_gives_bytes_of_its_shape(name: str, read: Callable[[str], Images]) -> None:
    images = read(name)
    size = SMALL[name][1]["size"]
    assert images.shape[1:] == tuple(size)
    assert len(images) >= 2
    for i in (0, len(images) - 1):
        assert images[i].dtype == torch.uint8
        assert images[i].shape == images.shape
    assert not torch.equal(images[0], images[len(images) - 1])
    assert not set(images.name) & set("/ .")  # it is a part of file names


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_reads_the_same_again(name: str, read: Callable[[str], Images]) -> None:
    first = read(name)
    pixels, fingerprint = [first[i].clone() for i in range(len(first))], first.fingerprint()
    again = read(name)
    assert again.fingerprint() == fingerprint
    assert all(torch.equal(again[i], image) for i, image in enumerate(pixels))
    if "labels" in SMALL[name][1]:
        assert len(again.labels.unique()) >= 2
        assert torch.equal(again.labels, first.labels)
        assert again.classes == first.classes != ()
