"""Images as uint8 tensors, and the only mapping between pixels and [-1, 1]."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import Dataset


def normalize(images_u8: Tensor) -> Tensor:
    """Map pixels to the range of the diffusion process: x / 127.5 - 1.

    Args:
        images_u8: uint8, any shape, 0..255.

    Returns:
        float32 of the same shape, in [-1, 1].

    Raises:
        TypeError: the images are not uint8.
    """
    if images_u8.dtype != torch.uint8:
        raise TypeError(f"normalize takes uint8 images, not {images_u8.dtype}.")
    return images_u8.float().div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Map samples to pixels: (x + 1) / 2 clamped to [0, 1], times 255, rounded half up as in torchvision's save_image.

    Args:
        x: floating point, any shape; -1 is black and 1 is white, values outside are clamped.

    Returns:
        uint8 of the same shape; `to_uint8(normalize(pixels))` is `pixels`.

    Raises:
        TypeError: x is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"to_uint8 takes floating-point samples, not {x.dtype}.")
    return x.float().add(1.0).div_(2.0).clamp_(0.0, 1.0).mul_(255.0).add_(0.5).to(torch.uint8)


class Images(Dataset[Tensor]):
    """A fixed sequence of images of one shape: `images[i]` is uint8 (C, H, W).

    Attributes:
        name: data set and split, usable in a file name, for example "cifar10-train".
        shape: (C, H, W).
        labels: of the images, int64 (N,) in 0..K-1; None without labels.
        classes: the K names of the labels; () without labels.
    """

    name: str
    shape: tuple[int, int, int]
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor:
        """Return image `index`, uint8 (C, H, W)."""

    def batch(self, indices: Tensor) -> Tensor:
        """Return the images `indices`, int64 (b,), as uint8 (b, C, H, W)."""
        return torch.stack([self[i] for i in indices.tolist()])

    @abstractmethod
    def fingerprint(self) -> str:
        """Return 64 hexadecimal digits that identify the images, whatever their labels."""


class MemoryImages(Images):
    """Images held in one tensor.

    Attributes:
        images: uint8 (N, C, H, W).
    """

    def __init__(self, name: str, images: Tensor, labels: Tensor | None = None, classes: tuple[str, ...] = ()) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) == 0:
            raise ValueError(f"images must be uint8 (N, C, H, W) with N > 0, not {images.dtype} {tuple(images.shape)}.")
        self.name = name
        self.images = images.contiguous()
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]

    def batch(self, indices: Tensor) -> Tensor:
        """See `Images.batch`."""
        return self.images[indices]

    def fingerprint(self) -> str:
        """Return the SHA-256 of the pixels, image after image, each channel by channel and row by row."""
        return hashlib.sha256(self.images.numpy().data).hexdigest()


class LazyImages(Images):
    """Images that are read and decoded on access.

    Attributes:
        transform: description of the preprocessing between the stored image and its pixels here.
    """

    transform: str

    def fingerprint(self) -> str:
        """Return the SHA-256 of the pixels, as for the same images in memory: all of them are read for it."""
        return hash_pixels(self[index] for index in range(len(self)))


def hash_pixels(images: Iterable[Tensor]) -> str:
    """Return the SHA-256 of images, one after the other, each channel by channel and row by row."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.contiguous().numpy().data)
    return digest.hexdigest()
