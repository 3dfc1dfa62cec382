"""Image files: read all at once into memory, or on demand."""

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim.data.images import LazyImages, MemoryImages, hash_pixels
from ddim.errors import UserError
from ddim.io import atomic_write, check_regular_file, explain_content, printable

log = logging.getLogger(__name__)
_SHOW_PROGRESS_ABOVE = 5000  # files
_DECODED_AT_ONCE = 1024  # files, so that only these are in memory
_CLOCK_TICK = 2_000_000_000  # nanoseconds; no file system's times are coarser
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
        labels, classes: see `Images`.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        read: Callable[[Path], Image.Image],
        shape: tuple[int, int, int],
        transform: str,
        labels: Tensor | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.name, self.files, self.shape, self.transform = name, files, shape, transform
        self._read, self.labels, self.classes = read, labels, classes

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
        """Return the SHA-256 of the pixels, as for the same images in memory.

        All files are decoded for it. The result is kept in `~/.cache/torch/ddim` (TORCH_HOME moves it) for as long as
        no file has another size or time of its last change.

        Raises:
            UserError: a file cannot be decoded.
        """
        state = hashlib.sha256(f"{self.shape}|{self.transform}|{PIL.__version__}".encode())
        newest = 0
        for file in self.files:
            if file.exists():  # otherwise decoding names it
                stat = file.stat()
                newest = max(newest, stat.st_ctime_ns)
                state.update(
                    f"|{file.absolute()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}".encode(
                        errors="surrogateescape"
                    )
                )
        kept = Path(torch.hub.get_dir()).parent / "ddim" / "fingerprints" / state.hexdigest()
        before = kept.read_text(encoding="ascii", errors="replace") if os.access(kept, os.R_OK) else ""
        if len(before) == 64:
            return before
        settled = time.time_ns() - newest > _CLOCK_TICK  # else a later change might leave the times as they are
        fingerprint = hash_pixels(self._decode_all())
        try:
            if settled:
                with atomic_write(kept) as partial:
                    partial.write_text(fingerprint, encoding="ascii")
        except OSError as error:
            log.warning(
                "the fingerprint of %s cannot be kept (%s); it is computed again at the next start", self.name, error
            )
        return fingerprint

    def load(self) -> MemoryImages:
        """Decode every file into memory, in threads, with a progress bar on a terminal when there are many.

        Raises:
            UserError: some files cannot be decoded, or `read` refused them; the message gives their number and the
                first five.
        """
        pixels = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        for index, image in enumerate(self._decode_all()):
            pixels[index] = image
        return MemoryImages(self.name, pixels, self.labels, self.classes)

    def _decode_all(self) -> Iterator[Tensor]:
        """Yield all images, in order.

        Raises:
            UserError: see `load`; as many as are decoded at once end the search for more.
        """
        errors: dict[Path, UserError] = {}

        def decode(index: int) -> Tensor | None:
            try:
                return self[index]
            except UserError as error:
                errors[self.files[index]] = error
                return None

        hidden = None if len(self) > _SHOW_PROGRESS_ABOVE else True  # None: hidden unless stderr is a terminal
        with ThreadPoolExecutor() as pool, tqdm(desc=self.name, total=len(self), unit="image", disable=hidden) as bar:
            for first in range(0, len(self), _DECODED_AT_ONCE):
                for image in pool.map(decode, range(first, min(first + _DECODED_AT_ONCE, len(self)))):
                    if image is not None:
                        yield image
                    bar.update()
                if len(errors) >= _DECODED_AT_ONCE:
                    break
        if errors:
            raise _summary(errors, len(self))


def _summary(errors: Mapping[Path, UserError], count: int) -> UserError:
    """Return one error for those of some of `count` files."""
    files = sorted(errors)
    if len(files) == 1:
        return errors[files[0]]
    at_least = "at least " * (len(files) >= _DECODED_AT_ONCE)  # where decoding has ended
    number, more = f"{at_least}{len(files)} of {count} image files", len(files) > 5
    if all(isinstance(error, DamagedImage) for error in errors.values()):
        names = ", ".join(map(printable, files[:5]))
        return UserError(f"{number} cannot be read: {names}{', ...' * more}; replace or remove them.")
    reasons = "; ".join(str(errors[file]).rstrip(".") for file in files[:5])
    return UserError(f"{number} cannot be used: {reasons}{'; and others' * more}.")
