"""Rules of higher order for the deterministic trajectory (paper, Eq. 14), and their relatives with noise.

With a = alpha_bar and σ̄ = sqrt((1 - a) / a), the paper's variable, the trajectory solves either of

    d(x / sqrt(a)) = ε̂ dσ̄                    for ε̂: `AdamsBashforth`, `DEIS`, `IPNDM`, `Heun`
    d(x / sqrt(1 - a)) = x̂0 d(1 / σ̄)         for x̂0: `DPMSolverPP`, `UniPC`; λ = log(1 / σ̄)

A rule replaces ε̂ or x̂0 between t and s by a polynomial through what was predicted last. Where the variable of that
polynomial is infinite, as λ is at a_s = 1, one prediction is used: the step of DDIM.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ddim.diffusion.quadrature import lagrange_integrals
from ddim.diffusion.rules import DDIM, Coefficients, Rule, sigma_bar


@dataclass(frozen=True)
class Multistep(Rule):
    """A rule that remembers.

    Attributes:
        order: how many predictions a step uses, as the papers number their rules; 1 is DDIM (with noise, DDPM).

    Raises:
        ValueError: an order that the rule does not have.
    """

    order: int = 2
    orders: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)

    def __post_init__(self) -> None:
        if self.order not in self.orders:
            raise ValueError(f"order={self.order} is not one of {', '.join(map(str, self.orders))}.")

    @property
    def memory(self) -> int:  # type: ignore[override]
        """As many predictions as the order."""
        return self.order

    @property
    def convergence(self) -> int | None:  # type: ignore[override]
        """The order."""
        return self.order


@dataclass(frozen=True)
class AdamsBashforth(Multistep):
    """Adams and Bashforth's rule for ε̂ in σ̄ with the exact weights of unequal steps; also called ρAB-DEIS."""

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the step with the polynomial through (σ̄, ε̂)."""
        nodes = [sigma_bar(a) for a in levels]
        return _from_eps(levels[0], a_s, lagrange_integrals(nodes, nodes[0], sigma_bar(a_s)))


@dataclass(frozen=True)
class DEIS(Multistep):
    """The exponential integrator of Zhang and Chen (2023): a polynomial of ε̂, integrated exactly over σ̄.

    Attributes:
        variable: of the polynomial. `t`: the time of the variance-preserving SDE with β from 0.1 to 20 (their tAB),
            which is t / T for the linear schedule. `log_rho`: log σ̄, as in diffusers.
        lower_order_below: see `Rule`; diffusers uses 15.
    """

    order: int = 3
    variable: str = "t"
    lower_order_below: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variable not in ("t", "log_rho"):
            raise ValueError(f"variable={self.variable!r} is not known; allowed: t, log_rho.")

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the step with the polynomial through (t, ε̂) or (log σ̄, ε̂)."""
        nodes, end = [sigma_bar(a) for a in levels], sigma_bar(a_s)
        if self.variable == "t":
            times = [_sde_time(node) for node in nodes]
            weights = lagrange_integrals(times, nodes[0], end, variable=_sde_time)
        elif nodes[0] == 0 or end == 0:
            weights = [end - nodes[0]]
        else:
            logs = [math.log(node) for node in nodes if node > 0]
            weights = lagrange_integrals(logs, logs[0], math.log(end), density=math.exp)
        return _from_eps(levels[0], a_s, weights)


@dataclass(frozen=True)
class IPNDM(Multistep):
    """PNDM's multistep part from the first step on (Liu et al. 2022; Zhang and Chen 2023): the weights of equal steps.

    The steps are not equal in σ̄, so that more than two predictions do not raise the order of convergence.
    """

    order: int = 4

    @property
    def convergence(self) -> int | None:  # type: ignore[override]
        """At most 2."""
        return min(self.order, 2)

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return DDIM's step with the extrapolated ε̂."""
        change = sigma_bar(a_s) - sigma_bar(levels[0])
        return _from_eps(levels[0], a_s, [change * w for w in _EQUAL_STEPS[len(levels) - 1]])


_EQUAL_STEPS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class Heun(Rule):
    """Heun's rule in σ̄ (Karras et al. 2022): Euler's step, then the mean slope of both ends. S steps cost 2 S - 1."""

    convergence = 2
    two_evaluations = True

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return Euler's step, which is DDIM's."""
        return _from_eps(levels[0], a_s, [sigma_bar(a_s) - sigma_bar(levels[0])])

    def correction(self, levels: Sequence[float]) -> Coefficients:
        """Return the step from levels[1] to levels[0] with the mean of the two ε̂ (trapezoidal rule)."""
        a_s, a_t = levels[:2]
        half = (sigma_bar(a_s) - sigma_bar(a_t)) / 2
        root = math.sqrt(a_s)
        return Coefficients(0.0, root * half, past=((root, root * (sigma_bar(a_t) + half)),))


@dataclass(frozen=True)
class ProbabilityFlow(Rule):
    """Euler's step for the probability-flow equation in σ̄² (paper, Eq. 15), where DDIM's is in σ̄; it cannot encode."""

    convergence = 1

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the step of Eq. 15.

        Raises:
            ValueError: the step goes up.
        """
        start, end = sigma_bar(levels[0]), sigma_bar(a_s)
        if end > start:
            raise ValueError("probability_flow cannot go up: the equation divides by 0 at alpha_bar=1; use ddim.")
        return _from_eps(levels[0], a_s, [(end**2 - start**2) / (2 * start) if start else 0.0])


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    """Multistep DPM-Solver++ (Lu et al. 2022): order 2 is 2M, order 3 is 3M.

    The published 3M takes half of the term of the second derivative, so it converges with order 2 as well;
    `UniPC(order=3, corrector=False)` takes all of it.

    Attributes:
        lower_order_below: see `Rule`; 15 is that of diffusers and of the authors' code, which has 10 since.
    """

    lower_order_below: float = 15
    orders = (1, 2, 3)

    @property
    def convergence(self) -> int | None:  # type: ignore[override]
        """At most 2."""
        return min(self.order, 2)

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the step with the derivatives of x̂0 in λ from differences."""
        h, *r = _steps_in_lambda(levels, a_s)
        if not r:
            return _ddim(a_s)
        value = -math.expm1(-h)  # the integral of x̂0 over the step; then that of its slope
        if len(r) == 1:
            weights = [value * (1 + 1 / (2 * r[0])), -value / (2 * r[0])]
        else:
            slope = 1 - value / h
            curvature = (slope * r[0] + 0.5 - slope / h) / (r[0] + r[1])
            near, far = (slope + curvature) / r[0], -curvature / r[1]
            weights = [value + near, far - near, -far]
        return _from_x0(levels[0], a_s, [math.sqrt(a_s) * w for w in weights])


@dataclass(frozen=True)
class SDEDPMSolverPP(Multistep):
    """SDE-DPM-Solver++ 2M (Lu et al. 2022): the step of DDPM (η = 1) with the slope of x̂0 in λ; order 1 is DDPM."""

    orders = (1, 2)
    convergence = None
    lower_order_below: float = 15

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the step; upward steps do not exist."""
        c = DDIM(1.0).coefficients(levels, a_s)
        _, *r = _steps_in_lambda(levels, a_s)
        if not r:
            return c
        # The total factor of x̂0 where ε̂ is written as x_t and x̂0; half of it multiplies the slope.
        half = (c.x0 - c.eps * math.sqrt(levels[0] / (1 - levels[0]))) / (2 * r[0])
        return c._replace(x0=c.x0 + half, past=((-half, 0.0),))


@dataclass(frozen=True)
class UniPC(Multistep):
    """UniPC (Zhao et al. 2023) for x̂0 in λ: Adams and Bashforth's rule, then Adams and Moulton's when x̂0 at s is known.

    The correction costs no evaluation, since the prediction at the uncorrected state is kept. It raises the order of
    convergence by one.

    Attributes:
        order: 1 to 3.
        variant: B2 or B1: the function B(h) of the paper. It matters at low orders only, where a weight is set to 1/2
            in place of the exact one.
        corrector: false leaves the correction out (UniP).
    """

    variant: str = "B2"
    corrector: bool = True
    orders = (1, 2, 3)
    lower_order_below: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("B1", "B2"):
            raise ValueError(f"variant={self.variant!r} is not known; allowed: B1, B2.")

    @property
    def convergence(self) -> int | None:  # type: ignore[override]
        """One more than the order."""
        return self.order + self.corrector

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the predictor: the polynomial of x̂0 through the levels."""
        h, *r = _steps_in_lambda(levels, a_s)
        if not r:
            return _ddim(a_s)
        if len(r) == 1:
            half = self._B(h) / (2 * r[0])
            return _from_x0(levels[0], a_s, [math.sqrt(a_s) * w for w in (-math.expm1(-h) + half, -half)])
        return _from_x0(levels[0], a_s, _x0_weights(levels, levels[0], a_s))

    def correction(self, levels: Sequence[float]) -> Coefficients | None:
        """Return the corrector: the polynomial of x̂0 goes through the end of the step too."""
        a_s, a_t, *past = levels
        h, *_ = _steps_in_lambda(levels[1:], a_s)
        if not self.corrector or not math.isfinite(h):
            return None
        if past:
            weights = _x0_weights(levels, a_t, a_s)
        else:
            half = math.sqrt(a_s) * self._B(h) / 2
            weights = [half, -math.sqrt(a_s) * math.expm1(-h) - half]
        c = _from_x0(a_t, a_s, weights[1:])
        return Coefficients(weights[0], 0.0, past=((c.x0, c.eps), *c.past))

    def _B(self, h: float) -> float:
        return h if self.variant == "B1" else -math.expm1(-h)


def _sde_time(s: float) -> float:
    """Return the time t in [0, 1] at which the variance-preserving SDE with β = 0.1 + 19.9 t has σ̄ = s."""
    return (math.sqrt(0.01 + 39.8 * math.log1p(s * s)) - 0.1) / 19.9


def _ddim(a_s: float) -> Coefficients:
    return Coefficients(math.sqrt(a_s), math.sqrt(1 - a_s))


def _from_eps(a_t: float, a_s: float, weights: Sequence[float]) -> Coefficients:
    """Return x_s / sqrt(a_s) = x_t / sqrt(a_t) + Σ weights ε̂ as a row; x_t is sqrt(a_t) x̂0 + sqrt(1 - a_t) ε̂."""
    if a_t == 0:
        return _ddim(a_s)
    root, (newest, *past) = math.sqrt(a_s), weights
    return Coefficients(root, root * (sigma_bar(a_t) + newest), past=tuple((0.0, root * w) for w in past))


def _from_x0(a_t: float, a_s: float, weights: Sequence[float]) -> Coefficients:
    """Return x_s / sqrt(1 - a_s) = x_t / sqrt(1 - a_t) + Σ weights x̂0 / sqrt(1 - a_s) as a row."""
    ratio, (newest, *past) = math.sqrt((1 - a_s) / (1 - a_t)), weights
    return Coefficients(ratio * math.sqrt(a_t) + newest, math.sqrt(1 - a_s), past=tuple((w, 0.0) for w in past))


def _x0_weights(levels: Sequence[float], a_t: float, a_s: float) -> list[float]:
    """Return the factors of x̂0 at `levels`: the integral over its polynomial in λ from a_t to a_s."""
    lambdas = [-math.log(sigma_bar(a)) for a in levels if 0 < a < 1]
    start, end = -math.log(sigma_bar(a_t)), -math.log(sigma_bar(a_s))
    return [math.sqrt(1 - a_s) * w for w in lagrange_integrals(lambdas, start, end, density=math.exp)]


def _steps_in_lambda(levels: Sequence[float], a_s: float) -> list[float]:
    """Return the step h in λ, then the earlier steps as fractions of it: none where h is not finite."""
    lambdas = [-math.log(sigma_bar(a)) for a in levels if 0 < a < 1]
    if a_s == 1 or not 0 < levels[0] < 1 or a_s == levels[0]:
        return [math.inf]
    h = -math.log(sigma_bar(a_s)) - lambdas[0]
    return [h, *((a - b) / h for a, b in pairwise(lambdas))]
