"""Published files over the network: resumed where they broke off, checked, and there whole or not at all."""

import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from ddim.checkpoints.convert.model_zoo import Published, checksums
from ddim.errors import UserError

_BLOCK = 1 << 18  # bytes
_TIMEOUT = 30  # seconds without a byte


def fetch(published: Published, folder: Path) -> Path:
    """Return the path of a published file in `folder`, after fetching what is not there yet.

    A download that broke off goes on where it stopped, if the server can do that. Its bytes lie in a file of the
    same name with `.part` behind it until all are there and their checksum is right. Of several processes that fetch
    the same file one does, and the others wait for it.

    Raises:
        UserError: no connection, another file than the published one, or a folder that cannot be written to.
    """
    path = folder / published.file_name
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{path.name}.lock"):
                if not path.exists():
                    _fetch(published, path)
                    return path
        _check(path, published, "move it away to fetch it again")
    except urllib.error.HTTPError as error:
        error.close()
        raise _by_hand(published, path, f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        raise _by_hand(published, path, reason) from error
    return path


def _fetch(published: Published, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    _download(published.url, part)
    try:
        _check(part, published, f"it is removed; run the command again, or see what {published.url} sends")
    except UserError:
        part.unlink()  # going on from it would never mend it
        raise
    part.replace(path)


def _download(url: str, part: Path) -> None:
    """Append to `part` what is missing of it.

    Raises:
        OSError, http.client.HTTPException: the connection failed, or broke off.
    """
    present = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={present}-"} if present else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if not (present and error.code == 416):  # nothing is left to send: it broke off at the very end
            raise
        error.close()
        return
    with response:
        if response.status != 206:  # the server sends the whole file again
            present = 0
        total = None if response.length is None else present + response.length
        bar = tqdm(
            total=total, initial=present, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem, disable=None
        )
        with part.open("ab" if present else "wb") as file, bar:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        size = part.stat().st_size
        if total is not None and size < total:
            raise ConnectionError(f"the connection broke off after {size:,} of {total:,} bytes")


def _check(path: Path, published: Published, advice: str) -> None:
    sums = checksums(path)
    kind, found = ("MD5", sums.md5) if len(published.checksum) == len(sums.md5) else ("SHA-256", sums.sha256)
    if found != published.checksum:
        raise UserError(
            f"{path} is not the published {published.name}: its {kind} is {found}, that of the published file "
            f"{published.checksum}; {advice}."
        )


def _by_hand(published: Published, path: Path, reason: str) -> UserError:
    sentence = re.split(r"\.\s|\n", reason.strip())[0].rstrip(".")  # some have several
    return UserError(
        f"{published.name} cannot be fetched ({sentence}); run the command again to go on with it, or fetch it by hand "
        f"from {published.url}, name it {path.name}, put it into {path.parent.resolve()} and run the command again."
    )
