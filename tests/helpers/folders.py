"""Folders of small images."""

import torch
from PIL import Image

from ddim.config import build
from ddim.data import DataSpec, load_images


def write(path, colour=(10, 20, 30), size=(4, 6), mode="RGB", **options):
    """Write one image of `size` = (H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], colour).save(path, **options)


def noise(size, seed=0):
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.numpy())


def load(root, split="train", **values):
    values = {"name": "folder", "size": [4, 6], "channels": 3, "root": str(root)} | values
    return load_images(build(DataSpec, values, "data"), split)
