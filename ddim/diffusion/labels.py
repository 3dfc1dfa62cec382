"""How a sampler is named in tables, titles and file names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import respaced_count


def spacing_name(sampler: SamplerSpec, tau: Sequence[float], T: int) -> str:
    """Return the name of the times; evaluations with the same name, S and T have the same times, but for files."""
    if tuple(tau) == tuple(range(1, T + 1)):
        return "full"
    if sampler.spacing == "quad_or_full":
        return "quad"
    if sampler.steps_offset:
        return f"{sampler.spacing}+{sampler.steps_offset}"
    return _spacing(sampler) if sampler.times is None else f"explicit {','.join(map(str, tau))}"


def _spacing(sampler: SamplerSpec) -> str:
    return Path(sampler.spacing).stem if sampler.has_file else sampler.spacing


def row_label(sampler: SamplerSpec) -> str:
    """Return how a table's first column names a sampler: η=0.5, or UniPC-2 B2, with what is added to it."""
    if sampler.scheduler is not None:
        return _with_arguments(sampler.scheduler, sampler)
    rule = sampler.build_rule()
    if sampler.rule in LABELS:
        name = LABELS[sampler.rule](rule)
    else:  # of another package
        name = rule.label or _with_arguments(type(rule).__name__, sampler)
    if sampler.corrector_steps:
        name = f"PC ({name}, M={sampler.corrector_steps}, r={sampler.corrector_snr:g})"  # predictor and corrector
    if sampler.clip == "none":
        return name
    limit = "" if sampler.clip_range == 1 else f" to ±{sampler.clip_range}"
    if sampler.threshold_ratio is not None:
        limit = f", threshold {sampler.threshold_ratio}"
        limit += "" if sampler.threshold_max is None else f" up to {sampler.threshold_max}"
    return f"{name} (clip {sampler.clip}{limit})"


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
    "bdia": lambda rule: "BDIA",
    "analytic": lambda rule: (
        {1: "Analytic-DDPM", 0: "Analytic-DDIM"}.get(rule.eta, f"Analytic-DDIM η={rule.eta}")
        + ("" if rule.clip_bound else ", bound not clipped")
    ),
    "learned_variance": lambda rule: "learned σ",
    "multinomial": lambda rule: f"σ={rule.sigma_fraction} σ_max",
}


def title(sampler: SamplerSpec) -> str:
    """Return a sampler in a few words."""
    count = asked_steps(sampler)
    steps = f"NFE={sampler.nfe}" if sampler.nfe else f"S={count}" if sampler.times is None else f"{count} times"
    return f"{row_label(sampler)} {steps} {_spacing(sampler)}"


def asked_steps(sampler: SamplerSpec) -> int:
    """Return the number of steps asked for; `uniform` may take more."""
    return len(sampler.times or ()) or sampler.steps or respaced_count(sampler.spacing) or 0


def asked_evaluations(sampler: SamplerSpec) -> int:
    """Return the network evaluations of an image that S and the rule ask for; `uniform` and `quad` may take others."""
    return sampler.nfe or 1 + (asked_steps(sampler) - 1) * sampler.evaluations_per_step
