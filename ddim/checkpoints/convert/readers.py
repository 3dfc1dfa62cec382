"""Readers of checkpoints of other code bases: recognise the layout; return the weights and their description."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.checkpoints.convert import diffusers
from ddim.checkpoints.convert.parameter_names import update_attention_names
from ddim.checkpoints.model import UNLABELLED, decode_metadata, is_training_checkpoint, weight_sets
from ddim.checkpoints.spec import KEY, ModelSpec
from ddim.diffusion.labels import changes
from ddim.diffusion.schedule import NoiseSchedule
from ddim.errors import UserError
from ddim.io import Tensors, explain_read_errors, is_safetensors, printable, read_safetensors, read_torch
from ddim.networks import UNetSpec

LAYOUTS = {
    "flat": "a state dict of the original DDPM names (temb.dense.0.weight, ...)",
    "official": "a training list of the official implementation: model, optimiser, epoch, step, average",
    "diffusers": "a folder or file of diffusers: config.json, diffusion_pytorch_model.safetensors or .bin",
    "lightning": "a training checkpoint of this project",
    "safetensors": "a model file of this project",
}
_SUPPORTED = "; ".join(f"{name}: {text}" for name, text in LAYOUTS.items())


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint as it was read, before its weights are matched with a network.

    Attributes:
        layout: a key of LAYOUTS.
        file: the file of weights.
        sets: label ("ema", "online" or "unlabelled") -> weights, without the prefixes of wrappers.
        step: number of optimiser steps; None if not stated.
        network, schedule, prediction, data: description of the model; None for what the source does not state.
        sampler: the options of sample.py with which it is sampled as the source does, "" for what is not stated.
        diffusers_names: the weights have diffusers' parameter names.
        notes: warnings for the user.
    """

    layout: str
    file: Path
    sets: dict[str, Tensors]
    step: int | None = None
    network: UNetSpec | None = None
    schedule: NoiseSchedule | None = None
    prediction: str | None = None
    data: str | None = None
    sampler: str = ""
    diffusers_names: bool = False
    notes: tuple[str, ...] = ()

    def described_by(self, spec: ModelSpec) -> "Source":
        """Return this source with the description `spec`."""
        return replace(
            self,
            network=spec.network_spec,
            schedule=spec.schedule,
            prediction=spec.prediction,
            data=spec.data,
        )


def read_source(path: Path) -> Source:
    """Recognise and read a file or folder.

    Raises:
        UserError: it does not exist, is damaged, needs code to load, or has no supported layout.
    """
    with explain_read_errors(path):
        if path.is_dir():
            return read_source(_weights_file(path))
        return _read_safetensors(path) if is_safetensors(path) else _read_torch(path)


def _weights_file(folder: Path) -> Path:
    """Return the file of weights in a diffusers folder."""
    root = folder / "unet" if (folder / "unet").is_dir() else folder
    for name in diffusers.WEIGHTS_FILES:
        if (root / name).is_file():
            if not (root / "config.json").is_file():
                raise UserError(
                    f"{root} has no config.json, which describes the network; copy it from the source of {name}."
                )
            return root / name
    content = ", ".join(sorted(p.name for p in root.iterdir())[:10]) or "nothing"
    expected = " or ".join(diffusers.WEIGHTS_FILES)
    raise UserError(f"{root} holds {content}; a diffusers folder has {expected}, in unet/ or at the top.")


def _read_safetensors(path: Path) -> Source:
    state, metadata = read_safetensors(path)
    if KEY not in metadata or _has_diffusers_names(state):
        return _read_state_dict(path, state, metadata)
    model = decode_metadata(metadata, _strip_prefixes(state, path), path)
    return Source("safetensors", path, {model.weights: model.state}, model.step).described_by(model.spec)


def _read_torch(path: Path) -> Source:
    content = read_torch(path, mmap=True)
    if is_training_checkpoint(content):
        return _read_lightning(path, content)
    if isinstance(content, list | tuple):
        return _read_official(path, content)
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return _read_state_dict(path, dict(content), {})
    if isinstance(content, Mapping):
        raise UserError(
            f"{path} holds the entries {', '.join(map(printable, content))[:200]}; supported are {_SUPPORTED}."
        )
    raise UserError(f"{path} holds {type(content)}; supported are {_SUPPORTED}.")


def _read_lightning(path: Path, content: Mapping[str, Any]) -> Source:
    sets = {label: _strip_prefixes(state, path) for label, state in weight_sets(content).items()}
    return Source("lightning", path, sets, content["global_step"]).described_by(ModelSpec.from_dict(content[KEY]))


def _read_official(path: Path, content: Any) -> Source:
    online_and_ema = [content[i] for i in (0, 4) if i < len(content)]
    if not 4 <= len(content) <= 5 or not all(isinstance(state, Mapping) for state in online_and_ema):
        types = ", ".join(type(entry).__name__ for entry in content[:8])
        raise UserError(
            f"{path} holds a list of {len(content)} entries ({types}), not the official implementation's model, "
            "optimiser, epoch, step and average."
        )
    step = content[3] if isinstance(content[3], int) else None
    sets = dict(zip(("online", "ema"), (_strip_prefixes(state, path) for state in online_and_ema), strict=False))
    return Source("official", path, sets, step)


def _read_state_dict(path: Path, state: Tensors, metadata: Mapping[str, str]) -> Source:
    """Read a plain state dict; with diffusers' names, also the configurations next to it."""
    state = _strip_prefixes(state, path)
    if not _has_diffusers_names(state):
        return Source("flat", path, {UNLABELLED: state})
    state = update_attention_names(state)
    source = Source("diffusers", path, {UNLABELLED: state}, diffusers_names=True)
    config = path.parent / "config.json"
    if not config.is_file():
        return source
    network = diffusers.unet_spec(diffusers.read_json(config), config)
    if KEY not in metadata:
        return _read_scheduler(replace(source, network=network))
    # A file that this project exported: its metadata states everything.
    model = decode_metadata(metadata, state, path)
    if diffusers.unet_config(network) != diffusers.unet_config(model.spec.network_spec):
        raise UserError(f"the config.json next to {path} is not the one that it was exported with; restore it.")
    return replace(source, sets={model.weights: state}, step=model.step).described_by(model.spec)


def _read_scheduler(source: Source) -> Source:
    folder = source.file.parent
    candidates = (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        note = f"no scheduler_config.json belongs to {source.file}: a linear schedule and noise prediction are assumed"
        return replace(source, notes=(note,))
    config = diffusers.read_json(path)
    schedule, prediction = diffusers.read_scheduler(config, path)
    sampler = diffusers.read_sampler(config, path)
    clips = "its scheduler clips the predicted x0, which the paper does not; {} does the same"
    notes = (
        ()
        if sampler.clip == "none"
        else (clips.format(changes(sampler, ("clip", "clip_range", "threshold_ratio", "threshold_max"))),)
    )
    return replace(source, schedule=schedule, prediction=prediction, sampler=changes(sampler), notes=notes)


def _has_diffusers_names(state: Mapping[str, Tensor]) -> bool:
    return any("time_embedding." in name for name in state)


def _strip_prefixes(state: Mapping[str, Tensor], path: Path) -> Tensors:
    """Remove the prefixes of wrappers (DataParallel's `module.`, torch.compile's `_orig_mod.`) from parameter names."""
    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: the entry {wrong[0]!r} is not a tensor, so this is not a state dict.")
    bare = {".".join(p for p in str(k).split(".") if p not in ("module", "_orig_mod")): v for k, v in state.items()}
    if len(bare) < len(state):
        raise UserError(f"{path} holds parameters twice, with and without the prefix module. or _orig_mod.")
    return bare
