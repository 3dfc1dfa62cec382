"""Pictures of panels for print: exact pixels, enlarged by whole numbers, under labels."""

import json
import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ddim.figures.panels import Axis, Panel
from ddim.image_io import grid, save_gif, to_pil
from ddim.inference.generate import to_pixels
from ddim.io import atomic_write

POINTS = 72  # in an inch
FONT = 8  # points
PAD = 4  # points between labels and images
DOTS = 300  # in an inch, at least
WIDTH, HEIGHT = 6.5, 8.5  # inches on paper: between the margins of a page
GAP, GROUP_GAP = 10, 40  # white dots between images, and between groups of them
FORMULAS = {"σ̂": r"$\hat{\sigma}$", "x̂0": r"$\hat{x}_0$", "x_t": "$x_t$"}


class Layout(NamedTuple):
    """How a panel is put on paper.

    Attributes:
        scale: each pixel becomes scale x scale dots.
        dots: in an inch.
        upright: whether the labels of the columns run upwards, for want of width.
        left, top: inches that the labels take.
    """

    scale: int
    dots: int
    upright: bool
    left: float
    top: float


def draw(panel: Panel, path: Path) -> None:
    """Write a panel as PNG, about 6.5 inches wide at 300 dots an inch or more, the facts of the panel in its metadata.

    A panel that would be higher than a page is made narrower. Every pixel is a square of dots of its own colour.

    Raises:
        UserError: a sample is infinite or not a number.
    """
    layout = lay_out(panel)
    image = canvas(panel, layout.scale)
    left, top, pad = (round(inches * layout.dots) for inches in (layout.left, layout.top, PAD / POINTS))
    bottom, right = top + image.shape[1], left + image.shape[2]
    page = _written(panel, layout, (bottom + pad, right + pad), (top, left))
    page[:, top:bottom, left:right] = image
    facts = PngInfo()
    facts.add_itxt("Description", json.dumps(panel.facts, ensure_ascii=False, sort_keys=True))
    with atomic_write(path) as partial:
        to_pil(page).save(partial, format="PNG", dpi=(layout.dots, layout.dots), pnginfo=facts)


def _written(panel: Panel, layout: Layout, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """Return white paper with the labels of a panel whose images begin at a corner, uint8 (3, *size)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    (height, width), (top, left), pad = size, corner, PAD / POINTS * layout.dots
    # A hundredth of a dot more: the size in dots is rounded down.
    figure = Figure(figsize=((width + 0.01) / layout.dots, (height + 0.01) / layout.dots), dpi=layout.dots)
    h, w = (side * layout.scale for side in panel.cells.shape[-2:])
    style: dict[str, Any] = {"fontsize": FONT, "ha": "right", "va": "center"}
    for label, middle in _labels(panel.rows, h):
        figure.text((left - pad) / width, 1 - (top + middle) / height, label, **style)
    style = {"fontsize": FONT, "ha": "center", "va": "bottom", "rotation": 90 if layout.upright else 0}
    for label, middle in _labels(panel.columns, w):
        figure.text((left + middle) / width, 1 - (top - pad) / height, label, **style)
    drawn = FigureCanvasAgg(figure)
    drawn.draw()
    return torch.from_numpy(np.asarray(drawn.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)


def animate(panel: Panel, path: Path) -> None:
    """Write a panel as GIF: its rows one after the other, the images of a row in a grid, the last one held.

    Raises:
        UserError: a sample is infinite or not a number.
    """
    scale = max(1, 128 // panel.cells.shape[-2])
    save_gif([grid(to_pixels(frame), scale=scale) for frame in panel.cells], path)


def lay_out(panel: Panel) -> Layout:
    """Return how to put a panel on a page: the least enlargement that gives 300 dots an inch."""
    pad = PAD / POINTS
    wide, high = (max(size) / POINTS for size in zip(*map(_size, _texts(panel.columns)), strict=True))
    left = pad + max(_size(text)[0] for text in _texts(panel.rows)) / POINTS + pad
    room = WIDTH - left - pad
    # Of neighbours with one label the whole group has to be as wide as the label.
    narrowest = min(len(list(group)) for _, group in groupby(row["label"] for row in panel.columns))
    upright = wide > narrowest * room / len(panel.columns)
    top = pad + (wide if upright else high) + pad
    pages = (HEIGHT - top - pad, room)
    gaps = [_ends(axis, 0)[-1] for axis in (panel.rows, panel.columns)]
    pixels = [len(axis) * size for axis, size in zip((panel.rows, panel.columns), panel.cells.shape[-2:], strict=True)]
    sides = list(zip(pixels, gaps, pages, strict=True))
    scale = max(1, min(math.ceil((DOTS * inches - gap) / count) for count, gap, inches in sides))
    dots = max(DOTS, *(math.ceil((count * scale + gap) / inches) for count, gap, inches in sides))
    return Layout(scale, dots, upright, left, top)


def canvas(panel: Panel, scale: int) -> Tensor:
    """Return the images of a panel side by side, uint8 (3, H', W'), each pixel as scale x scale, white between them."""
    pixels = to_pixels(panel.cells)
    h, w = (size * scale for size in pixels.shape[-2:])
    bottoms, rights = _ends(panel.rows, h), _ends(panel.columns, w)
    sheet = torch.full((3, bottoms[-1], rights[-1]), 255, dtype=torch.uint8)
    for row, bottom in zip(pixels, bottoms, strict=True):
        for image, right in zip(row, rights, strict=True):
            enlarged = image.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
            sheet[:, bottom - h : bottom, right - w : right] = enlarged  # one channel becomes three equal ones
    return sheet


def _ends(axis: Axis, size: int) -> list[int]:
    """Return where each row or column ends, in dots; between groups of one label there is more white."""
    borders = [one["label"] != other["label"] for one, other in pairwise(axis)]
    ends = [size]
    for border in borders:
        ends.append(ends[-1] + (GROUP_GAP if border and not all(borders) else GAP) + size)
    return ends


def _labels(axis: Axis, size: int) -> list[tuple[str, float]]:
    """Return each label once, and the middle of the rows or columns that it stands for, in dots."""
    placed, ends, first = [], _ends(axis, size), 0
    for text, group in groupby(_texts(axis)):
        last = first + len(list(group)) - 1
        placed.append((text, (ends[first] - size + ends[last]) / 2))
        first = last + 1
    return placed


def _texts(axis: Axis) -> Sequence[str]:
    """Return labels as matplotlib sets them."""
    texts = [str(entry["label"]) for entry in axis]
    for plain, formula in FORMULAS.items():
        texts = [text.replace(plain, formula) for text in texts]
    return texts


def _size(text: str) -> tuple[float, float]:
    """Return width and height of a text, in points."""
    from matplotlib.textpath import TextPath

    box = TextPath((0, 0), text, size=FONT).get_extents()
    return box.width, box.height
