"""Image grids, PNG and GIF files of uint8 images."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from ddim.io import atomic_write

log = logging.getLogger(__name__)


def grid(images_u8: Tensor, columns: int | None = None, scale: int | None = None, gap: int = 2) -> Tensor:
    """Arrange images in a grid, row by row.

    Args:
        images_u8: uint8 (N, C, H, W) with C = 1 or 3.
        columns: images in a row; by default such that the grid is about square.
        scale: each pixel becomes scale x scale; by default such that an image is at least 32 pixels high.
        gap: white pixels between images.

    Returns:
        uint8 (C, H', W').
    """
    n, c, h, w = images_u8.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = -(-n // columns)
    scale = scale or max(1, -(-32 // h))
    h, w = h * scale, w * scale
    enlarged = images_u8.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    canvas = torch.full((c, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(enlarged):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def class_grid(images_u8: Tensor, labels: Tensor) -> Tensor:
    """Arrange images in a grid with a row for each class that occurs, (C, H', W'); short rows end in white.

    Args:
        images_u8: as in `grid`.
        labels: int64 (N,).
    """
    classes, counts = labels.unique(return_counts=True)
    columns = int(counts.max())
    sheet = torch.full((len(classes), columns, *images_u8.shape[1:]), 255, dtype=torch.uint8)
    for row, label in zip(sheet, classes, strict=True):
        chosen = images_u8[labels == label]
        row[: len(chosen)] = chosen
    return grid(sheet.flatten(0, 1), columns)


def to_pil(image_u8: Tensor) -> Image.Image:
    """Return a uint8 (C, H, W) tensor as a PIL image, grey for one channel."""
    pixels = image_u8.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def save_png(image_u8: Tensor, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a uint8 (C, H, W) image as PNG, with entries of text by name (`read_png_text`)."""
    entries = PngImagePlugin.PngInfo()
    for name, value in (text or {}).items():
        entries.add_text(name, value)
    with atomic_write(path) as partial:
        to_pil(image_u8).save(partial, format="PNG", pnginfo=entries)


def read_png_text(path: Path, name: str) -> str | None:
    """Return an entry of text of a PNG without reading its pixels; None if it has none, or is no image."""
    try:
        with Image.open(path) as image:
            value = image.info.get(name)
    except Exception as error:  # a damaged file can make a decoder raise anything
        log.debug("%s cannot be read as an image (%s)", path, error)
        return None
    return value if isinstance(value, str) else None


def save_gif(frames_u8: Sequence[Tensor], path: Path, seconds: float = 4.0) -> None:
    """Write frames, each uint8 (C, H, W), as a looping GIF of about `seconds`; the last frame is shown for a second."""
    # Browsers do not honour delays under 20 ms.
    durations = [max(20, round(1000 * seconds / len(frames_u8)))] * (len(frames_u8) - 1) + [1000]
    first, *rest = [to_pil(frame) for frame in frames_u8]
    with atomic_write(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0)
