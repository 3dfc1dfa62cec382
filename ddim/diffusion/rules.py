"""Sampling rules: from the noise levels of a step to its coefficients (paper, Eq. 12 and 16, section D.3).

A step from time t to time s, with a_t = alpha_bar[t] and a_s = alpha_bar[s], is a row of coefficients:

    x_s = sqrt(a_s) x̂0 + sqrt(1 - a_s - σ²) ε̂ + σ z,     z ~ N(0, I)                       (Eq. 12)

What differs between DDPM, DDIM and everything between is σ. Rules of higher order (`solvers.py`) add terms in the x̂0
and ε̂ of earlier steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """One step as a row: the factors of x̂0, of ε̂, of fresh noise, and of what was predicted earlier.

    Attributes:
        x0, eps: of the newest prediction.
        noise: of z.
        past: (factor of x̂0, factor of ε̂) of each earlier prediction that the step uses, newest first.
        noise_max: of a rule whose noise the network decides, between `noise` and this; see `noise_std`.
    """

    x0: float
    eps: float
    noise: float = 0.0
    past: tuple[tuple[float, float], ...] = ()
    noise_max: float | None = None


class Estimate(NamedTuple):
    """What follows from one network evaluation.

    Attributes:
        level: alpha_bar at the state that the network got.
        x0, eps: x̂0 and ε̂, (B, C, H, W).
        v: of a network with a learned variance: where it lies in its range, about -1 to 1, (B, C, H, W).
    """

    level: float
    x0: Tensor
    eps: Tensor
    v: Tensor | None = None


class Rule:
    """A sampler: from noise levels to the coefficients of a step. Subclasses are frozen dataclasses.

    Attributes:
        memory: how many predictions a step uses, with the newest.
        convergence: p, where the error on the deterministic trajectory is of order h^p in the step h; None for a rule
            that adds noise.
        two_evaluations: `correction` is followed by an evaluation at the corrected state (Heun); a step then costs two.
        lower_order_below: in a trajectory of fewer steps than this, a step uses no more predictions than there are
            steps left, which is more stable. Repeated times are no steps.
        zero_snr: a step can start at alpha_bar = 0, where the variables of most rules are infinite.
        implicit: of a rule that encodes (`inversion.py`): how many evaluations at the end of a step solve for it.
        shifted: of such a rule: its network's output is read as one at the start of the step.
        label: of a rule of another package: its name in tables; None for the name of the class.
    """

    memory: int = 1
    convergence: int | None = None
    two_evaluations: bool = False
    lower_order_below: float = 0
    zero_snr: bool = False
    implicit: int = 0
    shifted: bool = False
    label: str | None = None

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the coefficients of the step to the noise level a_s.

        Args:
            levels: alpha_bar of the last predictions, newest first: levels[0] is a_t, and there are at most `memory`,
                fewer at the start. No two are equal.
            a_s: alpha_bar at the end of the step.

        Raises:
            ValueError: the rule has no such step.
        """
        raise NotImplementedError

    def correction(self, levels: Sequence[float]) -> Coefficients | None:
        """Return how to compute the state at levels[0] again, now that the network predicted there; None: it is kept.

        Args:
            levels: as in `coefficients`, with the end of the step in front. Not called after the last step.
        """
        return None


@dataclass(frozen=True)
class DDIM(Rule):
    """The paper's family: σ = η sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s) (Eq. 16).

    Attributes:
        eta: η in [0, 1]. 0 is DDIM, deterministic; 1 is DDPM with the posterior variance. σ is linear in it.

    Raises:
        ValueError: eta outside [0, 1].
    """

    eta: float = 0.0
    zero_snr = True

    @property
    def convergence(self) -> int | None:  # type: ignore[override]
        """1 for η = 0, Euler's rule in σ̄ (Eq. 14)."""
        return None if self.eta else 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie in [0, 1]: 0 is DDIM, 1 is DDPM.")

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the factors of Eq. 12; upward steps (a_s < a_t) exist for eta = 0 only."""
        noise = self.eta * posterior_std(levels[0], a_s, f"eta={self.eta}") if self.eta else 0.0
        return Coefficients(math.sqrt(a_s), _direction(a_s, noise), noise)


@dataclass(frozen=True)
class SigmaHat(Rule):
    """The larger DDPM noise of section D.3: the fresh noise has std σ̂ = sqrt(1 - a_t / a_s), ε̂ keeps the σ of η = 1.

    The total variance then exceeds that of the marginal. The last step, to a_s = 1, adds no noise. The official
    implementation adds none from its first time, index 0, with which both of its spacings end; so with `uniform` and
    `quad` both agree in every step. It also clips x̂0 and derives ε̂ again: the clip policy `x0_and_eps`.
    """

    zero_snr = True

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the factors of section D.3; there are no upward steps."""
        std = posterior_std(levels[0], a_s, "sigma_hat")
        sigma_hat = math.sqrt(1 - levels[0] / a_s) if a_s < 1 else 0.0
        return Coefficients(math.sqrt(a_s), _direction(a_s, std), sigma_hat)


def sigma_bar(a: float) -> float:
    """Return σ̄ = sqrt((1 - a) / a), the paper's variable (Eq. 14); infinite at a = 0."""
    return math.sqrt((1 - a) / a) if a else math.inf


def posterior_std(a_t: float, a_s: float, name: str) -> float:
    """Return the σ of η = 1, the standard deviation of DDPM's posterior (Eq. 16).

    Raises:
        ValueError: the step goes up, which the rule `name` cannot do.
    """
    if a_s < a_t:
        raise ValueError(
            f"{name} cannot go up from alpha_bar={a_t} to {a_s}: encoding is deterministic, use ddim with eta=0."
        )
    return math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s) if a_s > a_t else 0.0


def _direction(a_s: float, std: float) -> float:
    # For std up to that of η = 1 the radicand is not negative, but it can be rounded to just below 0 when a_t << a_s.
    return math.sqrt(max(0.0, 1 - a_s - std**2))


def noise_std(c: Coefficients, v: Tensor | None) -> float | Tensor:
    """Return the factor of z: c.noise, or for each pixel what v says, from c.noise at -1 to c.noise_max at 1.

    Raises:
        ValueError: the network has to say it, but predicts no variance.
    """
    if c.noise_max is None:
        return c.noise
    if v is None:
        raise ValueError("the rule needs a variance that the network predicts, and this network predicts none.")
    return c.noise * (c.noise_max / c.noise) ** ((v + 1) / 2)


def apply(c: Coefficients, estimates: Sequence[Estimate], noise: Tensor | None = None) -> Tensor:
    """Return the weighted sum that the coefficients describe, (B, C, H, W).

    Args:
        c: the row of a step.
        estimates: newest first; as many as the row uses, or more.
        noise: z, (B, C, H, W).

    Raises:
        ValueError: the row has noise, but none was given.
    """
    x_s = c.x0 * estimates[0].x0 + c.eps * estimates[0].eps
    for (x0, eps), earlier in zip(c.past, estimates[1:], strict=False):
        x_s = x_s + x0 * earlier.x0 if x0 else x_s
        x_s = x_s + eps * earlier.eps if eps else x_s
    if c.noise == 0:
        return x_s
    if noise is None:
        raise ValueError("the rule adds noise in this step, but none was given.")
    return x_s + noise_std(c, estimates[0].v) * noise
