"""Download of published weights: resumed where it stopped, verified, atomic, one process at a time.

Own code because no library we use does all of this: torch.hub does not resume and knows no MD5, pooch does not resume.
"""

import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from ddim.checkpoints.convert.model_zoo import PublishedFile, file_checksums
from ddim.errors import UserError
from ddim.io import check_regular_file

_BLOCK = 1 << 18  # bytes
TIMEOUT = 30  # seconds without a byte


def fetch(published: PublishedFile, folder: Path) -> Path:
    """Return the path of a published file in `folder`; download it first if it is not there.

    An unfinished download is kept as NAME.part and resumed by the next call if the server supports ranges. The file
    gets its name after its checksum was verified. If several processes request the same file, one downloads it and the
    others wait.

    Raises:
        UserError: no connection, a file with another checksum, or a folder that cannot be written to.
    """
    path = folder / published.file_name
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{path.name}.lock"):
                if not path.exists():
                    _download_and_verify(published, path)
                    return path
        _verify(path, published, "move it away to download it again")
    except urllib.error.HTTPError as error:
        error.close()
        raise _manual_download(published, path, f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        raise _manual_download(published, path, reason) from error
    return path


def _download_and_verify(published: PublishedFile, path: Path) -> None:
    part = path.with_name(f"{path.name}.part")
    _download(published.url, part)
    try:
        _verify(part, published, f"it was removed; run the command again, or check what {published.url} sends")
    except UserError:
        part.unlink()  # resuming from wrong bytes would fail every time
        raise
    part.replace(path)


def _download(url: str, part: Path) -> None:
    """Append the missing bytes to `part`.

    Raises:
        OSError, http.client.HTTPException: the connection failed or broke off.
    """
    check_regular_file(part, "unfinished download")
    present = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={present}-"} if present else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if not (present and error.code == 416):  # range not satisfiable: all bytes are there already
            raise
        error.close()
        return
    with response:
        if response.status != 206:  # no partial content: the server sends the file from its start
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


def _verify(path: Path, published: PublishedFile, advice: str) -> None:
    sums = file_checksums(path)
    kind, actual = ("MD5", sums.md5) if len(published.checksum) == len(sums.md5) else ("SHA-256", sums.sha256)
    if actual != published.checksum:
        raise UserError(
            f"{path} is not the published {published.name}: its {kind} is {actual}, that of the published file "
            f"{published.checksum}; {advice}."
        )


def _manual_download(published: PublishedFile, path: Path, reason: str) -> UserError:
    sentence = re.split(r"\.\s|\n", reason.strip())[0].rstrip(".")  # the first of several
    return UserError(
        f"{published.name} cannot be downloaded ({sentence}); run the command again to resume, or download "
        f"{published.url} by hand, name it {path.name}, put it into {path.parent.resolve()} and run the command again."
    )
