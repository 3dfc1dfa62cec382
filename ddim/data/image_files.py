"""Image files: read all at once into memory, or on demand."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim.data.images import LazyImages, MemoryImages
from ddim.errors import UserError
from ddim.io import check_regular_file, explain_content, printable

_SHOW_PROGRESS_ABOVE = 5000  # files
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # of one image; Pillow opens none that is larger


class DamagedImage(UserError):
    """The content of an image file cannot be decoded."""


@contextmanager
def explain_damage(what: str, file: Path | None = None) -> Iterator[None]:
    """Turn whatever Pillow raises in the block on a damaged image into one sentence.

    Args:
        what: names the image, for the message.
        file: that holds it and nothing else, if there is one.

    Raises:
        DamagedImage: the image cannot be decoded.
        UserError: it has too many pixels, or the block refused it.
    """
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{what} has more than {_MAX_PIXELS:,} pixels, the most that are read; scale it down."
        ) from error
    except Exception as error:  # a damaged file can make a decoder raise anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        reason = (explain_content(file) if file else "") or reason
        raise DamagedImage(f"{what} cannot be read ({reason}); replace it.") from error


def resize_and_center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale `image` to the smallest size that covers `size` = (H, W), with Pillow's bilinear filter; crop the centre.

    For a square size this is torchvision's Resize(size) followed by CenterCrop(size).

    Raises:
        ValueError: the image is so long and narrow that it would have too many pixels.
    """
    height, width = size
    if image.width * height <= image.height * width:  # the width decides
        scaled = (width, image.height * width // image.width)
    else:
        scaled = (image.width * height // image.height, height)
    if scaled[0] * scaled[1] > _MAX_PIXELS:
        raise ValueError(f"{image.height} x {image.width} pixels are too narrow to cover {height} x {width}")
    image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_array(image: Image.Image) -> np.ndarray:
    """Return a grey or RGB image as uint8 (C, H, W)."""
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class FileImages(LazyImages):
    """Images with one file each.

    Args:
        name: see `Images`.
        files: one per image.
        read: opens a file and returns the prepared image, grey or RGB and of the size in `shape`. What Pillow raises on
            a damaged file becomes a DamagedImage here.
        shape: (C, H, W).
        transform: see `LazyImages`.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        read: Callable[[Path], Image.Image],
        shape: tuple[int, int, int],
        transform: str,
    ) -> None:
        self.name, self.files, self.shape, self.transform = name, files, shape, transform
        self._read = read

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self._decode(self.files[index]))

    def _decode(self, file: Path) -> np.ndarray:
        """Return an image, uint8 (C, H, W).

        Raises:
            DamagedImage: the file cannot be decoded.
            UserError: `read` refused it, or it is no regular file.
        """
        check_regular_file(file, "image")
        with explain_damage(f"the image file {printable(file)}", file):
            return to_array(self._read(file))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the description of the images and of the name and size of each file."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for file in self.files:
            with explain_damage(f"the image file {printable(file)}", file):
                name_and_size = f"|{file.name}|{file.stat().st_size}"
            digest.update(name_and_size.encode(errors="surrogateescape"))  # a name may be no UTF-8
        return digest.hexdigest()

    def load(self) -> MemoryImages:
        """Decode every file into memory, in threads, with a progress bar on a terminal when there are many.

        Raises:
            UserError: `read` refused a file, or some cannot be decoded; the message gives their number and five names.
        """
        pixels = np.empty((len(self), *self.shape), dtype=np.uint8)
        damaged: dict[Path, DamagedImage] = {}

        def decode(index: int) -> None:
            try:
                pixels[index] = self._decode(self.files[index])
            except DamagedImage as error:
                damaged[self.files[index]] = error

        with ThreadPoolExecutor() as pool:
            hidden = None if len(self) > _SHOW_PROGRESS_ABOVE else True  # None: hidden unless stderr is a terminal
            for _ in tqdm(pool.map(decode, range(len(self))), self.name, len(self), unit="image", disable=hidden):
                pass
        if len(damaged) == 1:
            raise next(iter(damaged.values()))
        if damaged:
            first = ", ".join(printable(file) for file in sorted(damaged)[:5])
            raise UserError(
                f"{len(damaged)} of {len(self)} image files cannot be read: {first}"
                f"{', ...' * (len(damaged) > 5)}; replace or remove them."
            )
        return MemoryImages(self.name, torch.from_numpy(pixels))
