"""How a sampler is named in tables, titles and file names."""

from ddim.diffusion.spec import SamplerSpec


def spacing_name(sampler: SamplerSpec, tau: tuple[int, ...], T: int) -> str:
    """Return the name of the times; evaluations with the same name, S and T have the same times."""
    if tau == tuple(range(1, T + 1)):
        return "full"
    if sampler.spacing == "quad_or_full":
        return "quad"
    return sampler.spacing if sampler.times is None else f"explicit {','.join(map(str, tau))}"


def row_label(sampler: SamplerSpec) -> str:
    """Return how a sampler is named in a table's first column: η=0.5, or σ̂, with a clip policy if there is one."""
    plain = sampler.rule if sampler.eta is None else f"{sampler.rule} η={sampler.eta}"
    name = {"ddim": f"η={sampler.eta}", "sigma_hat": "σ̂"}.get(sampler.rule, plain)
    return name if sampler.clip == "none" else f"{name} (clip {sampler.clip})"


def title(sampler: SamplerSpec) -> str:
    """Return a sampler in a few words."""
    steps = f"S={asked_steps(sampler)}" if sampler.times is None else f"{asked_steps(sampler)} times"
    return f"{row_label(sampler)} {steps} {sampler.spacing}"


def asked_steps(sampler: SamplerSpec) -> int:
    """Return the number of steps asked for; `uniform` may take more."""
    return len(sampler.times) if sampler.times is not None else sampler.S or 0
