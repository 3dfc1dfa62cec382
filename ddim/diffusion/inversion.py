"""Inversion: from a real image to an x_T that decodes to it (section 5.4), by the rules that the literature names.

DDIM's step from time s down to the lower time t is x_t = √a_t x̂0 + √(1 - a_t) ε̂ with ε̂ = ε_θ(x_s, s). To go up from x_t
is to solve it for x_s, which stands inside the network:

    x_s / √a_s = x_t / √a_t + (σ̄_s - σ̄_t) ε_θ(x_s, s),     σ̄ = √((1 - a) / a)

    paper         takes ε_θ(x_t, t): the state and the time of the lower end (the paper's authors; Eq. 13 upwards)
    diffusers     takes ε_θ(x_t, s): the state of the lower end, the time of the upper (its DDIMInverseScheduler)
    fixed_point   repeats x_s ← the right-hand side k times, from x_s = x_t (Pan et al. 2023; Meiri et al. 2023)
    bdia          couples two steps so that nothing has to be solved (Zhang et al. 2023): exact, see `BDIA`
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddim.diffusion.prediction import Clip, as_clip
from ddim.diffusion.rules import DDIM, Coefficients, Rule
from ddim.diffusion.sampling import Model, State, check_levels, trajectory
from ddim.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class FixedPoint(Rule):
    """DDIM's step up with the ε̂ of its end, by fixed-point iterations; it encodes only.

    Attributes:
        iterations: k, network evaluations a step; one is diffusers' convention, for a network that predicts ε.

    Raises:
        ValueError: iterations below 1.
    """

    iterations: int = 3
    convergence = 1

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1.")

    @property
    def implicit(self) -> int:  # type: ignore[override]
        """As many evaluations as iterations."""
        return self.iterations

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return DDIM's step.

        Raises:
            ValueError: the step goes down.
        """
        if a_s > levels[0]:
            raise ValueError("inversion goes up, from an image to x_T; sample with ddim.")
        return DDIM().coefficients(levels, a_s)


@dataclass(frozen=True)
class ShiftedLabels(FixedPoint):
    """The step of diffusers' DDIMInverseScheduler: the network gets x_t with the time s, and a_t reads its output."""

    iterations: int = 1
    shifted = True


@dataclass(frozen=True)
class BDIA(Rule):
    """DDIM coupled over two steps (Zhang et al. 2023, bi-directional integration approximation), exactly invertible.

    From x_r, the state before, over x_t to x_s, with D(x_t, s) the step of DDIM from x_t to time s, up or down:

        x_s = x_r + D(x_t, s) - D(x_t, r)

    Solved for x_r this is the same step with r and s exchanged: going up with what went down undoes it, up to
    rounding, where both of the two last states are known. Each step costs one evaluation. The first step, which has no
    state before, is DDIM's. The published γ is left out.
    """

    memory = 2
    convergence = 2

    def coefficients(self, levels: Sequence[float], a_s: float) -> Coefficients:
        """Return the coupled step; x_r is written as the x̂0 and the ε̂ that make it up."""
        c = DDIM().coefficients(levels, a_s)
        if len(levels) == 1 or a_s == levels[0]:
            return c
        a_r = levels[1]
        return Coefficients(
            c.x0 - math.sqrt(a_r), c.eps - math.sqrt(1 - a_r), past=((math.sqrt(a_r), math.sqrt(1 - a_r)),)
        )


@dataclass(frozen=True)
class Inversion:
    """How to encode, and how to decode again.

    Attributes:
        method: a key of INVERSIONS.
        iterations: k of fixed_point; None is its default, and what the others take.

    Raises:
        ValueError: an unknown method, iterations below 1, or iterations of another method.
    """

    method: str = "paper"
    iterations: int | None = None

    def __post_init__(self) -> None:
        if self.method not in INVERSIONS:
            raise ValueError(f"inversion={self.method!r} is not known; allowed: {', '.join(INVERSIONS)}.")
        if self.iterations is not None and self.method != "fixed_point":
            raise ValueError(f"iterations={self.iterations} is for inversion=fixed_point; leave it out.")
        self.encoder()

    def encoder(self) -> Rule:
        """Return the rule of the way up."""
        return INVERSIONS[self.method](*() if self.iterations is None else (self.iterations,))

    def decoder(self) -> Rule:
        """Return the rule of the way down: DDIM, or BDIA."""
        return BDIA() if self.method == "bdia" else DDIM()

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as records and files state it: the arguments that make the same one."""
        return {"method": self.method} | (
            {"iterations": self.encoder().implicit} if self.method == "fixed_point" else {}
        )

    @property
    def label(self) -> str:
        """How tables name it, with the network evaluations of an image there and back; of the paper's they are 2 S."""
        rule = self.encoder()
        if self.method == "bdia":
            return "BDIA (NFE 2 S - 1)"
        if self.method == "paper":
            return "η=0.0"
        name = "diffusers' inversion" if rule.shifted else f"fixed point, k={rule.implicit}"
        return f"η=0.0, {name} (NFE {rule.implicit + 1} S)"

    def evaluations(self, S: int) -> tuple[int, int]:
        """Return how often an image evaluates the network (NFE) in S steps: encoded, and decoded."""
        return S * max(1, self.encoder().implicit), S - (self.method == "bdia")

    def check(self, S: int, clip: str | Clip) -> None:
        """Refuse steps that cannot be inverted.

        Raises:
            ValueError: x̂0 is clipped, which only the paper's convention allows, or bdia has a single step.
        """
        if self.method != "paper" and as_clip(clip).policy != "none":
            raise ValueError(f"inversion={self.method} inverts steps that do not clip x0; take clip=none.")
        if self.method == "bdia" and S < 2:
            raise ValueError("inversion=bdia couples two steps; take S=2 or more.")

    def check_levels(self, schedule: NoiseSchedule, tau: Sequence[int], prediction: str) -> None:
        """Refuse times at which what the network predicts gives no x̂0 or ε̂, and steps to ᾱ = 0 that are not undone.

        At ᾱ = 0 any x_s solves for the fixed point (there ε̂ is x_s itself), and BDIA has no step back.

        Raises:
            ValueError: there is such a time.
        """
        check_levels(self.encoder(), schedule, (0, *tau), prediction)
        check_levels(self.decoder(), schedule, (*reversed(tau), 0), prediction)
        if schedule[tau[-1]] == 0 and self.method in ("fixed_point", "bdia"):
            raise ValueError(
                f"inversion={self.method} cannot encode to alpha_bar=0 (zero terminal SNR); take paper or diffusers, "
                "or a spacing that stops below T, such as leading."
            )

    def encode(
        self,
        model: Model,
        schedule: NoiseSchedule,
        x_0: Tensor,
        tau: Sequence[int],
        *,
        prediction: str = "eps",
        clip: str | Clip = "none",
    ) -> Iterator[State]:
        """Walk from x_0, (B, C, H, W), up to x_T; the state before x_T is what `decode` takes as `second`.

        Raises:
            ValueError: see `check` and `trajectory`.
        """
        self.check(len(tau), clip)
        return trajectory(model, schedule, x_0, (0, *tau), self.encoder(), prediction=prediction, clip=clip)

    def decode(
        self,
        model: Model,
        schedule: NoiseSchedule,
        x_T: Tensor,
        tau: Sequence[int],
        *,
        second: Tensor | None = None,
        prediction: str = "eps",
        clip: str | Clip = "none",
    ) -> Iterator[State]:
        """Walk from x_T down to x_0; `second`, the state at tau[-2], makes bdia exact and is not used otherwise."""
        times, rule = (*reversed(tau), 0), self.decoder()
        second = second if self.method == "bdia" else None
        return trajectory(model, schedule, x_T, times, rule, prediction=prediction, clip=clip, second=second)


INVERSIONS: dict[str, Callable[..., Rule]] = {
    "paper": DDIM,
    "diffusers": ShiftedLabels,
    "fixed_point": FixedPoint,
    "bdia": BDIA,
}
