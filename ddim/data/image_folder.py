"""A folder of your own images, one file each."""

import os
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

from ddim.data.image_files import FileImages, resize_and_center_crop
from ddim.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_IGNORED = {"Thumbs.db", "desktop.ini"}  # written by file managers; hidden files are ignored as well
# Channels of an image by its Pillow mode. The modes of more than 8 bits are left out: converting would clip them.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
_MODES = {1: "L", 3: "RGB"}


def folder_images(root: Path, split: str, size: tuple[int, int], channels: int, resize: bool) -> FileImages:
    """List the images under `root`, sub-folders included, in the order of their relative paths.

    When `root` has a sub-folder `train` or `test`, `split` names the one to read; otherwise the whole folder serves as
    both. Hidden files and folders are ignored.

    Args:
        root: the folder.
        split: "train" or "test".
        size: (H, W) of the images returned.
        channels: 1 or 3; the files must have as many.
        resize: scale the shorter side and centre-crop images of another size instead of refusing them.

    Raises:
        UserError: the folder is missing, has no images, or holds files that are not images.
    """
    if not root.is_dir():
        raise UserError(f"the folder {root} does not exist; set data.root to a folder of images.")
    folder = root
    if (root / "train").is_dir() or (root / "test").is_dir():
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"{root} is divided into train and test, but {folder} does not exist; add it.")
    files = _list_images(folder)
    return FileImages(
        name=f"{root.resolve().name}-{split}",
        files=files,
        read=partial(_read, size=size, channels=channels, resize=resize),
        shape=(channels, *size),
        transform=f"{'shorter side bilinear, centre crop' if resize else 'none'}, {_MODES[channels]}",
    )


def _list_images(folder: Path) -> list[Path]:
    images: list[Path] = []
    others: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name not in _IGNORED:
                path = Path(parent, name)
                (images if path.suffix.lower() in EXTENSIONS else others).append(path)
    if others:
        named = ", ".join(str(path) for path in sorted(others)[:5])
        raise UserError(
            f"{folder} holds {len(others)} files that are not images: {named}{', ...' * (len(others) > 5)}; "
            f"move them away (images end in {' '.join(EXTENSIONS)})."
        )
    if not images:
        raise UserError(f"{folder} holds no images; put files there that end in {' '.join(EXTENSIONS)}.")
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())


def _read(path: Path, size: tuple[int, int], channels: int, resize: bool) -> Image.Image:
    """Open a file and return it in mode L or RGB and of size (H, W)."""
    with Image.open(path) as image:
        has = _CHANNELS.get(image.mode)
        if has is None:
            raise UserError(f"{path} has pixels of mode {image.mode}, not 8 bits per channel; convert it.")
        if has != channels:
            kind = {1: "grey", 3: "in colour"}[has]
            raise UserError(f"{path} is {kind}, but data.channels={channels}; set data.channels={has} or convert it.")
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise UserError(f"{path} has transparent pixels; put it on a background first.")
        ImageOps.exif_transpose(image, in_place=True)  # cameras store the orientation as metadata
        if (image.height, image.width) != size and not resize:
            raise UserError(
                f"{path} is {image.height} x {image.width} pixels (height x width), but data.size={list(size)}; "
                "set data.resize=true to resize the shorter side and centre-crop."
            )
        upright = image.convert(_MODES[channels])
    return upright if upright.size == size[::-1] else resize_and_center_crop(upright, size)
