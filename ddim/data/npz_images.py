"""Samples of another code base in an .npz file."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from ddim.data.images import MemoryImages
from ddim.errors import UserError
from ddim.io import check_regular_file, explain_read_errors

SAMPLES = "arr_0"


def npz_images(path: Path) -> MemoryImages:
    """Read `arr_0`, uint8 (N, H, W, C), C = 1 or 3, as guided-diffusion (ADM) writes its samples; labels are left out.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    samples_shape(path)
    with explain_read_errors(path), np.load(path, allow_pickle=False) as arrays:
        pixels = torch.from_numpy(arrays[SAMPLES])
    return MemoryImages(path.stem, pixels.permute(0, 3, 1, 2))


def samples_shape(path: Path) -> tuple[int, int, int]:
    """Return (C, H, W) of the samples in a file, by its header.

    Raises:
        UserError: as `npz_images`.
    """
    check_regular_file(path, "file of samples")
    if not path.is_file():
        raise UserError(f"there is no file {path}; give an .npz file of samples.")
    with explain_read_errors(path), zipfile.ZipFile(path) as archive:
        if f"{SAMPLES}.npy" not in archive.namelist():
            held = ", ".join(name.removesuffix(".npy") for name in archive.namelist()[:5])
            raise UserError(f"{path} holds {held}; samples are the array {SAMPLES}, uint8 of shape (N, H, W, 1 or 3).")
        shape, dtype = array_header(archive, f"{SAMPLES}.npy")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape:
        raise UserError(f"{SAMPLES} of {path} is {dtype} of shape {shape}; they must be uint8 (N, H, W, 1 or 3).")
    return shape[3], shape[1], shape[2]


def array_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type of an array in an open .npz, by its header; `name` ends in .npy."""
    with archive.open(name) as file:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, dtype
