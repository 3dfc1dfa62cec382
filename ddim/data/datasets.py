"""Data sets by name, read into uint8 images as a `DataSpec` describes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from ddim.config import FilePath, choose, suggest
from ddim.data.image_files import FileImages
from ddim.data.image_folder import class_folders, folder_images
from ddim.data.images import Images, MemoryImages
from ddim.data.lsun import LSUNImages
from ddim.data.npz_images import npz_images
from ddim.errors import UserError
from ddim.io import printable

Split = Literal["train", "test"]
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LABELS = {"cifar10": "classes", "digits": "classes", "folder": "folders"}  # what `labels` can be, but for celeba


@dataclass(frozen=True)
class DataSpec:
    """Which images, and how they are prepared.

    Args:
        name: one of DATASETS.
        size: (H, W) in pixels.
        channels: 1 (grey) or 3 (RGB).
        root: folder that holds the data set, or that it is downloaded to; of npz the file.
        flip: mirror training images left to right at random; it is applied to the batches, not to the stored images.
        download: fetch missing files where torchvision can (cifar10, celeba).
        category: of lsun, for example "bedroom".
        resize: of folder: resize the shorter side and centre-crop images of another size, instead of refusing them.
        convert: of folder: convert grey and colour images to `channels`, instead of refusing them.
        in_memory: of celeba and folder: decode all files at the start; false reads them on demand, for large data sets.
        labels: what labels the images: classes (cifar10, digits), folders (folder: one for each class), or the name of
            an attribute (celeba), such as Smiling; None for no labels.

    Raises:
        ValueError: a value out of range, or an option that this data set does not have; a plugin's can have any.
    """

    name: str
    size: tuple[int, int]
    channels: int
    root: FilePath = "data"
    flip: bool = True
    download: bool = True
    category: str | None = None
    resize: bool = False
    convert: bool = False
    in_memory: bool = True
    labels: str | None = None

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"size={list(self.size)} must be two positive numbers of pixels, height and width.")
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels} must be 1 (grey) or 3 (RGB).")
        if self.name not in _OWN:
            return
        if self.category is not None and self.name != "lsun":
            raise ValueError(f"category={self.category} is an option of lsun alone; leave it out for {self.name}.")
        for option in ("resize", "convert"):
            if getattr(self, option) and self.name != "folder":
                raise ValueError(f"{option}=true is an option of folder alone; leave it out for {self.name}.")
        if not self.in_memory and self.name not in ("celeba", "folder"):
            raise ValueError(f"in_memory=false is an option of celeba and folder; leave it out for {self.name}.")
        if self.labels is not None and self.name != "celeba" and self.labels != _LABELS.get(self.name):
            allowed = f"{_LABELS[self.name]} or null" if self.name in _LABELS else "null, it has no labels"
            raise ValueError(f"labels={self.labels} is not known for {self.name}; allowed: {allowed}.")


def load_images(spec: DataSpec, split: Split = "train") -> Images:
    """Read the data set `spec.name`.

    Raises:
        UserError: unknown name or split, a size or number of channels that the data set does not have, files that are
            missing or damaged, or no labels where the spec asks for some.
    """
    if split not in get_args(Split):
        raise UserError(f"split={split!r} is not known; allowed: {', '.join(get_args(Split))}.")
    images = choose("data set", spec.name, DATASETS)(spec, split)
    if spec.labels is not None:
        _check_labels(spec, images)
    return images


def class_names(spec: DataSpec) -> tuple[str, ...]:
    """Return the names of the labels 0, 1, ... of a data set, () without labels; only a plugin's images are read.

    Raises:
        UserError: of class folders: there are fewer than two, or they cannot be read; see `load_images` for a plugin.
    """
    if spec.labels is None:
        return ()
    if spec.name not in _OWN:
        return load_images(spec).classes
    if spec.name == "celeba":
        return (f"not {spec.labels}", spec.labels)
    if spec.name == "folder":
        return tuple(map(printable, class_folders(_root(spec))))
    return CIFAR10_CLASSES if spec.name == "cifar10" else tuple("0123456789")


def cifar10(spec: DataSpec, split: Split) -> Images:
    """CIFAR-10 (Krizhevsky 2009), 50,000 or 10,000 images, 32x32 RGB."""
    _require(spec, spec.size == (32, 32) and spec.channels == 3, "size=[32, 32] and channels=3")
    from torchvision.datasets import CIFAR10

    files = [(name, md5) for name, md5 in CIFAR10.train_list + CIFAR10.test_list]
    files.append((CIFAR10.meta["filename"], CIFAR10.meta["md5"]))
    make = partial(CIFAR10, train=split == "train")
    data = _through_torchvision(spec, make, CIFAR10.base_folder, files, f"unpack {CIFAR10.filename} in {spec.root}")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    return MemoryImages(f"cifar10-{split}", images, *_labels(spec, data.targets))


def celeba(spec: DataSpec, split: Split) -> Images:
    """CelebA (Liu et al. 2015), aligned, with the DDIM paper's crop: 162,770 or 19,962 images, square RGB.

    The crop is the 128x128 pixels around column 89, row 121 (rows 57..184, columns 25..152), resized to `spec.size`
    by Pillow's bilinear filter: `datasets/__init__.py` of the authors' code. Label 1 is images that have the attribute
    `spec.labels`.
    """
    _require(spec, spec.size[0] == spec.size[1] and spec.channels == 3, "a square size and channels=3")
    from torchvision.datasets import CelebA

    archive = "img_align_celeba.zip"
    files = [(name, md5) for _, md5, name in CelebA.file_list if name != archive]
    make = partial(CelebA, split=split, target_type=[])
    advice = f"put them there yourself, with the folder img_align_celeba unpacked from {archive}"
    data = _through_torchvision(spec, make, CelebA.base_folder, files, advice, folder="img_align_celeba")
    attributes = [name for name in data.attr_names if name]
    if spec.labels is not None and spec.labels not in attributes:
        raise UserError(
            f"data.labels={spec.labels} is no attribute of CelebA{suggest(spec.labels, attributes)}; allowed: "
            f"{', '.join(attributes)}."
        )
    labels, classes = _labels(spec, data.attr[:, attributes.index(spec.labels)] if spec.labels else ())
    folder = _root(spec) / CelebA.base_folder / "img_align_celeba"
    images = FileImages(
        name=f"celeba-{split}",
        files=[folder / name for name in data.filename],
        read=partial(_read_celeba, size=spec.size),
        shape=(3, *spec.size),
        transform="rows 57..184 and columns 25..152, bilinear, RGB",
        labels=labels,
        classes=classes,
    )
    return images.load() if spec.in_memory else images


def lsun(spec: DataSpec, split: Split) -> Images:
    """LSUN (Yu et al. 2015), one category from `<root>/<category>_train_lmdb`; split "test" is LSUN's `val`."""
    _require(spec, spec.channels == 3, "channels=3")
    if spec.category is None:
        raise UserError("data.category is missing; name the LSUN category, for example bedroom or church_outdoor.")
    folder = _root(spec) / f"{spec.category}_{'train' if split == 'train' else 'val'}_lmdb"
    return LSUNImages(f"lsun-{spec.category}-{split}", folder, spec.size)


def digits(spec: DataSpec, split: Split) -> Images:
    """Handwritten digits that come with scikit-learn: 1,797 images, 8x8 grey.

    They have no standard split: "train" and "test" are both the whole set. Their 17 grey levels 0..16 become
    round(v * 255 / 16).
    """
    _require(spec, spec.size == (8, 8) and spec.channels == 1, "size=[8, 8] and channels=1")
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = torch.from_numpy(data.images)  # (1797, 8, 8), integers 0..16
    return MemoryImages("digits", (levels * 255 / 16 + 0.5).to(torch.uint8)[:, None], *_labels(spec, data.target))


def folder(spec: DataSpec, split: Split) -> Images:
    """A folder of your own images; see `folder_images`."""
    classes = class_folders(_root(spec)) if spec.labels else ()
    images = folder_images(_root(spec), split, spec.size, spec.channels, spec.resize, spec.convert, classes)
    return images if not spec.in_memory else images.load()


def npz(spec: DataSpec, split: Split) -> Images:
    """Samples of another code base: `arr_0` of an .npz file, uint8 (N, H, W, C) as guided-diffusion writes them."""
    images = npz_images(Path(spec.root))
    channels, *size = images.shape
    _require(spec, (channels, *size) == (spec.channels, *spec.size), f"size={size} and channels={channels}")
    return images


def _labels(spec: DataSpec, labels: Any) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return what `Images` holds of labels, of a sequence of N numbers; nothing where the spec asks for none."""
    return (None, ()) if spec.labels is None else (torch.as_tensor(labels).long(), class_names(spec))


def _check_labels(spec: DataSpec, images: Images) -> None:
    """Refuse images that do not have the labels that a spec asks for; a plugin's may not."""
    labels, N, K = images.labels, len(images), len(images.classes)
    holds = (
        isinstance(labels, Tensor)
        and labels.dtype == torch.int64
        and labels.shape == (N,) != (0,)
        and all(0 <= y < K for y in labels.unique().tolist())
    )
    if not holds:
        raise UserError(
            f"data set {spec.name} gives no labels for data.labels={spec.labels}; its images need `labels`, int64 (N,) "
            "in 0..K-1, and K names in `classes`."
        )


def _root(spec: DataSpec) -> Path:
    """Return the root with ~ expanded.

    Raises:
        UserError: it is a file, such as an archive.
    """
    root = Path(spec.root).expanduser()
    if root.exists() and not root.is_dir():
        raise UserError(f"data.root={spec.root} is not a folder; unpack it if it is an archive, and give the folder.")
    return root


def _require(spec: DataSpec, holds: bool, what: str) -> None:
    if not holds:
        got = f"size={list(spec.size)} and channels={spec.channels}"
        raise UserError(f"data set {spec.name} needs {what}, not {got}.")


def _read_celeba(path: Path, size: tuple[int, int]) -> Image.Image:
    with Image.open(path) as image:
        if image.size != (178, 218):
            raise UserError(f"{path} has {image.size} pixels; CelebA's aligned images are 178 wide and 218 high.")
        return image.convert("RGB").crop((25, 57, 153, 185)).resize(size[::-1], Image.Resampling.BILINEAR)


def _through_torchvision(
    spec: DataSpec,
    make: Callable[..., Any],
    base: str,
    files: list[tuple[str, str]],
    advice: str,
    folder: str | None = None,
) -> Any:
    """Return `make(root, download)`, downloading when files are missing and `spec.download` is true.

    Args:
        spec: for root and download.
        make: a torchvision data set without its first argument.
        base: sub-folder of the root with the files.
        files: (name, MD5) of what must be there.
        advice: how to get the files by hand.
        folder: a folder that must be there too.

    Raises:
        UserError: files are missing or damaged, and downloading is off or failed.
    """
    from filelock import FileLock
    from torchvision.datasets.utils import check_integrity

    root = _root(spec)
    cause: Exception
    try:
        return make(root, download=False)
    except RuntimeError as error:  # torchvision: files are missing or damaged
        why, cause = "data.download=false", error
    if spec.download:
        root.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(root / ".download.lock"):  # the processes of one run start together
                return make(root, download=True)
        except Exception as error:  # of the network, the archive or the downloader
            why, cause = f"the download failed: {error}", error
    absent = [name for name, md5 in files if not check_integrity(root / base / name, md5)]
    if folder is not None and not (root / base / folder).is_dir():
        absent.append(f"{folder}/")
    raise UserError(
        f"{spec.name} lacks these files in {root / base}, or they are damaged: {', '.join(absent)} ({why}); {advice}."
    ) from cause


DATASETS: dict[str, Callable[[DataSpec, Split], Images]] = {
    "cifar10": cifar10,
    "celeba": celeba,
    "lsun": lsun,
    "digits": digits,
    "folder": folder,
    "npz": npz,
}
_OWN = frozenset(DATASETS)  # what a plugin adds decides itself which options it has
