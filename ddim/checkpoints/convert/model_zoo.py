"""Published models: the architectures of the papers, and the files of weights with their checksums.

Sources: Ho et al. 2020, appendix B, and the configurations and download table of the official implementation, whose
CIFAR-10 and LSUN weights are Ho et al.'s, converted to PyTorch by P. Esser.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ddim.io import check_regular_file
from ddim.networks import UNetSpec

# The same as configs/network/unet_*.yaml at the sizes of configs/data; a test compares them.
PRESETS: dict[str, UNetSpec] = {
    "cifar10": UNetSpec((32, 32), ch_mult=(1, 2, 2, 2), dropout=0.1),
    "celeba": UNetSpec((64, 64), ch_mult=(1, 2, 2, 2, 4), dropout=0.1),
    "lsun": UNetSpec((256, 256), ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0),
}


@dataclass(frozen=True)
class PublishedFile:
    """A published file of weights.

    Attributes:
        name: its name in this project.
        weights: which weights it holds, "ema" or "online".
        data: the training set.
        step: number of optimiser steps; None if unknown.
        checksum: of the file: MD5 (32 hexadecimal digits) or SHA-256 (64).
        url: for a direct download; "" if there is none.
    """

    name: str
    weights: Literal["ema", "online"]
    data: str
    step: int | None
    checksum: str
    url: str = ""

    @property
    def file_name(self) -> str:
        """The name of the downloaded file."""
        return f"{self.name}.ckpt"


def _heibox(name: str, data: str, step: int, md5: str, share: str) -> PublishedFile:
    weights: Literal["ema", "online"] = "ema" if name.startswith("ema_") else "online"
    return PublishedFile(name, weights, data, step, md5, f"https://heibox.uni-heidelberg.de/f/{share}/?dl=1")


DOWNLOADS: dict[str, PublishedFile] = {
    file.name: file
    for file in (
        _heibox("ema_cifar10", "cifar10", 790_000, "1fa350b952534ae442b1d5235cce5cd3", "2e4f01e2d9ee49bab1d5"),
        _heibox("cifar10", "cifar10", 790_000, "82ed3067fd1002f5cf4c339fb80c4669", "869980b53bf5416c8a28"),
        _heibox(
            "ema_lsun_bedroom", "lsun_bedroom", 2_388_000, "1921fa46b66a3665e450e42f36c2720f", "b95206528f384185889b"
        ),
        _heibox("lsun_bedroom", "lsun_bedroom", 2_388_000, "f70280ac0e08b8e696f42cb8e948ff1c", "f179d4f21ebc4d43bbfe"),
        _heibox("ema_lsun_cat", "lsun_cat", 1_761_000, "646f23f4821f2459b8bafc57fd824558", "0701aac3aa69457bbe34"),
        _heibox("lsun_cat", "lsun_cat", 1_761_000, "bbee0e7c3d7abfb6e2539eaf2fb9987b", "fac870bd988348eab88e"),
        _heibox(
            "ema_lsun_church", "lsun_church", 4_432_000, "fdc68a23938c2397caba4a260bc2445f", "44ccb50ef3c6436db52e"
        ),
        _heibox("lsun_church", "lsun_church", 4_432_000, "eb619b8a5ab95ef80f94ce8a5488dae3", "2711a6f712e34b06b9d8"),
    )
}

# The official implementation's training checkpoint for CelebA. Its host asks for a confirmation in the browser; no
# checksum is published.
MANUAL_DOWNLOADS = {"celeba": "https://drive.google.com/file/d/1R_H-fJYXSH79wfSKs9D-fuKQVan5L-GR/view"}

# One upload in two formats, with the SHA-256 that the hub shows. These are online weights: evaluations report an FID
# of 12.4, close to the 12.1 of the online file above; the EMA weights give 3.2.
HUB_ONLINE_CIFAR10 = "ddpm-cifar10-32"
HUB_FILES = [
    PublishedFile(f"google/{HUB_ONLINE_CIFAR10} ({suffix})", "online", "cifar10", None, sha256)
    for suffix, sha256 in (
        ("safetensors", "1558dbe3fb093b0857d473e376b711eeda1b186c557be5e85b3a56300cd49f0f"),
        ("bin", "ac3416a548879738893e935b42cab9119f51745b62bec4b6d8375e4d86e98ea4"),
    )
]
KNOWN_FILES = {file.checksum: file for file in (*DOWNLOADS.values(), *HUB_FILES)}


@dataclass(frozen=True)
class Checksums:
    """The checksums of a file, in hexadecimal digits."""

    md5: str
    sha256: str

    @property
    def published(self) -> PublishedFile | None:
        """The published file with one of these checksums, or None."""
        return KNOWN_FILES.get(self.md5) or KNOWN_FILES.get(self.sha256)


def file_checksums(*paths: Path) -> Checksums:
    """Return both checksums of a file, or of several one after the other; each is read once.

    Raises:
        UserError: a path is no regular file.
    """
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    for path in paths:
        check_regular_file(path, "checkpoint")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                md5.update(block)
                sha256.update(block)
    return Checksums(md5.hexdigest(), sha256.hexdigest())
