"""The sampling rules by name: those of this package, and those that installed packages add."""

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from ddim.diffusion.analytic import AnalyticVariance
from ddim.diffusion.inversion import BDIA
from ddim.diffusion.learned_variance import LearnedVariance
from ddim.diffusion.multinomial import Multinomial
from ddim.diffusion.rules import DDIM, Rule, SigmaHat
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


def check_arguments(owner: str, arguments: Mapping[str, Any], takes: Mapping[str, Any]) -> None:
    """Refuse arguments that a rule or a scheduler does not take, or that are not numbers, text, true or false as asked.

    Args:
        owner: who takes them, for the message.
        arguments: by name.
        takes: the annotated type of each one that there is.

    Raises:
        ValueError: one is unknown, or of another type.
    """
    if unknown := [name for name in arguments if name not in takes]:
        raise ValueError(
            f"{owner} does not take {', '.join(unknown)}, which must be null (in Python None); it takes "
            f"{', '.join(takes) or 'no arguments'}."
        )
    for name, value in arguments.items():
        hint = takes[name]
        allowed = (int, float) if hint is float else hint
        if hint in _TYPES and (not isinstance(value, allowed) or isinstance(value, bool) != (hint is bool)):
            raise ValueError(f"{name}={value!r} of {owner} must be {_TYPES[hint]}.")


_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def find_rule(name: str) -> Callable[..., Rule]:
    """Return what builds a rule: one of RULES, or an entry point of the group `ddim.samplers` of an installed package.

    Raises:
        ValueError: there is none, there are two, or the package's cannot be used.
    """
    installed = [point for point in _entry_points() if point.name == name]
    if len(installed) + (name in RULES) > 1:
        values = ", ".join(point.value for point in installed)
        raise ValueError(f"rule={name} exists already, and {values} has the same name; rename or uninstall one.")
    if not installed and name not in RULES:
        names = (*RULES, *(point.name for point in _entry_points()), DIFFUSERS)
        raise ValueError(f"rule={name!r} is not known; allowed: {', '.join(names)}.")
    if not installed:
        return RULES[name]
    try:
        rule = installed[0].load()
    except Exception as error:
        raise ValueError(f"rule={name} cannot be loaded from {installed[0].value}: {error}.") from error
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise ValueError(f"rule={name} is {installed[0].value}, which is no subclass of ddim.diffusion.rules.Rule.")
    return rule


@functools.cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group="ddim.samplers"))


DIFFUSERS = "diffusers"  # the rule of a spec whose steps a scheduler of that package takes

RULES: dict[str, Callable[..., Rule]] = {
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
    "bdia": BDIA,
    "analytic": AnalyticVariance.from_file,
    "learned_variance": LearnedVariance,
    "multinomial": Multinomial,
}
