"""What a file of weights is: which code base wrote it, what it holds, and what it says about itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.checkpoints.convert import diffusers
from ddim.checkpoints.model import UNLABELLED, is_training_checkpoint, read_header, weight_sets
from ddim.checkpoints.spec import KEY, ModelSpec
from ddim.diffusion.schedule import NoiseSchedule
from ddim.errors import UserError
from ddim.io import Tensors, explain_read_errors, is_safetensors, read_safetensors, read_torch, shown
from ddim.networks import UNetSpec

# Each layout in a few words.
LAYOUTS = {
    "flat": "a state dict of the original DDPM names (temb.dense.0.weight, ...)",
    "official": "a training list of the official implementation: model, optimiser, epoch, step, average",
    "diffusers": "a folder or file of diffusers: config.json, diffusion_pytorch_model.safetensors or .bin",
    "lightning": "a training checkpoint of this project",
    "safetensors": "a model file of this project",
}
UNDERSTOOD = "; ".join(f"{name}: {text}" for name, text in LAYOUTS.items())


@dataclass(frozen=True, eq=False)
class Source:
    """What was found in a file.

    Attributes:
        layout: a key of LAYOUTS.
        file: that holds the weights.
        sets: "ema", "online" or "unlabelled" -> those weights, without the prefixes of wrappers.
        step: optimiser steps behind them; None when it does not say.
        network, schedule, prediction, data: what it says about the model; None for what it does not say.
        as_diffusers: whether diffusers' names are those of the parameters.
        notes: for the user.
    """

    layout: str
    file: Path
    sets: dict[str, Tensors]
    step: int | None = None
    network: UNetSpec | None = None
    schedule: NoiseSchedule | None = None
    prediction: str | None = None
    data: str | None = None
    as_diffusers: bool = False
    notes: tuple[str, ...] = ()


def read_source(path: Path) -> Source:
    """Recognise a file or folder and read it.

    Raises:
        UserError: it is not there, damaged, needs code to load, or of no layout that is understood.
    """
    with explain_read_errors(path):
        return _read_source(path)


def _read_source(path: Path) -> Source:
    if path.is_dir():
        return _read_diffusers_folder(path)
    if is_safetensors(path):
        state, metadata = read_safetensors(path)
        if KEY in metadata and not _has_diffusers_names(state):
            spec, facts = read_header(metadata, path)
            sets = {facts["weights"]: _bare(state, path)}
            return _described(Source("safetensors", path, sets, facts["step"]), spec)
        return _read_state(path, state, metadata)
    content = read_torch(path, on_disk=True)
    if is_training_checkpoint(content):
        return _read_lightning(path, content)
    if isinstance(content, list | tuple):
        return _read_official(path, content)
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return _read_state(path, dict(content), {})
    entries = f"the entries {', '.join(map(shown, content))[:200]}" if isinstance(content, Mapping) else type(content)
    raise UserError(f"{path} holds {entries}; understood are {UNDERSTOOD}.")


def _described(source: Source, spec: ModelSpec) -> Source:
    return replace(
        source,
        network=spec.network_spec,
        schedule=spec.schedule,
        prediction=spec.prediction,
        data=spec.data,
    )


def _read_lightning(path: Path, content: Mapping[str, Any]) -> Source:
    sets = {label: _bare(state, path) for label, state in weight_sets(content).items()}
    return _described(Source("lightning", path, sets, content["global_step"]), ModelSpec.from_dict(content[KEY]))


def _read_official(path: Path, content: Any) -> Source:
    model_and_average = [content[i] for i in (0, 4) if i < len(content)]
    if not 4 <= len(content) <= 5 or not all(isinstance(part, Mapping) for part in model_and_average):
        kinds = ", ".join(type(part).__name__ for part in content[:8])
        raise UserError(
            f"{path} holds a list of {len(content)} entries ({kinds}), not the official implementation's model, "
            "optimiser, epoch, step and average."
        )
    step = content[3] if isinstance(content[3], int) else None
    sets = dict(zip(("online", "ema"), (_bare(part, path) for part in model_and_average), strict=False))
    return Source("official", path, sets, step)


def _read_diffusers_folder(folder: Path) -> Source:
    root = folder / "unet" if (folder / "unet").is_dir() else folder
    for name in diffusers.WEIGHTS_FILES:
        if (root / name).is_file():
            if not (root / "config.json").is_file():
                raise UserError(f"{root} has no config.json, which describes the network; get it from where {name} is.")
            return read_source(root / name)
    found = ", ".join(sorted(p.name for p in root.iterdir())[:10]) or "nothing"
    wanted = " or ".join(diffusers.WEIGHTS_FILES)
    raise UserError(f"{root} holds {found}; a folder of diffusers has {wanted}, in unet/ or by itself.")


def _read_state(path: Path, state: Tensors, metadata: Mapping[str, str]) -> Source:
    """Read a plain state dict; with diffusers' names, also the configurations that lie around it."""
    state = _bare(state, path)
    if not _has_diffusers_names(state):
        return Source("flat", path, {UNLABELLED: state})
    config = path.parent / "config.json"
    sets = {UNLABELLED: diffusers.modern_names(state)}
    source = Source("diffusers", path, sets, as_diffusers=True)
    if not config.is_file():
        return source
    source = replace(source, network=diffusers.unet_spec(diffusers.read_json(config), config))
    return _read_header_there(source, metadata) if KEY in metadata else _read_scheduler(source)


def _read_header_there(source: Source, metadata: Mapping[str, str]) -> Source:
    """Read the description that an export of ours leaves in the header of the weights."""
    spec, facts = read_header(metadata, source.file)
    assert source.network is not None
    if diffusers.unet_config(source.network) != diffusers.unet_config(spec.network_spec):
        raise UserError(f"the config.json beside {source.file} is not the one that it was exported with; restore it.")
    sets = {facts["weights"]: source.sets[UNLABELLED]}
    return _described(replace(source, sets=sets, step=facts["step"]), spec)


def _read_scheduler(source: Source) -> Source:
    folder = source.file.parent
    candidates = (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        note = f"no scheduler_config.json belongs to {source.file}: a linear schedule and noise prediction are assumed"
        return replace(source, notes=(note,))
    config = diffusers.read_json(path)
    schedule, prediction = diffusers.read_scheduler(config, path)
    clips = "its scheduler clips the predicted x0, which the paper does not; sampler.clip=x0 does as it does"
    notes = (clips,) if config.get("clip_sample", True) else ()
    return replace(source, schedule=schedule, prediction=prediction, notes=notes)


def _has_diffusers_names(state: Mapping[str, Tensor]) -> bool:
    return any("time_embedding." in name for name in state)


def _bare(state: Mapping[str, Tensor], path: Path) -> Tensors:
    """Take the names of wrappers (DataParallel's `module.`, compile's `_orig_mod.`) out of the names of parameters."""
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise UserError(f"{path}: the entry {wrong[0]!r} is not a tensor, so this is not a state dict.")
    bare = {".".join(p for p in str(k).split(".") if p not in ("module", "_orig_mod")): v for k, v in state.items()}
    if len(bare) < len(state):
        raise UserError(f"{path} holds parameters twice, with and without the prefix module. or _orig_mod.")
    return bare
