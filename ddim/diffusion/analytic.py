"""The optimal variance of the reverse step, estimated from data (Bao et al. 2022, Analytic-DPM).

Given x_0 and x_t, the paper's step to x_s (Eq. 12 with the true x_0 and ε) is

    x_s = sqrt(a_s) x_0 + sqrt(1 - a_s - λ²) (x_t - sqrt(a_t) x_0) / sqrt(1 - a_t) + λ z,     λ = σ of Eq. 16.

A sampler knows x_t alone, of which x_0 is a random function. The Gaussian with one variance for all dimensions that is
nearest to q(x_s | x_t) in the Kullback-Leibler divergence, on average over x_t, has its mean and its mean variance. The
mean is Eq. 12 itself, if the network is exact: x̂0 = E[x_0 | x_t]. The variance is that of λ z and of what x_s takes
over from x_0 - x̂0, with the factor sqrt(a_s) - sqrt(1 - a_s - λ²) sqrt(a_t / (1 - a_t)). By Eq. 9 this difference is
sqrt((1 - a_t) / a_t) (ε̂ - ε), and by ε̂ = E[ε | x_t] its mean square for each of the d dimensions is

    E||ε - ε̂||² / d = E||ε||² / d - E||ε̂||² / d = 1 - m_t,     m_t = E||ε̂(x_t, t)||² / d.

Together, as their Theorem 1 (their β̄_n E||∇ log q||² is our E||ε̂||²; their α_n is our a_t / a_s):

    variance = λ² + (sqrt((1 - a_t) a_s / a_t) - sqrt(1 - a_s - λ²))² (1 - m_t).

An exact network has 0 <= m_t <= 1, which bounds the variance (their Theorem 2); an estimate can lie outside.
"""

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ddim.diffusion.json_file import read_json
from ddim.diffusion.objective import q_sample
from ddim.diffusion.prediction import PREDICTIONS, split_output
from ddim.diffusion.rules import DDIM, Coefficients, Rule, posterior_std
from ddim.diffusion.sampling import Model
from ddim.diffusion.schedule import NoiseSchedule
from ddim.random import VARIANCE, gaussian

Table = Sequence[tuple[float, float]]  # (alpha_bar, m_t) of each time, alpha_bar increasing

_ROUNDING = 1e-9  # relative; a schedule may be computed on another machine


@dataclass(frozen=True)
class AnalyticVariance(Rule):
    """DDIM's mean with the optimal variance: Analytic-DDPM (eta=1) and Analytic-DDIM (eta=0), which adds noise too.

    The step to a_s = 1 adds none, and neither does a step between equal levels. A clip policy other than `none` changes
    x̂0, for which the variance is then not the optimal one.

    Attributes:
        eta: η in [0, 1], which decides λ.
        table: (alpha_bar, m_t) of each time that a step can start at, alpha_bar increasing in [0, 1).
        weights_hash: SHA-256 of the weights that m_t was estimated with; None where it is not known.
        clip_bound: limit m_t to [0, 1], so that the variance lies between its bounds.

    Raises:
        ValueError: eta outside [0, 1], clip_bound that is no bool, or no such table.
    """

    eta: float = 1.0
    table: Table = field(default=(), repr=False)
    weights_hash: str | None = field(default=None, repr=False)
    clip_bound: bool = True

    def __post_init__(self) -> None:
        DDIM(self.eta)  # checks η
        if not isinstance(self.clip_bound, bool):
            raise ValueError(f"clip_bound={self.clip_bound!r} must be true or false.")
        _check_table(self.table)

    @classmethod
    def from_file(cls, eta: float = 1.0, file: str | None = None, clip_bound: bool = True) -> "AnalyticVariance":
        """Return the rule with the table of a file that scripts/estimate_variance.py wrote; see `read_table`."""
        return cls(eta, *read_table(file), clip_bound=clip_bound)

    @property
    def table_hash(self) -> str:
        """SHA-256 of the table, 64 hexadecimal digits."""
        return table_hash(self.table)

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the factors of Eq. 12 and the optimal standard deviation; there are no upward steps.

        Raises:
            ValueError: a step up, a level that the table lacks, or a variance below 0.
        """
        a_t = levels[0]
        posterior_std(a_t, a_s, "analytic")  # refuses steps up
        c = DDIM(self.eta).coefficients(levels, a_s)
        if a_s in (1, a_t):
            return c
        variance = c.noise**2 + (math.sqrt((1 - a_t) * a_s / a_t) - c.eps) ** 2 * (1 - self._mean_square(a_t))
        if variance < 0:
            raise ValueError(
                f"the variance of the step from alpha_bar={a_t} to {a_s} is {variance:.3g}, since E||ε̂||²/d exceeds 1 "
                "there; set clip_bound=true, or estimate it from more images."
            )
        return c._replace(noise=math.sqrt(variance))

    def _mean_square(self, a_t: float) -> float:
        i = bisect_left(self.table, (a_t * (1 - _ROUNDING), -math.inf))
        if i == len(self.table) or not math.isclose(self.table[i][0], a_t, rel_tol=_ROUNDING):
            raise ValueError(
                f"the variance at alpha_bar={a_t} was not estimated: the file is of another schedule, or of other "
                "times; run scripts/estimate_variance.py for this checkpoint and all times."
            )
        m = self.table[i][1]
        return min(m, 1.0) if self.clip_bound else m


def read_table(file: str | None) -> tuple[Table, str]:
    """Return the table in a file that scripts/estimate_variance.py wrote, and the hash of the weights.

    Args:
        file: its path; ~ is expanded.

    Raises:
        ValueError: there is no such file, or it is damaged or of another kind.
    """
    if not isinstance(file, str) or not file:
        raise ValueError(f"analytic needs file=PATH, which scripts/estimate_variance.py writes, not file={file!r}.")
    if not Path(file).expanduser().is_file():  # nor a fifo, which would be read for ever
        raise ValueError(f"file={file} does not exist or is no regular file; scripts/estimate_variance.py writes one.")
    try:
        content = read_json(file)
        levels, squares = ([float(x) for x in content[key]] for key in ("alpha_bar", "mean_square"))
        table = tuple(sorted(zip(levels, squares, strict=True)))
        _check_table(table)
        if content["hash"] != table_hash(table):
            raise ValueError("the numbers are not those of the hash")
        return table, str(content["weights_hash"])
    except OSError as error:
        raise ValueError(f"file={file} cannot be read ({error.strerror}); choose another file.") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].rstrip(".")
        raise ValueError(
            f"file={file} was not written by scripts/estimate_variance.py, or is damaged ({reason}); estimate again."
        ) from error


def _check_table(table: Table) -> None:
    levels = [a for a, _ in table]
    if not levels or not all(0 <= a < 1 for a in levels) or not all(a < b for a, b in pairwise(levels)):
        raise ValueError("the table must have at least one level alpha_bar, and they must increase in [0, 1)")
    if wrong := [m for _, m in table if not 0 <= m < math.inf]:
        raise ValueError(f"a mean square of ε̂ is {wrong[0]}, but must be finite and not negative")


def table_hash(table: Table) -> str:
    """Return the SHA-256 of (alpha_bar, m_t) of each time, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(table)).encode()).hexdigest()


@torch.no_grad()
def mean_squares(
    model: Model,
    schedule: NoiseSchedule,
    x0: Tensor,
    times: Sequence[int],
    *,
    prediction: str = "eps",
    seed: int = 0,
    indices: Sequence[int] | Tensor,
) -> Tensor:
    """Return ||ε̂(x_t, t)||² / d of each image at each time, float64 (B, len(times)), whose mean over images is m_t.

    Args:
        model, schedule, prediction: as in `ddim.diffusion.sampling.trajectory`.
        x0: images in [-1, 1], (B, C, H, W).
        times: in 1..T.
        seed, indices: decide the noise in x_t (Eq. 4): that of image indices[i] is a function of (seed, t, indices[i]).
    """
    addresses = torch.as_tensor(indices, dtype=torch.int64, device=x0.device)
    columns = []
    for t in times:
        a_t = schedule.alpha_bar[t].to(x0.device)
        x_t = q_sample(x0, gaussian(seed, VARIANCE, t, addresses, x0.shape[1:]).to(x0.dtype), a_t)
        output, _ = split_output(model(x_t, torch.full((len(x_t),), t, device=x_t.device)).to(x_t.dtype), x_t)
        eps = PREDICTIONS[prediction].eps(output, x_t, schedule[t])
        columns.append(eps.double().square().flatten(1).mean(1))
    return torch.stack(columns, 1)
