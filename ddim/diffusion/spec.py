"""A sampler as configurations name it: the rule, the times and the clip policy."""

import importlib.metadata
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ddim.diffusion import multinomial
from ddim.diffusion.analytic import AnalyticVariance
from ddim.diffusion.learned_variance import LearnedVariance
from ddim.diffusion.prediction import Clip
from ddim.diffusion.registry import DIFFUSERS, RULES, check_arguments, find_rule
from ddim.diffusion.rules import Rule
from ddim.diffusion.sampling import Model, Noise, State, check_levels, count_evaluations, rows, trajectory
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.score import Corrector
from ddim.diffusion.tau_file import SUFFIX, TauFile, read_tau
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
        rule: a key of RULES, the name of an installed package's rule (`find_rule`), or `diffusers`.
        eta: η in [0, 1] for `ddim` and `analytic`; null for rules that have none.
        S: the number of steps; null with nfe or explicit times; with a file of times, null or theirs.
        nfe: in place of S, the network evaluations of an image; exactly so many, or the times are refused.
        spacing: a key of SPACINGS; the path of a file of times (.json, scripts/search_tau.py); `explicit`; `scheduler`
            where a scheduler has its own times; or a name of Improved DDPM's respacing (`respaced_tau`), with S=null or
            the number of times in it.
        times: the explicit times, increasing, in 1..T.
        steps_offset: for `leading`, added to each time; null is 0.
        clip, clip_range, threshold_ratio, threshold_max: the clip policy, see `Clip`.
        last_time: 0 ends at alpha_bar = 1 (paper); 1 ends at alpha_bar[1] (some code bases).
        order: of a rule that has one; null leaves its default.
        kwargs: other arguments of the rule, or those of the scheduler and of its `step`. A file among them is read when
            this is created.
        scheduler: a class of diffusers, with rule=diffusers; `ddim.inference.diffusers_scheduler` samples with it.
        corrector_steps, corrector_snr: Langevin steps after each step but the last, see `Corrector`; 0 for none.

    Raises:
        ValueError: an unknown name, fields that contradict each other, or a file that is not one of S times.
    """

    rule: str = "ddim"
    eta: float | None = 0.0
    S: int | None = 50
    spacing: str = "linear"
    times: tuple[int, ...] | None = None
    steps_offset: int | None = None
    clip: str = "none"
    clip_range: float = 1.0
    threshold_ratio: float | None = None
    threshold_max: float | None = None
    last_time: int = 0
    order: int | None = None
    kwargs: dict[str, Any] | None = None
    scheduler: str | None = None
    nfe: int | None = None
    corrector_steps: int = 0
    corrector_snr: float = 0.16

    def __post_init__(self) -> None:
        respaced = None if self.has_file else respaced_count(self.spacing)
        if self.has_file:
            count = len(self.file.tau)
            if self.S not in (None, count):
                raise ValueError(f"S={self.S} is not the number of times in {self.spacing}; take S={count} or S=null.")
            object.__setattr__(self, "S", count)
        explicit = self.spacing == "explicit"
        known = self.has_file or respaced is not None or self.spacing in (*SPACINGS, "explicit", "scheduler")
        if not known:
            raise ValueError(
                f"spacing={self.spacing!r} is not known; allowed: {', '.join(SPACINGS)}, scheduler, explicit, a file "
                "(.json), and Improved DDPM's ddimN and N1,N2,..."
            )
        if self.last_time not in (0, 1):
            raise ValueError(f"last_time={self.last_time!r} is not known; allowed: 0, 1.")
        if respaced is not None and self.S not in (None, respaced):
            raise ValueError(f"S={self.S} contradicts spacing={self.spacing}, which is {respaced} times; set S=null.")
        for name, value in (("S", self.S), ("nfe", self.nfe)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.nfe is not None and (self.S is not None or self.spacing not in SPACINGS):
            raise ValueError(f"nfe={self.nfe} takes the place of S: set S=null, and one of {', '.join(SPACINGS)}.")
        if explicit != (self.times is not None) or (respaced is None and explicit != (self.steps is None)):
            raise ValueError("give either S with a named spacing, or spacing=explicit with times and S=null.")
        if self.steps_offset is not None and self.spacing != "leading":
            raise ValueError(f"steps_offset={self.steps_offset} needs spacing=leading, not {self.spacing}.")
        self.build_clip()
        self.build_corrector()
        if not self.corrector_steps and self.corrector_snr != Corrector.snr:
            raise ValueError(f"corrector_snr={self.corrector_snr} needs corrector_steps, such as 1; 0 is no corrector.")
        if self.corrector_steps and self.rule == "multinomial":
            raise ValueError("a corrector follows the score, which categories do not have; set corrector_steps=0.")
        if self.rule == DIFFUSERS or self.scheduler is not None or self.spacing == "scheduler":
            self._check_scheduler_fields()
            return
        rule, steps = self.build_rule(), len(self.times) if self.times is not None else self.steps or respaced or 0
        if steps and rule.memory > steps:
            raise (ValueError if self.nfe is None else NFENotPossible)(
                f"rule={self.rule} uses {rule.memory} predictions, which {steps} steps never have; take a lower order "
                f"or at least {rule.memory} steps."
            )

    def _check_scheduler_fields(self) -> None:
        ours = [f for f in fields(self) if f.name not in ("rule", "eta", "S", "spacing", "kwargs", "scheduler")]
        unset = self.eta is None and all(getattr(self, f.name) == f.default for f in ours)
        if self.rule != DIFFUSERS or self.scheduler is None or self.spacing != "scheduler" or not unset:
            raise ValueError(
                f"a scheduler of diffusers goes with rule={DIFFUSERS}, spacing=scheduler, eta=null and the defaults of "
                "everything else, as sampler=diffusers sets them; give scheduler=NAME, S, and its own options as "
                "kwargs."
            )

    @property
    def steps(self) -> int | None:
        """S, or the steps that the rule makes of nfe evaluations; None with times that are given otherwise."""
        return 1 + (self.nfe - 1) // self.evaluations_per_step if self.nfe else self.S

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations of a step, with those of the corrector; the last step takes one."""
        return 1 + (self.scheduler is None and self.build_rule().two_evaluations) + self.corrector_steps

    @property
    def deterministic(self) -> bool:
        """Whether x_T alone decides the sample: neither the rule nor the corrector adds noise."""
        return self.build_rule().convergence is not None and not self.corrector_steps

    def build_clip(self) -> Clip:
        """Return the clip policy."""
        return Clip(self.clip, self.clip_range, self.threshold_ratio, self.threshold_max)

    def build_corrector(self) -> Corrector:
        """Return the Langevin corrector; of 0 steps where there is none."""
        return Corrector(self.corrector_steps, self.corrector_snr)

    def check(
        self, schedule: NoiseSchedule, prediction: str, variance: str = "fixed", categories: int | None = None
    ) -> None:
        """Check before work starts that the sampler fits a schedule, what the network predicts, and what pixels are.

        Args:
            schedule, prediction, variance: of the model.
            categories: K where pixels are one of K categories; None where they are numbers.

        Raises:
            ValueError: it does not; see `tau`, `rows` and `check_level`. The rule needs a learned variance, or clips x̂0
                alone and combines several predictions, with which x̂0 and ε̂ have to make up x_t.
        """
        if (self.rule == "multinomial") != (categories is not None):
            pixels = "numbers" if categories is None else f"one of {categories} categories"
            advice = "any other rule" if categories is None else "sampler=multinomial, the only one for them"
            raise ValueError(
                f"rule={self.scheduler or self.rule} does not fit a model whose pixels are {pixels}; take {advice}."
            )
        if isinstance(self.build_rule(), LearnedVariance) and variance == "fixed":
            raise ValueError(
                f"rule={self.rule} needs a network that predicts the variance (objective.variance=learned_range), and "
                "this one has a fixed variance; take sampler=ddpm."
            )
        if categories is not None and self.clip != "none":
            raise ValueError(
                f"clip={self.clip} is for numbers; pixels that are one of {categories} categories take clip=none."
            )
        check_levels(self.build_rule(), schedule, self.descending_times(schedule.T), prediction)
        steps = rows(self.build_rule(), schedule, self.descending_times(schedule.T))  # refuses those it cannot take
        if self.clip == "x0" and any(row.step.past or row.correction for row in steps):
            raise ValueError(f"rule={self.rule} takes x̂0 and ε̂ that agree; set clip=none or clip=x0_and_eps.")

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
        return replace(self, S=None, spacing="explicit", times=tuple(tau), steps_offset=None)

    def build_rule(self) -> Rule:
        """Return the rule, with a file as it was when this was created.

        Raises:
            ValueError: the rule does not take these arguments, or a scheduler of diffusers stands in for it.
        """
        return self._rule

    @cached_property
    def _rule(self) -> Rule:
        self._refuse_scheduler()
        rule = find_rule(self.rule)
        takes = {p.name: p.annotation for p in inspect.signature(rule, eval_str=True).parameters.values()}
        named = {"eta": self.eta, "order": self.order}
        arguments = {name: value for name, value in named.items() if value is not None} | (self.kwargs or {})
        check_arguments(f"rule={self.rule}", arguments, takes)
        if "eta" in takes and self.eta is None:
            raise ValueError(f"rule={self.rule} needs an eta in [0, 1]; eta is null.")
        return rule(**arguments)

    def _refuse_scheduler(self) -> None:
        if self.scheduler is not None:
            raise ValueError(
                f"scheduler={self.scheduler} makes images from x_T and nothing else; for encoding, interpolation and "
                f"the grids of a training choose a rule: {', '.join(RULES)}."
            )

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers besides the times, as records state it; new fields where they are set.

        A file is stated by the hash of its numbers: wherever it lies, it is the same evaluation.
        """
        chosen = {name: getattr(self, name) for name in ("rule", "eta", "clip", "last_time")}
        unset: dict[str, Any] = {
            "order": None,
            "kwargs": None,
            "scheduler": None,
            "clip_range": 1.0,
            "threshold_ratio": None,
            "threshold_max": None,
            "corrector_steps": 0,
        }
        added = {name: getattr(self, name) for name in unset} | {"kwargs": self.kwargs or None}
        if self.corrector_steps:
            chosen["corrector_snr"] = self.corrector_snr
        if self.scheduler is not None:
            chosen[DIFFUSERS] = importlib.metadata.version(DIFFUSERS)
        elif isinstance(rule := self.build_rule(), AnalyticVariance):
            added["kwargs"] = {"file": rule.table_hash, "clip_bound": rule.clip_bound}
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
        second: Tensor | None = None,
    ) -> Iterator[State]:
        """Sample with this rule, these times and this clip policy; arguments as in `trajectory`."""
        rule, times = self.build_rule(), self.descending_times(schedule.T)
        if isinstance(rule, multinomial.Multinomial):
            if noise is not None:
                raise ValueError("rule=multinomial draws categories and adds no noise; leave noise out.")
            return multinomial.trajectory(model, schedule, x_T, times, rule, seed=seed, indices=indices)
        return trajectory(
            model,
            schedule,
            x_T,
            times,
            rule,
            prediction=prediction,
            clip=self.build_clip(),
            seed=seed,
            indices=indices,
            noise=noise,
            corrector=self.build_corrector(),
            second=second,
        )

    def evaluations(self, schedule: NoiseSchedule) -> int:
        """Return how often a sample evaluates the network (NFE)."""
        return count_evaluations(self.build_rule(), schedule, self.descending_times(schedule.T), self.corrector_steps)

    def descending_times(self, T: int) -> tuple[int, ...]:
        """Return the times of a trajectory, from tau's last to `last_time`."""
        return (*reversed(self.tau(T)), self.last_time)

    def tau(self, T: int) -> tuple[int, ...]:
        """Return the increasing times in 1..T.

        Raises:
            ValueError: S, the explicit times or the file do not fit T, or a scheduler of diffusers has its own.
            NFENotPossible: the times take another number of evaluations than nfe.
        """
        self._refuse_scheduler()
        if self.has_file:
            if self.file.T != T:
                raise ValueError(
                    f"{self.spacing} holds times of T={self.file.T}, not of T={T}; search them for this model."
                )
            return self.file.tau
        if self.times is not None:
            return explicit_tau(T, self.times)
        if respaced_count(self.spacing) is not None:
            return respaced_tau(T, self.spacing)
        assert self.steps is not None
        if self.steps_offset is not None:
            tau = leading_tau(T, self.steps, self.steps_offset)
        else:
            tau = SPACINGS[self.spacing](T, self.steps)
        taken = 1 + (len(tau) - 1) * self.evaluations_per_step
        taken -= (len(tau) - distinct_evaluations(tau)) * self.build_rule().two_evaluations
        if self.nfe not in (None, taken):
            raise NFENotPossible(
                f"nfe={self.nfe} is not possible with rule={self.rule} and spacing={self.spacing}, whose {len(tau)} "
                f"steps take {taken} evaluations; choose another nfe, rule or spacing."
            )
        return tau
