"""Pictures for print show every pixel as a square of dots, at 300 dpi or more, next to readable labels."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddim.data.images import normalize
from ddim.errors import UserError
from ddim.figures.layout import animate, arrange, draw, lay_out
from ddim.figures.panels import Axis, Panel

pytestmark = pytest.mark.integration


def axis(*labels: str) -> Axis:
    return tuple({"label": label} for label in labels)


def pixels_of(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def panel_of(pixels: Tensor, rows: Axis | None = None, columns: Axis | None = None) -> Panel:
    rows = rows or axis(*(f"image {i}" for i in range(pixels.shape[0])))
    columns = columns or axis(*(f"S={i + 1}" for i in range(pixels.shape[1])))
    return Panel(normalize(pixels), rows, columns, {"figure": "test", "name": "η"})


PANELS = {
    "8x8 grey": panel_of(pixels_of(4, 11, 1, 8, 8)),
    "32x32 colour": panel_of(
        pixels_of(5, 10, 3, 32, 32),
        axis("η=0.0", "η=0.2", "η=0.5", "η=1.0", "σ̂"),
        axis(*["S=10"] * 5, *["S=100"] * 5),
    ),
    "wide colour": panel_of(pixels_of(2, 4, 3, 24, 40)),
    "64x64 colour": panel_of(pixels_of(2, 11, 3, 64, 64)),
    "256x256 colour": panel_of(pixels_of(1, 5, 3, 256, 256)),
    "higher than a page": panel_of(pixels_of(20, 3, 1, 8, 8)),
    "narrow columns": panel_of(pixels_of(1, 40, 1, 8, 8), columns=axis(*(f"t={1000 - i}" for i in range(40)))),
    "unequal groups": panel_of(
        pixels_of(3, 9, 3, 8, 8),
        columns=axis("one", *["of_two\nlines"] * 4, *["longer_than_an_image\nwide"] * 4),
    ),
    "one": panel_of(pixels_of(1, 1, 1, 8, 8)),
}


class Drawn(NamedTuple):
    """A PNG file: its dots (H, W, 3), its resolution, and the upper left corner of the images."""

    page: NDArray[Any]
    dpi: float
    top: int
    left: int


def positions(page: NDArray[Any], block: NDArray[Any]) -> list[tuple[int, int]]:
    """Return every position of a page with exactly the content of a block."""
    h, w = block.shape[:2]
    room = (page.shape[0] - h + 1, page.shape[1] - w + 1)
    fits = np.ones(room, dtype=bool)
    for y, x in [(0, 0), (h - 1, w - 1), (0, w - 1), (h // 2, w // 2), (h - 1, 0)]:
        fits &= (page[y : y + room[0], x : x + room[1]] == block[y, x]).all(axis=-1)
    return [(y, x) for y, x in np.argwhere(fits) if np.array_equal(page[y : y + h, x : x + w], block)]


def squares(image: Tensor, scale: int) -> NDArray[Any]:
    """Enlarge one image (C, H, W) to (H', W', 3), independently of the code with numpy's kron."""
    channels = image.expand(3, -1, -1).numpy()
    return np.stack([np.kron(c, np.ones((scale, scale), dtype=np.uint8)) for c in channels], axis=-1)


@pytest.fixture(scope="module", params=PANELS)
def panel(request: pytest.FixtureRequest) -> Panel:
    return PANELS[request.param]


@pytest.fixture(scope="module")
def drawn(panel: Panel, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    path = tmp_path_factory.mktemp("drawn") / "new" / "figure.png"
    draw(panel, path)
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert json.loads(image.text["Description"]) == panel.metadata  # type: ignore[attr-defined]
        page, (dots, same) = np.array(image), image.info["dpi"]
    assert dots == same
    first = squares(((panel.images[0, 0] + 1) * 127.5).round().to(torch.uint8), lay_out(panel).scale)
    [(top, left)] = positions(page, first)
    return Drawn(page, dots, top, left)


def test_page_has_every_image_pixel_for_pixel(panel: Panel, drawn: Drawn) -> None:
    scale = lay_out(panel).scale
    blocks = [[squares(((image + 1) * 127.5).round().to(torch.uint8), scale) for image in row] for row in panel.images]
    h, w = blocks[0][0].shape[:2]
    across = [positions(drawn.page[drawn.top : drawn.top + h], block) for block in blocks[0]]
    down = [positions(drawn.page[:, drawn.left : drawn.left + w], row[0]) for row in blocks]
    assert all(len(places) == 1 for places in across + down)
    lefts, tops = [places[0][1] for places in across], [places[0][0] for places in down]
    for row, y in zip(blocks, tops, strict=True):
        for block, x in zip(row, lefts, strict=True):
            assert np.array_equal(drawn.page[y : y + h, x : x + w], block)
    assert set(np.diff(lefts)) <= {w + 10, w + 40}
    assert set(np.diff(tops)) <= {h + 10}
    labels = [column["label"] for column in panel.columns]
    borders = [k for k, (one, other) in enumerate(pairwise(labels)) if one != other]
    between = [k for k, step in enumerate(np.diff(lefts)) if step == w + 40]
    assert between == (borders if len(borders) < len(labels) - 1 else [])


def test_page_fits_the_paper_at_300_dpi(drawn: Drawn) -> None:
    height, width = (side / drawn.dpi for side in drawn.page.shape[:2])
    assert drawn.dpi > 299.99
    assert 5.5 <= width <= 7 or (8 <= height <= 9 and width < 7)
    assert height <= 9


def test_labels_are_next_to_the_images(panel: Panel, drawn: Drawn) -> None:
    ink = (drawn.page < 255).any(axis=-1)
    scale = lay_out(panel).scale
    h = panel.images.shape[-2] * scale
    assert not ink[:3].any()
    assert not ink[:, :3].any()
    assert not ink[-3:].any()
    assert not ink[:, -3:].any()
    assert not ink[drawn.top - 3 : drawn.top, :].any()  # between the labels above and the images
    assert not ink[:, drawn.left - 3 : drawn.left].any()
    assert ink[drawn.top : drawn.top + h, : drawn.left].any()  # of the first row
    # Above the images there are as many separate pieces of ink as labels.
    above = ink[: drawn.top].any(axis=0)
    gap = round(drawn.dpi * 0.03)
    ends = np.flatnonzero(above)
    assert 1 + int((np.diff(ends) > gap).sum()) == len({column["label"] for column in panel.columns})


def test_scale_is_the_smallest_for_300_dpi() -> None:
    for panel in PANELS.values():
        layout = lay_out(panel)
        h, w = (side * layout.scale for side in panel.images.shape[-2:])
        assert layout.scale >= 1
        rows, columns = panel.images.shape[:2]
        smaller = (layout.scale - 1) / layout.scale
        assert layout.scale == 1 or min(columns * w * smaller / 6.3, rows * h * smaller / 8.3) < 300 or columns == 1
        assert layout.vertical == (len(panel.columns) == 40)
    assert [lay_out(PANELS[name]).scale for name in ("8x8 grey", "64x64 colour", "256x256 colour")] == [19, 3, 2]


def test_groups_have_wider_gaps() -> None:
    pixels = torch.arange(6, dtype=torch.uint8).reshape(2, 3, 1, 1, 1)
    sheet = arrange(panel_of(pixels, axis("x", "y"), axis("a", "a", "b")), scale=2)
    assert sheet.shape == (3, 2 + 10 + 2, 2 + 10 + 2 + 40 + 2)
    assert torch.equal(sheet[0], sheet[1])
    row = [0, 0] + [255] * 10 + [1, 1] + [255] * 40 + [2, 2]
    assert sheet[2, 0].tolist() == sheet[2, 1].tolist() == row
    assert sheet[2, 2:12].unique().tolist() == [255]
    assert sheet[2, -1].tolist() == [3, 3] + [255] * 10 + [4, 4] + [255] * 40 + [5, 5]


def test_pixels_are_rounded_and_clamped() -> None:
    images = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 3.0]).reshape(1, 6, 1, 1, 1)
    sheet = arrange(Panel(images, axis(""), axis(*"abcdef"), {}), scale=1)
    assert sheet[0, 0, ::11].tolist() == [0, 0, 128, 191, 255, 255]


def test_non_finite_samples_are_refused(tmp_path: Path) -> None:
    panel = panel_of(pixels_of(2, 2, 1, 8, 8))
    panel.images[1, 0, 0, 3, 3] = torch.nan
    for write in (draw, animate):
        with pytest.raises(UserError, match="not finite"):
            write(panel, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_animation_shows_rows_as_frames(tmp_path: Path) -> None:
    pixels = pixels_of(5, 4, 1, 8, 8)
    animate(panel_of(pixels), tmp_path / "movie.gif")
    with Image.open(tmp_path / "movie.gif") as movie:
        assert movie.n_frames == 5
        assert movie.size == (2 * 128 + 2, 2 * 128 + 2)
        for k, row in enumerate(pixels):
            movie.seek(k)
            frame = np.array(movie.convert("L"))
            wanted = [np.kron(image[0].numpy(), np.ones((16, 16), dtype=np.uint8)) for image in row]
            corners = [frame[:128, :128], frame[:128, 130:], frame[130:, :128], frame[130:, 130:]]
            assert all(np.array_equal(a, b) for a, b in zip(corners, wanted, strict=True))
        assert movie.info["duration"] == 1000  # of the last frame


@pytest.mark.parametrize("name", ["8x8 grey", "32x32 colour", "wide colour"])
def test_a_pdf_has_its_width_exact_pixels_and_real_letters(name: str, tmp_path: Path) -> None:
    panel = PANELS[name]
    draw(panel, tmp_path / "figure.pdf", 3.25)
    content = (tmp_path / "figure.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ([\d.]+) \]", content)
    assert box is not None
    assert 3.0 < float(box[1]) / 72 < 3.45
    assert b"/Type3" not in content
    assert b"/DCTDecode" not in content  # JPEG would change the colours
    rows, columns = arrange(panel, lay_out(panel, 3.25).scale).shape[1:]
    assert b"/Width %d /Height %d" % (columns, rows) in content
