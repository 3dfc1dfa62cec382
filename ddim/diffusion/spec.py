"""A sampler as configurations name it: the rule, the times and the clip policy."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ddim.diffusion.prediction import CLIP_POLICIES
from ddim.diffusion.rules import DDIM, Rule, SigmaHat
from ddim.diffusion.sampling import Model, State, count_evaluations, trajectory
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
from ddim.diffusion.tau_file import SUFFIX, TauFile, read_tau
from ddim.diffusion.timesteps import SPACINGS, explicit_tau


@dataclass(frozen=True)
class SamplerSpec:
    """Everything that decides a sample besides the network, x_T and the seed. Stored with every result.

    Attributes:
        rule: a key of RULES.
        eta: η in [0, 1] for `ddim`; null for rules that have none.
        order: of a rule that has one; null leaves its default.
        kwargs: other arguments of the rule.
        S: the number of steps; null with explicit times. With a file of times it may be null, and is then theirs.
        spacing: a key of SPACINGS, the path of a file of times (.json, scripts/search_tau.py), or `explicit`.
        times: the explicit times, increasing, in 1..T.
        clip: one of CLIP_POLICIES.
        last_time: 0 ends at alpha_bar = 1 (paper); 1 ends at alpha_bar[1] (some code bases).

    Raises:
        ValueError: an unknown name, fields that contradict each other, or a file that is not one of S times.
    """

    rule: str = "ddim"
    eta: float | None = 0.0
    order: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    S: int | None = 50
    spacing: str = "linear"
    times: tuple[int, ...] | None = None
    clip: str = "none"
    last_time: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("rule", self.rule, tuple(RULES)),
            ("spacing", "explicit" if self.has_file else self.spacing, (*SPACINGS, "explicit", "FILE.json")),
            ("clip", self.clip, CLIP_POLICIES),
            ("last_time", self.last_time, (0, 1)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(str, allowed))}.")
        if self.has_file:
            count = len(self.file.tau)
            if self.S not in (None, count):
                raise ValueError(f"S={self.S} is not the number of times in {self.spacing}; take S={count} or S=null.")
            object.__setattr__(self, "S", count)
        explicit = self.spacing == "explicit"
        if explicit != (self.times is not None) or explicit != (self.S is None):
            raise ValueError("give either S with a named spacing, or spacing=explicit with times and S=null.")
        if self.S is not None and self.S < 1:
            raise ValueError(f"S={self.S} must be at least 1.")
        self.build_rule()

    @property
    def has_file(self) -> bool:
        """Whether the times come from a file."""
        return self.spacing.endswith(SUFFIX)

    @cached_property
    def file(self) -> TauFile:
        """The file of times, as it was when this was created."""
        return read_tau(self.spacing)

    def at_times(self, tau: Sequence[int]) -> "SamplerSpec":
        """Return the same sampler with explicit times."""
        return replace(self, S=None, spacing="explicit", times=tuple(tau))

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
        added = {"order": self.order, "kwargs": self.kwargs}
        return chosen | {name: value for name, value in added.items() if value}

    def trajectory(
        self,
        model: Model,
        schedule: NoiseSchedule,
        x_T: Tensor,
        *,
        prediction: str = "eps",
        seed: int = 0,
        indices: Sequence[int] | Tensor | None = None,
    ) -> Iterator[State]:
        """Sample with this rule, these times and this clip policy; arguments as in `trajectory`."""
        return trajectory(
            model,
            schedule,
            x_T,
            self.descending_times(schedule.T),
            self.build_rule(),
            prediction=prediction,
            clip=self.clip,
            seed=seed,
            indices=indices,
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
            ValueError: S, the explicit times or the file do not fit T.
        """
        if self.has_file:
            if self.file.T != T:
                raise ValueError(
                    f"{self.spacing} holds times of T={self.file.T}, not of T={T}; search them for this model."
                )
            return self.file.tau
        if self.times is not None:
            return explicit_tau(T, self.times)
        assert self.S is not None
        return SPACINGS[self.spacing](T, self.S)


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
