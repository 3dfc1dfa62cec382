"""A folder of your own images, one file each."""

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import ExifTags, Image
from torch import Tensor

from ddim.data.image_files import FileImages, explain_damage, resize_and_center_crop
from ddim.errors import UserError
from ddim.io import printable

log = logging.getLogger(__name__)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_IGNORED = {"Thumbs.db", "desktop.ini"}  # written by file managers; hidden files are ignored as well
# Channels of an image by its Pillow mode. The modes of more than 8 bits are left out: converting would clip them.
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
_MODES = {1: "L", 3: "RGB"}
_OTHER_SPLITS = {"val", "valid", "validation"}  # left out beside train and test, with a warning
# EXIF orientation -> what makes such an image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def folder_images(
    root: Path,
    split: str,
    size: tuple[int, int],
    channels: int,
    resize: bool,
    convert: bool = False,
    classes: tuple[str, ...] = (),
) -> FileImages:
    """List the images under `root`, sub-folders included, in the order of their relative paths.

    When `root` has a sub-folder `train` or `test` and no images elsewhere, `split` names the one to read; otherwise the
    whole folder serves as both. Hidden files and folders are ignored.

    Args:
        root: the folder.
        split: "train" or "test".
        size: (H, W) of the images returned.
        channels: 1 or 3; the files must have as many.
        resize: scale the shorter side and centre-crop images of another size instead of refusing them.
        convert: convert grey and colour images to `channels` instead of refusing them.
        classes: the folders of `class_folders`, which then label the images; () for no labels.

    Raises:
        UserError: the folder is missing, has no images, holds files that are not images or sub-folders that may be
            splits or classes, or is linked into itself; or the images are not all in folders of classes.
    """
    _check_is_folder(root, f"the folder {root} does not exist; set data.root to a folder of images.")
    folder = _split_folder(root, split)
    files = list_images(folder)
    steps = ["shorter side bilinear, centre crop"] * resize + ["converted"] * convert
    return FileImages(
        # as text even if the folder's name is no UTF-8
        name=f"{root.resolve().name}-{split}".encode(errors="replace").decode(),
        files=files,
        read=partial(_read, size=size, channels=channels, resize=resize, convert=convert),
        shape=(channels, *size),
        transform=f"{', '.join(steps) or 'none'}, {_MODES[channels]}",
        labels=_labels(folder, files, classes) if classes else None,
        classes=tuple(map(printable, classes)),
    )


def class_folders(root: Path) -> tuple[str, ...]:
    """Return the names of the folders of classes in a folder of images, or in its split `train`: labels 0, 1, ...

    As torchvision's ImageFolder has them: sorted; folders inside a folder of a class are of that class.

    Raises:
        UserError: there are fewer than two, or they cannot be read.
    """
    _check_is_folder(root, f"the folder {root} does not exist; set data.root to a folder of images.")
    folder = _split_folder(root, "train")
    names = sorted(path.name for path, is_folder in _entries(folder) if is_folder)
    if len(names) < 2:
        raise UserError(
            f"data.labels=folders needs a folder for each class, two at least, and {folder} holds "
            f"{', '.join(map(printable, names)) or 'none'}; set data.root to the folder that holds them."
        )
    return tuple(names)


def _labels(folder: Path, files: Sequence[Path], classes: tuple[str, ...]) -> Tensor:
    """Return the labels of image files, int64 (N,), by the folder of a class that each is in.

    Raises:
        UserError: a file is outside of them, or one of them is unknown or empty.
    """
    names = [path.relative_to(folder).parts[0] for path in files]
    if outside := [printable(path) for path in files if path.parent == folder]:
        raise UserError(
            f"{folder} holds images outside the folders of classes: {', '.join(outside[:5])}"
            f"{', ...' * (len(outside) > 5)}; move each into the folder of its class, or set data.labels=null."
        )
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(
            f"{printable(folder / unknown[0])} is of no class of the training images, which are "
            f"{', '.join(map(printable, classes[:20]))}{', ...' * (len(classes) > 20)}; rename it or move it away."
        )
    if empty := [name for name in classes if name not in names and (folder / name).is_dir()]:
        raise UserError(f"{printable(folder / empty[0])} holds no images of its class; add some or remove the folder.")
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in names])


def _check_is_folder(root: Path, missing: str) -> None:
    if root.is_file():
        raise UserError(f"{root} is a file; give the folder that holds it, whose images are all taken.")
    if not root.is_dir():
        raise UserError(missing)


def checkpoint_images(root: Path, shape: tuple[int, int, int], resize: bool, convert: bool) -> FileImages:
    """List all images under a folder, as a checkpoint takes them; there are no splits.

    Args:
        root: the folder.
        shape: (C, H, W) of the checkpoint's images.
        resize, convert: see `folder_images`.

    Raises:
        UserError: the folder is missing, has no images, or holds files that are not images.
    """
    _check_is_folder(root, f"the folder source={root} does not exist; give a folder of images.")
    channels, height, width = shape
    read = partial(_read, size=(height, width), channels=channels, resize=resize, convert=convert, for_checkpoint=True)
    return FileImages(root.resolve().name, list_images(root), read, shape, f"resize {resize}, convert {convert}")


def first_image_shape(root: Path, split: str) -> tuple[int, int, int]:
    """Return (C, H, W) of the first image that `folder_images` lists.

    Raises:
        UserError: as `folder_images`, or the file is no image of 8 bits per channel.
    """
    _check_is_folder(root, f"the folder {root} does not exist; give a folder of images.")
    path = list_images(_split_folder(root, split))[0]
    with explain_damage(f"the image file {printable(path)}", path), Image.open(path) as image:
        channels = _CHANNELS.get(image.mode)
        if channels is None:
            raise UserError(f"{printable(path)} has pixels of mode {image.mode}, not 8 bits per channel; convert it.")
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        height, width = image.size if turned else image.size[::-1]
    return channels, height, width


def split_folders(root: Path) -> list[str]:
    """Return the names of the folders in a folder of images that are its splits, train and test; [] if it has none.

    Raises:
        UserError: it cannot be read.
    """
    folders = [path.name for path, is_folder in _entries(root) if is_folder]
    return sorted(name for name in folders if name.lower() in ("train", "test"))


def _split_folder(root: Path, split: str) -> Path:
    """Return the folder to read: a split of `root`, or `root`.

    Raises:
        UserError: the split is missing, or sub-folders may be splits or classes.
    """
    if not (splits := split_folders(root)):
        return root
    entries = sorted(_entries(root))
    others = [path.name for path, is_folder in entries if path.name not in splits and _holds_images(path, is_folder)]
    left_out = [name for name in others if name.lower() in _OTHER_SPLITS]
    if others != left_out or set(splits) - {"train", "test"}:
        beside = f" beside {', '.join(map(printable, others[:5]))}{', ...' * (len(others) > 5)}" if others else ""
        raise UserError(
            f"{root} holds {' and '.join(splits)}{beside}, which may be splits or classes; for splits name them train "
            "and test and move all other images away, for classes give them other names, or set data.root to the "
            "folder that you mean."
        )
    folder = root / split
    if not folder.is_dir():
        raise UserError(f"{root} is divided into train and test, but {folder} does not exist; add it.")
    if left_out:
        log.warning("%s is read; %s beside it is left out.", folder, " and ".join(left_out))
    return folder


def _holds_images(path: Path, is_folder: bool) -> bool:
    files = _walk(path) if is_folder else [path]
    return any(file.suffix.lower() in EXTENSIONS for file in files)


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """Return what is in a folder and not hidden, and whether it is a folder itself.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in _IGNORED]
            return [(Path(entry.path), entry.is_dir()) for entry in visible]
    except OSError as error:
        raise UserError(f"{printable(error.filename)} cannot be read ({error.strerror}); move it away.") from error


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files under a folder, sub-folders and links included, without what is hidden.

    Raises:
        UserError: a folder is linked into itself, or cannot be read.
    """
    waiting: list[tuple[Path, frozenset[Path]]] = [(folder, frozenset())]
    while waiting:
        parent, above = waiting.pop()
        real = parent.resolve()
        if real in above:
            raise UserError(f"{printable(parent)} is a link to {printable(real)}, which contains it; remove the link.")
        for path, is_folder in _entries(parent):
            if is_folder:
                waiting.append((path, above | {real}))
            else:
                yield path


def list_images(folder: Path) -> list[Path]:
    """Return the image files under a folder, sub-folders included, in the order of their relative paths.

    Raises:
        UserError: there are none, or other files; or a folder is linked into itself.
    """
    images: list[Path] = []
    others: list[Path] = []
    for path in _walk(folder):
        (images if path.suffix.lower() in EXTENSIONS else others).append(path)
    logs = folder / "hydra"  # of the command that sampled them; not a class of this name
    if others and not any(path.is_relative_to(logs) for path in images):
        others = [path for path in others if not path.is_relative_to(logs)]
    if others:
        named = ", ".join(printable(path) for path in sorted(others)[:5])
        raise UserError(
            f"{folder} holds {len(others)} files that are not images: {named}{', ...' * (len(others) > 5)}; "
            f"move them away (images end in {' '.join(EXTENSIONS)})."
        )
    if not images:
        raise UserError(f"{folder} holds no images; put files there that end in {' '.join(EXTENSIONS)}.")
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())


def _read(
    path: Path, size: tuple[int, int], channels: int, resize: bool, convert: bool, for_checkpoint: bool = False
) -> Image.Image:
    """Open a file and return it in mode L or RGB and of size (H, W); those of a data set, or of a checkpoint."""
    prefix, fixed = ("", "the checkpoint's ") if for_checkpoint else ("data.", "data.")
    name = printable(path)
    with Image.open(path) as image:
        has = _CHANNELS.get(image.mode)
        if has is None:
            raise UserError(f"{name} has pixels of mode {image.mode}, not 8 bits per channel; convert it.")
        if has != channels and not convert:
            kind = {1: "grey", 3: "in colour"}[has]
            choice = "" if for_checkpoint else f"data.channels={has} if all images are {kind}, or "
            raise UserError(
                f"{name} is {kind}, but {fixed}channels={channels}; set {choice}{prefix}convert=true to convert those "
                "that are not."
            )
        if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
            raise UserError(f"{name} has transparent pixels; put it on a background first.")
        # Cameras store the orientation as metadata. ImageOps.exif_transpose writes all metadata anew, and fails for
        # other entries that are malformed.
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        upright = image if turn is None else image.transpose(turn)
        if (upright.height, upright.width) != size and not resize:
            raise UserError(
                f"{name} is {upright.height} x {upright.width} pixels (height x width), but {fixed}size={list(size)}; "
                f"set {prefix}resize=true to resize the shorter side and centre-crop."
            )
        upright = upright.convert(_MODES[channels])
    return upright if upright.size == size[::-1] else resize_and_center_crop(upright, size)
