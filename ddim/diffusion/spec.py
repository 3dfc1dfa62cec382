"""A sampler as configurations name it: the rule, the times and the clip policy."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ddim.diffusion.prediction import Clip, check_level
from ddim.diffusion.rules import DDIM, Rule, SigmaHat
from ddim.diffusion.sampling import Model, Noise, State, count_evaluations, trajectory
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.solvers import (
    DEIS,
    IPNDM,
    AdamsBashforth,
    DPMSolverPP,
    Heun,
    ProbabilityFlow,
    SDEDPMSolverPP,
    UniPC,
)
from ddim.diffusion.timesteps import (
    SPACINGS,
    distinct_evaluations,
    explicit_tau,
    leading_tau,
    respaced_count,
    respaced_tau,
)


class NFENotPossible(ValueError):
    """The rule has no trajectory of this spacing with exactly the network evaluations asked for."""


@dataclass(frozen=True)
class SamplerSpec:
    """Everything that decides a sample besides the network, x_T and the seed. Stored with every result.

    Attributes:
        rule: a key of RULES.
        eta: η in [0, 1] for `ddim`; null for rules that have none.
        order: of a rule that has one; null leaves its default.
        kwargs: other arguments of the rule.
        S: the number of steps; null with nfe or explicit times.
        nfe: in place of S, the network evaluations of an image; exactly so many, or the times are refused.
        spacing: a key of SPACINGS; `explicit`; or a name of Improved DDPM's respacing (`respaced_tau`), with S=null or
            the number of times in it.
        times: the explicit times, increasing, in 1..T.
        steps_offset: for `leading`, added to each time; null is 0.
        clip, clip_range, threshold_ratio, threshold_max: the clip policy, see `Clip`.
        last_time: 0 ends at alpha_bar = 1 (paper); 1 ends at alpha_bar[1] (some code bases).

    Raises:
        ValueError: an unknown name, or fields that contradict each other.
    """

    rule: str = "ddim"
    eta: float | None = 0.0
    order: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    S: int | None = 50
    nfe: int | None = None
    spacing: str = "linear"
    times: tuple[int, ...] | None = None
    steps_offset: int | None = None
    clip: str = "none"
    clip_range: float = 1.0
    threshold_ratio: float | None = None
    threshold_max: float | None = None
    last_time: int = 0

    def __post_init__(self) -> None:
        respaced = respaced_count(self.spacing)
        explicit = self.spacing == "explicit"
        if self.spacing not in (*SPACINGS, "explicit") and respaced is None:
            raise ValueError(
                f"spacing={self.spacing!r} is not known; allowed: {', '.join(SPACINGS)}, explicit, and Improved DDPM's "
                "ddimN and N1,N2,..."
            )
        for name, value, allowed in (("rule", self.rule, tuple(RULES)), ("last_time", self.last_time, (0, 1))):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(str, allowed))}.")
        if respaced is not None and self.S not in (None, respaced):
            raise ValueError(f"S={self.S} contradicts spacing={self.spacing}, which is {respaced} times; set S=null.")
        for name, count in (("S", self.S), ("nfe", self.nfe)):
            if count is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1.")
        if self.nfe is not None and (self.S is not None or self.spacing not in SPACINGS):
            raise ValueError(f"nfe={self.nfe} takes the place of S: set S=null, and one of {', '.join(SPACINGS)}.")
        if explicit != (self.times is not None) or (respaced is None and explicit != (self.steps is None)):
            raise ValueError("give either S with a named spacing, or spacing=explicit with times and S=null.")
        if self.steps_offset is not None and self.spacing != "leading":
            raise ValueError(f"steps_offset={self.steps_offset} needs spacing=leading, not {self.spacing}.")
        self.build_rule()
        self.build_clip()

    @property
    def steps(self) -> int | None:
        """S, or the steps that the rule makes of nfe evaluations; None with times that are given otherwise."""
        return (self.nfe + 1) // 2 if self.nfe and self.build_rule().two_evaluations else self.nfe or self.S

    def build_clip(self) -> Clip:
        """Return the clip policy."""
        return Clip(self.clip, self.clip_range, self.threshold_ratio, self.threshold_max)

    def check(self, schedule: NoiseSchedule, prediction: str) -> None:
        """Check before work starts that the sampler fits a schedule and what the network predicts.

        Raises:
            ValueError: it does not; see `tau`, `rows` and `check_level`.
        """
        for t in self.tau(schedule.T):
            check_level(prediction, schedule[t])
        self.evaluations(schedule)  # refuses steps that the rule cannot take

    def build_rule(self) -> Rule:
        """Return the rule.

        Raises:
            ValueError: the rule does not take these arguments.
        """
        rule = RULES[self.rule]
        takes = inspect.signature(rule).parameters
        named = {"eta": self.eta, "order": self.order}
        arguments = {name: value for name, value in named.items() if value is not None} | self.kwargs
        if unknown := [name for name in arguments if name not in takes]:
            raise ValueError(
                f"rule={self.rule} does not take {', '.join(unknown)}; it takes "
                f"{', '.join(takes) or 'no arguments'}. Set eta and order to null where it has none."
            )
        if "eta" in takes and self.eta is None:
            raise ValueError(f"rule={self.rule} needs an eta in [0, 1]; eta is null.")
        return rule(**arguments)

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers besides the times, as records state it; new fields where they are set."""
        chosen = {name: getattr(self, name) for name in ("rule", "eta", "clip", "last_time")}
        unset: dict[str, Any] = {
            "order": None,
            "kwargs": {},
            "clip_range": 1.0,
            "threshold_ratio": None,
            "threshold_max": None,
        }
        added = {name: getattr(self, name) for name in unset}
        return chosen | {name: value for name, value in added.items() if value != unset[name]}

    def trajectory(
        self,
        model: Model,
        schedule: NoiseSchedule,
        x_T: Tensor,
        *,
        prediction: str = "eps",
        seed: int = 0,
        indices: Sequence[int] | Tensor | None = None,
        noise: Noise | None = None,
    ) -> Iterator[State]:
        """Sample with this rule, these times and this clip policy; arguments as in `trajectory`."""
        return trajectory(
            model,
            schedule,
            x_T,
            self.descending_times(schedule.T),
            self.build_rule(),
            prediction=prediction,
            clip=self.build_clip(),
            seed=seed,
            indices=indices,
            noise=noise,
        )

    def evaluations(self, schedule: NoiseSchedule) -> int:
        """Return how often a sample evaluates the network (NFE)."""
        return count_evaluations(self.build_rule(), schedule, self.descending_times(schedule.T))

    def descending_times(self, T: int) -> tuple[int, ...]:
        """Return the times of a trajectory, from tau's last to `last_time`."""
        return (*reversed(self.tau(T)), self.last_time)

    def tau(self, T: int) -> tuple[int, ...]:
        """Return the increasing times in 1..T.

        Raises:
            ValueError: S or the explicit times do not fit T.
            NFENotPossible: the times take another number of evaluations than nfe.
        """
        if self.times is not None:
            return explicit_tau(T, self.times)
        if respaced_count(self.spacing) is not None:
            return respaced_tau(T, self.spacing)
        assert self.steps is not None
        if self.steps_offset is not None:
            tau = leading_tau(T, self.steps, self.steps_offset)
        else:
            tau = SPACINGS[self.spacing](T, self.steps)
        taken = len(tau) + (distinct_evaluations(tau) - 1) * self.build_rule().two_evaluations
        if self.nfe not in (None, taken):
            raise NFENotPossible(
                f"nfe={self.nfe} is not possible with rule={self.rule} and spacing={self.spacing}, whose {len(tau)} "
                f"steps take {taken} evaluations; choose another nfe, rule or spacing."
            )
        return tau


RULES: dict[str, type[Rule]] = {
    "ddim": DDIM,
    "sigma_hat": SigmaHat,
    "probability_flow": ProbabilityFlow,
    "heun": Heun,
    "adams_bashforth": AdamsBashforth,
    "ipndm": IPNDM,
    "deis": DEIS,
    "dpm_solver_pp": DPMSolverPP,
    "sde_dpm_solver_pp": SDEDPMSolverPP,
    "unipc": UniPC,
}
