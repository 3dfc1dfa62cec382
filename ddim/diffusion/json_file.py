"""JSON files that a sampler is given by name: times (`tau_file`), variances (`analytic`)."""

import errno
import json
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 24  # of a file; a thousand times take a tenth of a megabyte


def read_json(file: str) -> Any:
    """Return the content of a JSON file; ~ in its path is expanded.

    Raises:
        OSError: it cannot be read, or is a fifo or device, which would be read for ever.
        ValueError: it is no JSON, or larger than 16 MiB.
        RecursionError: it is nested too deeply.
    """
    path = Path(file).expanduser()
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is no regular file")
    with path.open("rb") as stream:
        return json.loads(stream.read(MOST_BYTES))
