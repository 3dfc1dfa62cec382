"""A file of times: JSON with `tau` and the `T` that they belong to, as scripts/search_tau.py writes it."""

from typing import NamedTuple

from ddim.diffusion.json_file import read_json
from ddim.diffusion.timesteps import explicit_tau

SUFFIX = ".json"


class TauFile(NamedTuple):
    """What decides the times; the file states besides where they come from.

    Attributes:
        T: of the schedule.
        tau: increasing, in 1..T.
    """

    T: int
    tau: tuple[int, ...]


def read_tau(path: str) -> TauFile:
    """Read a file of times.

    Raises:
        ValueError: there is no such file, or it holds no times in 1..T.
    """
    try:
        content = read_json(path)
        T, tau = content["T"], content["tau"]
        if not all(type(number) is int for number in (T, *tau)):
            raise TypeError("T and tau must be integers")
        return TauFile(T, explicit_tau(T, tau))
    except OSError as error:
        raise ValueError(
            f"spacing={path} cannot be read ({error.strerror}); scripts/search_tau.py writes one."
        ) from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise ValueError(
            f"spacing={path} is no file of times, or damaged ({reason}); scripts/search_tau.py writes one."
        ) from error
