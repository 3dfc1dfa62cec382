"""Small files in the layout of the real data sets."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CelebA


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """Two images per batch file; the channels hold the number of the image, the column and the row."""
    (tmp_path / "cifar-10-batches-py").mkdir()
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for b, name in enumerate(batches):
        data = np.empty((2, 3, 32, 32), dtype=np.uint8)
        data[:, 0] = np.array([2 * b, 2 * b + 1])[:, None, None]
        data[:, 1] = np.arange(32)
        data[:, 2] = np.arange(32)[:, None]
        with open(tmp_path / "cifar-10-batches-py" / name, "wb") as file:
            pickle.dump({"data": data.reshape(2, -1), "labels": [b, 9]}, file)
    with open(tmp_path / "cifar-10-batches-py" / "batches.meta", "wb") as file:
        pickle.dump({"label_names": ["a", "b"]}, file)
    # torchvision then checks only whether the files exist
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in batches[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    return tmp_path


@pytest.fixture
def celeba_root(tmp_path, monkeypatch):
    """Five images: 0, 2 for train, 1 valid, 3, 4 test; the channels hold the column, the row and the image."""
    base = tmp_path / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    pixels = np.zeros((218, 178, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(178), np.arange(218)[:, None]
    names = [f"{i:06d}.jpg" for i in range(5)]
    for i, name in enumerate(names):
        pixels[..., 2] = i
        Image.fromarray(pixels).save(base / "img_align_celeba" / name, format="PNG")  # lossless despite its name

    def table(file, columns, values, header):
        head = [str(len(names)), " ".join(columns)] if header else []
        rows = [" ".join([name, *map(str, value)]) for name, value in zip(names, values, strict=True)]
        (base / file).write_text("\n".join(head + rows) + "\n")

    table("list_eval_partition.txt", [], [[0], [1], [0], [2], [2]], header=False)
    table("identity_CelebA.txt", [], [[1]] * 5, header=False)
    attributes = [[1, -1], [1, -1], [-1, -1], [-1, 1], [1, -1]]
    table("list_attr_celeba.txt", ["Smiling", "Young"], attributes, header=True)
    table("list_bbox_celeba.txt", ["image_id", "x_1", "y_1"], [[1, 2]] * 5, header=True)
    table("list_landmarks_align_celeba.txt", ["lefteye_x", "lefteye_y"], [[1, 2]] * 5, header=True)
    monkeypatch.setattr(CelebA, "file_list", [(id_, None, name) for id_, _, name in CelebA.file_list])
    return tmp_path


@pytest.fixture
def lsun_root(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in ((40, 50), (60, 33))]
    folder = str(tmp_path / "bedroom_train_lmdb")
    with lmdb.open(folder, map_size=1 << 20) as database, database.begin(write=True) as writing:
        for key, image in zip((b"aa", b"bb"), images, strict=True):
            image.save(stored := io.BytesIO(), "PNG")
            writing.put(key, stored.getvalue())
    return tmp_path, images
