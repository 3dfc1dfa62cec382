"""Grids, PNG and GIF files hold the given pixels at the right positions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddim.image_io import grid, save_gif, save_png, to_pil


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_grid_of_three_in_two_columns_is_laid_out_exactly() -> None:
    images = torch.tensor([[[[1, 2]]], [[[3, 4]]], [[[5, 6]]]], dtype=torch.uint8)  # three images of 1 x 2
    w = 255
    expected = [
        [1, 2, w, 3, 4],
        [w, w, w, w, w],
        [5, 6, w, w, w],
    ]
    assert grid(images, columns=2, scale=1, gap=1).tolist() == [expected]


def test_grid_enlarges_pixels_to_squares() -> None:
    images = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    expected = [[1, 1, 1, 2, 2, 2]] * 3 + [[3, 3, 3, 4, 4, 4]] * 3
    assert grid(images, scale=3).tolist() == [expected]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((64, 1, 8, 8), (8 * 32 + 7 * 2, 8 * 32 + 7 * 2)),  # 8 pixels become 32
        ((5, 3, 32, 32), (2 * 32 + 2, 3 * 32 + 2 * 2)),  # two rows of three
        ((2, 3, 40, 20), (40, 20 * 2 + 2)),
        ((1, 1, 15, 15), (45, 45)),
    ],
)
def test_grid_is_about_square_with_images_of_32_pixels(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    assert grid(noise(*shape)).shape == (shape[1], *size)


def test_grid_contains_every_image() -> None:
    images = noise(7, 3, 32, 24)
    canvas = grid(images, columns=3, gap=5)
    for i, image in enumerate(images):
        top, left = i // 3 * 37, i % 3 * 29
        assert torch.equal(canvas[:, top : top + 32, left : left + 24], image)
    assert canvas.shape == (3, 3 * 32 + 2 * 5, 3 * 24 + 2 * 5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_keeps_every_pixel_and_leaves_no_other_file(tmp_path: Path, channels: int, mode: str) -> None:
    image = noise(channels, 5, 9)
    path = tmp_path / "new" / "image.png"
    save_png(image, path)
    with Image.open(path) as opened:
        assert (opened.format, opened.mode, opened.size) == ("PNG", mode, (9, 5))
        pixels = np.array(opened).reshape(5, 9, channels).transpose(2, 0, 1)
    assert np.array_equal(pixels, image.numpy())
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]
    save_png(noise(channels, 5, 9, seed=1), path)  # replaces
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]


def test_failed_png_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    save_png(noise(1, 4, 4), path)
    before = path.read_bytes()

    def fail(self: Image.Image, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk is full"):
        save_png(noise(1, 4, 4, seed=1), path)
    assert path.read_bytes() == before


def test_to_pil_keeps_channels_and_axes() -> None:
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[0, 0, 1], image[2, 1, 0] = 200, 100
    image_pil = to_pil(image)
    assert image_pil.getpixel((1, 0)) == (200, 0, 0)  # (x, y)
    assert image_pil.getpixel((0, 1)) == (0, 0, 100)


@pytest.mark.parametrize(("frames", "seconds", "each"), [(5, 4.0, 800), (3, 0.3, 100), (60, 0.5, 20)])
def test_gif_shows_frames_evenly_and_holds_the_last(tmp_path: Path, frames: int, seconds: float, each: int) -> None:
    images = [noise(1, 6, 4, seed=i) for i in range(frames)]
    path = tmp_path / "new" / "movie.gif"
    save_gif(images, path, seconds)
    with Image.open(path) as movie:
        assert movie.format == "GIF"
        assert movie.info["loop"] == 0
        assert movie.n_frames == frames
        durations = []
        for i, image in enumerate(images):
            movie.seek(i)
            durations.append(movie.info["duration"])
            assert np.array_equal(np.array(movie.convert("L")), image[0].numpy())
    assert durations == [each] * (frames - 1) + [1000]
    assert [p.name for p in path.parent.iterdir()] == ["movie.gif"]
