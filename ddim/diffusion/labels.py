"""How a sampler is named in tables, titles and file names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddim.diffusion.spec import SamplerSpec


def spacing_name(sampler: SamplerSpec, tau: tuple[int, ...], T: int) -> str:
    """Return the name of the times; evaluations with the same name, S and T have the same times, but for files."""
    if tau == tuple(range(1, T + 1)):
        return "full"
    if sampler.spacing == "quad_or_full":
        return "quad"
    return _spacing(sampler) if sampler.times is None else f"explicit {','.join(map(str, tau))}"


def _spacing(sampler: SamplerSpec) -> str:
    return Path(sampler.spacing).stem if sampler.has_file else sampler.spacing


def row_label(sampler: SamplerSpec) -> str:
    """Return how a table's first column names a sampler: η=0.5, or UniPC-2 B2, with a clip policy if there is one."""
    rule = sampler.build_rule()
    name = LABELS[sampler.rule](rule) if sampler.rule in LABELS else str(rule)
    return name if sampler.clip == "none" else f"{name} (clip {sampler.clip})"


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
    return f"{row_label(sampler)} {steps} {_spacing(sampler)}"


def asked_steps(sampler: SamplerSpec) -> int:
    """Return the number of steps asked for; `uniform` may take more."""
    return len(sampler.times) if sampler.times is not None else sampler.S or 0
