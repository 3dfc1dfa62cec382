"""A sampler as configurations name it: the rule, the times and the clip policy."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddim.diffusion.prediction import CLIP_POLICIES
from ddim.diffusion.sampling import DDIM, Model, Rule, SigmaHat, State, trajectory
from ddim.diffusion.schedule import NoiseSchedule
from ddim.diffusion.timesteps import SPACINGS, explicit_tau


@dataclass(frozen=True)
class SamplerSpec:
    """Everything that decides a sample besides the network, x_T and the seed. Stored with every result.

    Attributes:
        rule: a key of RULES.
        eta: η in [0, 1] for `ddim`; null for `sigma_hat`, which has none.
        S: the number of steps; null with explicit times.
        spacing: a key of SPACINGS, or `explicit`.
        times: the explicit times, increasing, in 1..T.
        clip: one of CLIP_POLICIES.
        last_time: 0 ends at alpha_bar = 1 (paper); 1 ends at alpha_bar[1] (some code bases).

    Raises:
        ValueError: an unknown name, or fields that contradict each other.
    """

    rule: str = "ddim"
    eta: float | None = 0.0
    S: int | None = 50
    spacing: str = "linear"
    times: tuple[int, ...] | None = None
    clip: str = "none"
    last_time: int = 0

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("rule", self.rule, tuple(RULES)),
            ("spacing", self.spacing, (*SPACINGS, "explicit")),
            ("clip", self.clip, CLIP_POLICIES),
            ("last_time", self.last_time, (0, 1)),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not known; allowed: {', '.join(map(str, allowed))}.")
        if (self.rule == "ddim") != (self.eta is not None):
            raise ValueError(
                f"eta={self.eta} does not go with rule={self.rule}: ddim needs an eta in [0, 1], sigma_hat has none."
            )
        explicit = self.spacing == "explicit"
        if explicit != (self.times is not None) or explicit != (self.S is None):
            raise ValueError("give either S with a named spacing, or spacing=explicit with times and S=null.")
        if self.S is not None and self.S < 1:
            raise ValueError(f"S={self.S} must be at least 1.")
        self.build_rule()

    def build_rule(self) -> Rule:
        """Return the choice of σ."""
        return RULES[self.rule](self.eta)

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
        times = (*reversed(self.tau(schedule.T)), self.last_time)
        return trajectory(
            model,
            schedule,
            x_T,
            times,
            self.build_rule(),
            prediction=prediction,
            clip=self.clip,
            seed=seed,
            indices=indices,
        )

    def tau(self, T: int) -> tuple[int, ...]:
        """Return the increasing times in 1..T.

        Raises:
            ValueError: S or the explicit times do not fit T.
        """
        if self.times is not None:
            return explicit_tau(T, self.times)
        assert self.S is not None
        return SPACINGS[self.spacing](T, self.S)


RULES: dict[str, Callable[[float | None], Rule]] = {
    "ddim": lambda eta: DDIM(eta=0.0 if eta is None else eta),
    "sigma_hat": lambda eta: SigmaHat(),
}
