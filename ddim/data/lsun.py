"""LSUN: one LMDB folder per category and split, read on demand."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddim.data.image_files import explain_damage, resize_and_center_crop, to_array
from ddim.data.images import LazyImages
from ddim.errors import UserError
from ddim.io import check_regular_file, printable

FINGERPRINT_FILES = 1000  # evenly spaced, which are hashed
_ENVIRONMENTS: dict[Path, Any] = {}  # the databases that are open: lmdb opens none twice in a process
_SPARE_PAGES = 16  # that were allocated last and never written, which an intact database may lack


class LSUNImages(LazyImages):
    """The images of one LSUN database: RGB, shorter side resized to `size`, centre-cropped.

    torchvision's LSUN is not used: it writes a pickle with the keys to the current directory, loads it the next time
    without a check, and cannot be pickled for worker processes.

    Args:
        name: see `Images`.
        folder: the LMDB folder, for example data/lsun/bedroom_train_lmdb.
        size: (H, W).

    Raises:
        UserError: the package lmdb or the folder is missing, or the database is damaged.
    """

    transform = "shorter side bilinear, centre crop, RGB"

    def __init__(self, name: str, folder: Path, size: tuple[int, int]) -> None:
        check_regular_file(folder / "data.mdb", "LSUN database")
        if not (folder / "data.mdb").exists():
            raise UserError(
                f"the LSUN database {folder / 'data.mdb'} does not exist; download {folder.name}.zip with the data "
                "set's own script and unzip it there, or use data=folder."
            )
        self.name, self.shape = name, (3, *size)
        self._folder, self._resolved = folder, folder.resolve()
        with self._whole() as transaction:
            # an array, because worker processes would copy a list of millions of objects page by page
            self._keys = np.array(list(transaction.cursor().iternext(keys=True, values=False)))
        if len(self._keys) == 0:
            raise UserError(f"the LSUN database {folder} is empty; download it again.")

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Tensor:
        key = bytes(self._keys[index])
        with explain_damage(f"the image {printable(key.decode(errors='replace'))} of the LSUN database {self._folder}"):
            with self._open().begin(buffers=True) as transaction:
                image = Image.open(io.BytesIO(transaction.get(key))).convert("RGB")
            return torch.from_numpy(to_array(resize_and_center_crop(image, self.shape[1:])))

    def fingerprint(self) -> str:
        """Return the SHA-256 of name, shape, transform, all keys, and some files: all are too many to read."""
        digest = hashlib.sha256(f"{self.name}|{len(self)}|{self.shape}|{self.transform}|".encode())
        digest.update(self._keys.tobytes())
        with self._whole() as transaction:
            for key in self._keys[:: -(-len(self) // FINGERPRINT_FILES)]:
                digest.update(transaction.get(bytes(key)))
        return digest.hexdigest()

    @property
    def earlier_fingerprint(self) -> str:
        """The fingerprint of earlier code, which trainings of that time state; it did not depend on the images."""
        return hashlib.sha256(f"{self.name}|{len(self)}|{self.shape}|{self.transform}".encode()).hexdigest()

    def close(self) -> None:
        """Close the database, for all that read it in this process; reading an image opens it again."""
        if (environment := _ENVIRONMENTS.pop(self._resolved, None)) is not None:
            environment.close()

    @contextmanager
    def _whole(self) -> Iterator[Any]:
        """A transaction that reads much; then the database is as open as before: forked workers open it themselves."""
        was_open = self._resolved in _ENVIRONMENTS
        try:
            with explain_damage(f"the LSUN database {self._folder}"), self._open().begin() as transaction:
                yield transaction
        finally:
            if not was_open:
                self.close()

    def _open(self) -> Any:
        if (environment := _ENVIRONMENTS.get(self._resolved)) is None:
            try:
                import lmdb
            except ImportError as error:
                raise UserError("reading LSUN needs the package lmdb; install ddim with the extra 'lsun'.") from error
            # Without locks: works on read-only media and in forked processes.
            environment = lmdb.open(str(self._folder), readonly=True, lock=False, readahead=False, meminit=False)
            pages = (self._folder / "data.mdb").stat().st_size // environment.stat()["psize"]
            if environment.info()["last_pgno"] - pages > _SPARE_PAGES:  # reading a missing page ends the process
                environment.close()
                raise UserError(f"the LSUN database {self._folder} is cut short; copy or download it again.")
            _ENVIRONMENTS[self._resolved] = environment
        return environment
