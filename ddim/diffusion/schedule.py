"""Noise schedules: the tensor alpha_bar, from which every coefficient of the method follows.

`alpha_bar[t]` is DDPM's product of (1 - beta), which the DDIM paper calls alpha_t and diffusers calls `alphas_cumprod`:

    x_t = sqrt(alpha_bar[t]) x_0 + sqrt(1 - alpha_bar[t]) eps                                    (paper, Eq. 4)

Times run 1..T and 0 is data, so `alpha_bar[0] = 1` exactly. Everything is float64.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A decreasing sequence of noise levels.

    Attributes:
        alpha_bar: float64 (T+1,), alpha_bar[0] = 1, strictly decreasing, positive; alpha_bar[T] may be 0, zero terminal
            SNR: x_T is then noise and nothing else.
        name: how it was made; stored with every result.

    Raises:
        ValueError: alpha_bar is not such a tensor.
    """

    alpha_bar: Tensor
    name: str = "custom"

    def __post_init__(self) -> None:
        a = self.alpha_bar
        if a.ndim != 1 or a.dtype != torch.float64 or len(a) < 2:
            raise ValueError(f"alpha_bar must be float64 of shape (T+1,), not {a.dtype} of shape {tuple(a.shape)}.")
        if a[0] != 1 or not bool((a.diff() < 0).all()) or not a[-1] >= 0:
            raise ValueError("alpha_bar must start at 1, decrease strictly and never be negative.")

    @property
    def T(self) -> int:
        """The number of diffusion steps; times run 1..T."""
        return len(self.alpha_bar) - 1

    def __getitem__(self, t: int) -> float:
        """alpha_bar at time t = 0..T, as a Python float in double precision."""
        if not 0 <= t <= self.T:
            raise ValueError(f"time t={t} lies outside 0..{self.T}.")
        return float(self.alpha_bar[t])


def from_betas(betas: Sequence[float] | Tensor, name: str = "custom") -> NoiseSchedule:
    """Build a schedule from beta_1 .. beta_T, each in (0, 1): alpha_bar[t] = product of (1 - beta_i), i = 1..t.

    beta_T may be 1: zero terminal SNR.

    Raises:
        ValueError: no betas, or one outside (0, 1); the message gives the first such index.
    """
    b = torch.as_tensor(betas, dtype=torch.float64)
    if b.ndim != 1 or len(b) == 0:
        raise ValueError("betas must be a list of at least one number.")
    allowed = (b > 0) & (b < 1)
    allowed[-1] |= b[-1] == 1
    if not bool(allowed.all()):
        i = int((~allowed).nonzero()[0])
        raise ValueError(f"beta_{i + 1}={float(b[i])} must lie strictly between 0 and 1.")
    return NoiseSchedule(torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - b, 0)]), name)


def linear_schedule(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Ho et al.'s schedule, used by all models of the paper: T betas at equal distances from beta_start to beta_end."""
    return from_betas(torch.linspace(beta_start, beta_end, _steps(T), dtype=torch.float64), "linear")


def scaled_linear_schedule(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Latent diffusion's schedule: the square roots of the betas lie at equal distances."""
    roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), _steps(T), dtype=torch.float64)
    return from_betas(roots**2, "scaled_linear")


def cosine_schedule(T: int = 1000, offset: float = 0.008, beta_max: float = 0.999) -> NoiseSchedule:
    """Nichol and Dhariwal's schedule (Improved DDPM, Eq. 17).

    beta_t = min(1 - f(t) / f(t-1), beta_max), where f(t) = cos((t/T + offset) / (1 + offset) pi/2)**2.
    """
    t = torch.arange(_steps(T) + 1, dtype=torch.float64) / T
    f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return from_betas((1 - f[1:] / f[:-1]).clamp(max=beta_max), "cosine")


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Rescale a schedule to alpha_bar[T] = 0 exactly, so that x_T is noise alone (Lin et al. 2024, Algorithm 1).

    sqrt(alpha_bar[t]) is shifted and scaled so that it is 0 at T and unchanged at 1, as by `rescale_betas_zero_snr` of
    diffusers.

    Raises:
        ValueError: T is 1, so that no time is left to stay unchanged.
    """
    if schedule.T < 2:
        raise ValueError("T=1 cannot be rescaled to zero terminal SNR; T must be at least 2.")
    roots = schedule.alpha_bar.sqrt()
    rescaled = ((roots - roots[-1]) * (roots[1] / (roots[1] - roots[-1]))) ** 2
    alpha_bar = torch.cat([schedule.alpha_bar[:2], rescaled[2:]])
    return NoiseSchedule(alpha_bar, f"{schedule.name}_zero_terminal_snr")


def _steps(T: int) -> int:
    if T < 1:
        raise ValueError(f"T={T} must be at least 1.")
    return T


# What a user can name. Every entry is called with keyword arguments of its own.
SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": linear_schedule,
    "scaled_linear": scaled_linear_schedule,
    "cosine": cosine_schedule,
    "custom": from_betas,
}


@dataclass(frozen=True)
class ScheduleSpec:
    """A schedule by name, as a configuration gives it.

    Attributes:
        name: a key of SCHEDULES.
        T, beta_start, beta_end, betas: arguments of that schedule; null leaves its default.
        zero_terminal_snr: rescale it to alpha_bar[T] = 0, for networks that predict v or x0.

    Raises:
        ValueError: an unknown name, an argument that this schedule does not take, or one out of range.
    """

    name: str = "linear"
    T: int | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    betas: tuple[float, ...] | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"name={self.name!r} is not known; allowed: {', '.join(SCHEDULES)}.")
        takes = inspect.signature(SCHEDULES[self.name]).parameters
        if unused := [key for key in self._arguments() if key not in takes]:
            raise ValueError(f"the {self.name} schedule does not take {', '.join(unused)}; leave it null.")
        if self.name == "custom" and self.betas is None:
            raise ValueError("the custom schedule needs betas, a list of T numbers in (0, 1).")
        self.build()

    def build(self) -> NoiseSchedule:
        """Return the schedule."""
        schedule = SCHEDULES[self.name](**self._arguments())
        return zero_terminal_snr(schedule) if self.zero_terminal_snr else schedule

    def _arguments(self) -> dict[str, object]:
        given = {"T": self.T, "beta_start": self.beta_start, "beta_end": self.beta_end, "betas": self.betas}
        return {key: value for key, value in given.items() if value is not None}
