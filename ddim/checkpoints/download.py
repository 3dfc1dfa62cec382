"""Published files over the network: resumed where they broke off, checked, and there whole or not at all."""

import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from ddim.checkpoints.published import Published, checksums
from ddim.errors import UserError

_BLOCK = 1 << 18  # bytes
_TIMEOUT = 30  # seconds without a byte


def fetch(published: Published, folder: Path) -> Path:
    """Return the path of a published file in `folder`, after fetching what is not there yet.

    A download that broke off goes on where it stopped, if the server can do that. Its bytes lie in a file of the
    same name with `.part` behind it until all are there and their checksum is right.

    Raises:
        UserError: no connection, or another file than the published one.
    """
    path = folder / published.file_name
    if path.exists():
        _check(path, published, "move it away to fetch it again")
        return path
    part = path.with_name(f"{path.name}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _download(published.url, part)
    except urllib.error.HTTPError as error:
        raise _by_hand(published, path, f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise _by_hand(published, path, str(reason)) from error
    try:
        _check(part, published, "run the command again")
    except UserError:
        part.unlink()  # going on from it would never mend it
        raise
    part.replace(path)
    return path


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
        if error.code != 416:  # nothing is left to send: it broke off at the very end
            raise
        error.close()
        return
    with response:
        if response.status != 206:  # the server sends the whole file again
            present = 0
        length = response.headers.get("Content-Length")
        total = present + int(length) if length else None
        bar = tqdm(
            total=total, initial=present, unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem, disable=None
        )
        with part.open("ab" if present else "wb") as file, bar:
            while block := response.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and part.stat().st_size < total:
            raise http.client.IncompleteRead(b"")


def _check(path: Path, published: Published, advice: str) -> None:
    sums = checksums(path)
    if published.checksum not in (sums.md5, sums.sha256):
        raise UserError(
            f"{path} is not the published {published.name}: its MD5 is {sums.md5}, that of the published file "
            f"{published.checksum}; {advice}."
        )


def _by_hand(published: Published, path: Path, reason: str) -> UserError:
    return UserError(
        f"{published.name} cannot be fetched ({reason}). Run the command again to go on with it; or fetch it by hand "
        f"from {published.url}, name it {path.name}, put it into {path.parent.resolve()}, and run the command again."
    )
