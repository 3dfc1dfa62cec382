"""How a sampler is named in tables, titles and file names."""

from collections.abc import Callable, Sequence
from typing import Any

from ddim.diffusion.spec import SamplerSpec


def spacing_name(sampler: SamplerSpec, tau: Sequence[float], T: int) -> str:
    """Return the name of the times; evaluations with the same name, S and T have the same times."""
    if tuple(tau) == tuple(range(1, T + 1)):
        return "full"
    if sampler.spacing == "quad_or_full":
        return "quad"
    return sampler.spacing if sampler.times is None else f"explicit {','.join(map(str, tau))}"


def row_label(sampler: SamplerSpec) -> str:
    """Return how a table's first column names a sampler: η=0.5, or UniPC-2 B2, with a clip policy if there is one."""
    if sampler.scheduler is not None:
        return _with_arguments(sampler.scheduler, sampler)
    rule = sampler.build_rule()
    if sampler.rule in LABELS:
        name = LABELS[sampler.rule](rule)
    else:  # of another package
        name = rule.label or _with_arguments(type(rule).__name__, sampler)
    return name if sampler.clip == "none" else f"{name} (clip {sampler.clip})"


def _with_arguments(name: str, sampler: SamplerSpec) -> str:
    given = {"eta": sampler.eta, "order": sampler.order} | (sampler.kwargs or {})
    listed = ", ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    return f"{name} ({listed})" if listed else name


LABELS: dict[str, Callable[[Any], str]] = {
    "ddim": lambda rule: f"η={rule.eta}",
    "sigma_hat": lambda rule: "σ̂",
    "probability_flow": lambda rule: "Euler in σ̄² (Eq. 15)",
    "heun": lambda rule: "Heun",
    "adams_bashforth": lambda rule: f"AB{rule.order}",
    "ipndm": lambda rule: f"iPNDM-{rule.order}",
    "deis": lambda rule: f"{'t' if rule.variable == 't' else 'log ρ '}AB{rule.order}-DEIS",
    "dpm_solver_pp": lambda rule: f"DPM-Solver++ {rule.order}M",
    "sde_dpm_solver_pp": lambda rule: f"SDE-DPM-Solver++ {rule.order}M",
    "unipc": lambda rule: f"Uni{'PC' if rule.corrector else 'P'}-{rule.order} {rule.variant}",
}


def title(sampler: SamplerSpec) -> str:
    """Return a sampler in a few words."""
    steps = f"S={asked_steps(sampler)}" if sampler.times is None else f"{asked_steps(sampler)} times"
    return f"{row_label(sampler)} {steps} {sampler.spacing}"


def asked_steps(sampler: SamplerSpec) -> int:
    """Return the number of steps asked for; `uniform` may take more."""
    return len(sampler.times) if sampler.times is not None else sampler.S or 0
