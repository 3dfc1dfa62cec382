"""Pictures of panels for print: labelled images, with each pixel enlarged by a whole number."""

import json
import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ddim.figures.panels import Axis, Panel
from ddim.image_io import grid, save_gif, to_pil
from ddim.inference.generate import to_pixels
from ddim.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 72  # per inch
FONT = 8  # points
LINE = 10  # points from one line of a label to another
PAD = 4  # points between labels and images
MIN_DPI = 300  # dots per inch
WIDTH, HEIGHT = 6.5, 8.5  # inches between the margins of a page
GAP, GROUP_GAP = 10, 40  # white dots between images, and between groups of images
FORMULAS = {"σ̂": r"$\hat{\sigma}$", "x̂0": r"$\hat{x}_0$", "x_t": "$x_t$"}


class Layout(NamedTuple):
    """Size and resolution of a panel on paper.

    Attributes:
        scale: each pixel becomes scale x scale dots.
        dpi: dots per inch.
        vertical: whether the labels of the columns run upwards because they are too wide.
        left, top: inches that the labels take.
    """

    scale: int
    dpi: int
    vertical: bool
    left: float
    top: float


def draw(panel: Panel, path: Path, width: float = WIDTH) -> None:
    """Write a panel as PNG or PDF, about `width` inches wide at 300 dpi or more, with its metadata.

    A panel that would be higher than a page is made narrower. Each pixel becomes a square of dots of its exact colour.
    In a PDF the labels are letters, not dots.

    Raises:
        UserError: a sample is infinite or not a number.
    """
    layout = lay_out(panel, width)
    images = arrange(panel, layout.scale)
    left, top, pad = (round(inches * layout.dpi) for inches in (layout.left, layout.top, PAD / POINTS))
    bottom, right = top + images.shape[1], left + images.shape[2]
    figure = _labelled_page(panel, layout, (bottom + pad, right + pad), (top, left))
    description = json.dumps(panel.metadata, ensure_ascii=False, sort_keys=True)
    if path.suffix == ".pdf":
        _save_pdf(figure, images, (left, pad), description, path)
        return
    page = _rasterised(figure)
    page[:, top:bottom, left:right] = images
    metadata = PngInfo()
    metadata.add_itxt("Description", description)
    with atomic_write(path) as partial:
        to_pil(page).save(partial, format="PNG", dpi=(layout.dpi, layout.dpi), pnginfo=metadata)


def _save_pdf(figure: "Figure", images: Tensor, corner: tuple[int, int], description: str, path: Path) -> None:
    """Write labels and images, whose lower left corner is at `corner` in dots, as PDF."""
    import matplotlib

    figure.figimage(images.permute(1, 2, 0).numpy(), *corner, origin="upper")
    metadata = {"Subject": description, "CreationDate": None}
    # Publishers refuse matplotlib's Type 3 fonts.
    with atomic_write(path) as partial, matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(partial, format="pdf", dpi=figure.dpi, metadata=metadata)


def _rasterised(figure: "Figure") -> Tensor:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)


def _labelled_page(panel: Panel, layout: Layout, size: tuple[int, int], corner: tuple[int, int]) -> "Figure":
    """Return a white page of `size` in dots with the labels of a panel whose upper left corner is at `corner`."""
    from matplotlib.figure import Figure

    (height, width), (top, left), pad = size, corner, PAD / POINTS * layout.dpi
    # 0.01 dots more, since matplotlib rounds the size in dots down.
    figure = Figure(figsize=((width + 0.01) / layout.dpi, (height + 0.01) / layout.dpi), dpi=layout.dpi)
    h, w = (side * layout.scale for side in panel.images.shape[-2:])
    style: dict[str, Any] = {"fontsize": FONT, "ha": "right", "va": "center"}
    for label, middle in _labels(panel.rows, h):
        figure.text((left - pad) / width, 1 - (top + middle) / height, label, **style)
    style = {"fontsize": FONT, "ha": "center", "va": "bottom", "rotation": 90 if layout.vertical else 0}
    for label, middle in _labels(panel.columns, w):
        figure.text((left + middle) / width, 1 - (top - pad) / height, label, **style)
    return figure


def animate(panel: Panel, path: Path) -> None:
    """Write a panel as GIF: each row is a frame, with its images in a grid. The last frame is shown for longer.

    Raises:
        UserError: a sample is infinite or not a number.
    """
    scale = max(1, 128 // panel.images.shape[-2])
    save_gif([grid(to_pixels(frame), scale=scale) for frame in panel.images], path)


def lay_out(panel: Panel, inches: float = WIDTH) -> Layout:
    """Return the layout of a panel, `inches` wide: the smallest scale that gives 300 dpi."""
    pad = PAD / POINTS
    label_width, label_height = (max(size) / POINTS for size in zip(*map(_size, _texts(panel.columns)), strict=True))
    left = pad + max(_size(text)[0] for text in _texts(panel.rows)) / POINTS + pad
    width = max(1.0, inches - left - pad)  # an inch at least, however wide the labels are
    # Neighbours with one label share it, so the whole group has to be as wide as the label.
    groups = [(_size(text)[0] / POINTS, len(list(group))) for text, group in groupby(_texts(panel.columns))]
    vertical = any(needed > count * width / len(panel.columns) for needed, count in groups)
    top = pad + (label_width if vertical else label_height) + pad
    axes = zip((panel.rows, panel.columns), panel.images.shape[-2:], (HEIGHT - top - pad, width), strict=True)
    sides = [(len(axis) * pixels, _ends(axis, 0)[-1], room) for axis, pixels, room in axes]
    scale = max(1, min(math.ceil((MIN_DPI * room - gaps) / pixels) for pixels, gaps, room in sides))
    dpi = max(MIN_DPI, *(math.ceil((pixels * scale + gaps) / room) for pixels, gaps, room in sides))
    return Layout(scale, dpi, vertical, left, top)


def arrange(panel: Panel, scale: int) -> Tensor:
    """Return the images of a panel in rows and columns, enlarged by `scale`, white between them, uint8 (3, H', W')."""
    pixels = to_pixels(panel.images)
    h, w = (size * scale for size in pixels.shape[-2:])
    bottoms, rights = _ends(panel.rows, h), _ends(panel.columns, w)
    arranged = torch.full((3, bottoms[-1], rights[-1]), 255, dtype=torch.uint8)
    for row, bottom in zip(pixels, bottoms, strict=True):
        for image, right in zip(row, rights, strict=True):
            enlarged = image.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
            arranged[:, bottom - h : bottom, right - w : right] = enlarged  # grey becomes three equal channels
    return arranged


def _ends(axis: Axis, size: int) -> list[int]:
    """Return where each row or column ends, in dots. Groups with the same label have a wider gap between them."""
    borders = [one["label"] != other["label"] for one, other in pairwise(axis)]
    ends = [size]
    for border in borders:
        ends.append(ends[-1] + (GROUP_GAP if border and not all(borders) else GAP) + size)
    return ends


def _labels(axis: Axis, size: int) -> list[tuple[str, float]]:
    """Return each label once, with the middle of the rows or columns that share it, in dots."""
    labels, ends, first = [], _ends(axis, size), 0
    for text, group in groupby(_texts(axis)):
        last = first + len(list(group)) - 1
        labels.append((text, (ends[first] - size + ends[last]) / 2))
        first = last + 1
    return labels


def _texts(axis: Axis) -> Sequence[str]:
    """Return the labels with formulas for matplotlib."""
    texts = [str(entry["label"]) for entry in axis]
    for plain, formula in FORMULAS.items():
        texts = [text.replace(plain, formula) for text in texts]
    return texts


def _size(text: str) -> tuple[float, float]:
    """Return width and height of a text in points, of one line or more."""
    from matplotlib.textpath import TextPath

    first, *more = (TextPath((0, 0), line, size=FONT).get_extents() for line in text.split("\n"))
    return max(box.width for box in (first, *more)), first.height + LINE * len(more)
