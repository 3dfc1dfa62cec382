"""Readers of checkpoints of other code bases: recognise the layout; return the weights and their description."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.checkpoints.convert import diffusers
from ddim.checkpoints.convert.parameter_names import update_attention_names
from ddim.checkpoints.model import UNLABELLED, decode_metadata, is_training_checkpoint, weight_sets
from ddim.checkpoints.spec import KEY, ModelSpec
from ddim.config import build
from ddim.diffusion.labels import changes
from ddim.diffusion.schedule import NoiseSchedule, ScheduleSpec
from ddim.errors import UserError
from ddim.io import Tensors, explain_read_errors, is_safetensors, printable, read_safetensors, read_torch
from ddim.networks import UNetSpec

LAYOUTS = {
    "flat": "a state dict of the original DDPM names (temb.dense.0.weight, ...)",
    "official": "a training list of the official implementation: model, optimiser, epoch, step, average",
    "diffusers": "a folder or file of diffusers: config.json, diffusion_pytorch_model.safetensors or .bin",
    "nested": "a dictionary of state dicts: net_model and ema_model, model and ema, or state_dict",
    "lightning": "a training checkpoint of this project",
    "safetensors": "a model file of this project",
}
# The U-Nets of other code bases -> a name that only their parameters have. Each is another network than DDPM's U-Net.
_OTHER_NETWORKS = {
    "improved-diffusion, guided-diffusion and latent diffusion": r"input_blocks\.0\.0\.weight",
    "pytorch-ddpm": r"time_embedding\.timembedding\.\d+\.weight",
    "denoising-diffusion-pytorch": r"init_conv\.weight",
    "score_sde_pytorch": r"all_modules\.0\.weight",
}
_SUPPORTED = "; ".join(f"{name}: {text}" for name, text in LAYOUTS.items())


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint as it was read, before its weights are matched with a network.

    Attributes:
        layout: a key of LAYOUTS.
        file: the file of weights, or the index of `shards`.
        sets: label ("ema", "online" or "unlabelled") -> weights, without the prefixes of wrappers.
        step: number of optimiser steps; None if not stated.
        network, schedule, prediction, data: description of the model; None for what the source does not state.
        classes: likewise, the names of the classes; None.
        sampler: the options of sample.py with which it is sampled as the source does, "" for what is not stated.
        diffusers_names: the weights have diffusers' parameter names.
        notes: warnings for the user.
        shards: the files that hold the weights, if there are several.
    """

    layout: str
    file: Path
    sets: dict[str, Tensors]
    step: int | None = None
    network: UNetSpec | None = None
    schedule: NoiseSchedule | None = None
    prediction: str | None = None
    data: str | None = None
    classes: tuple[str, ...] | None = None
    sampler: str = ""
    diffusers_names: bool = False
    notes: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()

    def described_by(self, spec: ModelSpec) -> "Source":
        """Return this source with the description `spec`."""
        return replace(
            self,
            network=spec.network_spec,
            schedule=spec.schedule,
            prediction=spec.prediction,
            data=spec.data,
            classes=spec.classes,
        )


def read_source(path: Path, weights: str = "auto") -> Source:
    """Recognise and read a file or folder.

    Args:
        path: of it.
        weights: which weights to read where a folder has those of one label in one place and others in another: online
            ones for "online", else the EMA.

    Raises:
        UserError: it does not exist, is damaged, needs code to load, or has no supported layout.
    """
    with explain_read_errors(path):
        if path.is_dir():
            return _read_folder(path, weights)
        if re.search(r"\.index(\.\w+)?\.json$", path.name):
            return _read_sharded(path)
        return _read_safetensors(path) if is_safetensors(path) else _read_torch(path)


def _read_folder(folder: Path, weights: str) -> Source:
    """Read a diffusers folder. Those of its training example have the EMA in unet_ema/, next to unet/."""
    online, ema = folder / "unet", folder / "unet_ema"
    if not ema.is_dir():
        return read_source(_weights_file(online if online.is_dir() else folder))
    if not online.is_dir():
        return read_source(_weights_file(ema))
    source = read_source(_weights_file(online if weights == "online" else ema))
    if weights != "auto":
        return source
    return replace(source, notes=(*source.notes, f"{ema} was taken; weights=online takes {online}"))


def _weights_file(root: Path) -> Path:
    """Return the file of weights in a folder of diffusers, or the index of several."""
    for name in diffusers.WEIGHTS_NAMES:
        if (root / name).is_file():
            if not (root / "config.json").is_file():
                raise UserError(
                    f"{root} has no config.json, which describes the network; copy it from the source of {name}."
                )
            return root / name
    content = ", ".join(sorted(printable(p.name) for p in root.iterdir())[:10]) or "nothing"
    expected = " or ".join(diffusers.WEIGHTS_FILES)
    raise UserError(f"{root} holds {content}; a diffusers folder has {expected}, in unet/ or at the top.")


def _read_sharded(index: Path) -> Source:
    """Read the shards that an index of diffusers lists."""
    files = diffusers.read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(v, str) and Path(v).name == v for v in files.values()):
        raise UserError(f"{index} is no index of weights: it has no weight_map of names and files next to it.")
    shards = tuple(index.parent / name for name in sorted(set(files.values())))
    state: Tensors = {}
    for shard in shards:
        state |= read_safetensors(shard)[0] if is_safetensors(shard) else read_torch(shard, mmap=True)
    return replace(_read_state_dict(index, state, {}), shards=shards)


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
        return _read_nested(path, content)
    raise UserError(f"{path} holds {type(content)}; supported are {_SUPPORTED}.")


def _read_nested(path: Path, content: Mapping[Any, Any]) -> Source:
    """Read a dictionary of which some entries are state dicts."""
    state = {
        f"{key}.{name}": value
        for key, entry in content.items()
        if isinstance(entry, Mapping) and any(str(name).endswith(".weight") for name in entry)
        for name, value in _strip_prefixes(entry, path).items()
    }
    if not _prefixes(state):
        raise UserError(
            f"{path} holds the entries {', '.join(map(printable, content))[:200]}; supported are {_SUPPORTED}."
        )
    steps = [content[key] for key in ("step", "global_step") if type(content.get(key)) is int]
    has_ema = any(_label(str(key)) == "ema" for key in content)
    return replace(_read_networks(path, state, has_ema), step=steps[0] if steps else None)


def _read_networks(path: Path, state: Tensors, has_ema: bool = False) -> Source:
    """Read tensors of which those of each network have a prefix, such as `ema_model.`; others belong to no network.

    Args:
        path: of the file.
        state: name -> tensor.
        has_ema: the file has EMA weights, even if no prefix says so.
    """
    prefixes: dict[str, list[str]] = {}
    for prefix in _prefixes(state):
        prefixes.setdefault(_label(prefix), []).append(prefix)
    if UNLABELLED in prefixes and (has_ema or "ema" in prefixes):
        prefixes["online"] = prefixes.pop(UNLABELLED)  # the copy that an EMA keeps of them is not needed
    if several := next((group for group in prefixes.values() if len(group) > 1), None):
        names = ", ".join(printable(prefix.rstrip(".")) for prefix in several)
        raise UserError(f"{path} holds several networks ({names}); store the state dict of one in a file of its own.")
    sets: dict[str, Tensors] = {}
    for label, (prefix,) in prefixes.items():
        longer = tuple(other for other in _prefixes(state) if len(other) > len(prefix) and other.startswith(prefix))
        own = {k: v for k, v in state.items() if k.startswith(prefix) and not k.startswith(longer)}
        sets[label] = update_attention_names({k.removeprefix(prefix): v for k, v in own.items()})
    betas = next((value for name, value in state.items() if name.rpartition(".")[2] == "betas"), None)
    schedule = None
    if betas is not None:
        schedule = build(ScheduleSpec, {"name": "custom", "betas": betas.tolist()}, f"betas in {path}").build()
    diffusers_names = any(map(_has_diffusers_names, sets.values()))
    notes = ("its EMA weights are stored in another way and were not read",) if has_ema and "ema" not in sets else ()
    return Source("nested", path, sets, schedule=schedule, diffusers_names=diffusers_names, notes=notes)


def _prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Return what precedes the names of each network in a state dict, by its first convolution."""
    return [name.removesuffix("conv_in.weight") for name in state if re.search(r"(^|\.)conv_in\.weight$", name)]


def _label(prefix: str) -> str:
    """Return the label of weights whose names begin with `prefix`."""
    for part in reversed(prefix.split(".")):
        if re.search(r"(^|_)ema(_|$)", part):
            return "ema"
        if re.fullmatch(r"net_model|online(_model)?", part):
            return "online"
    return UNLABELLED


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
    if any(_prefixes(state)):
        return _read_networks(path, state)
    if not _has_diffusers_names(state):
        return Source("flat", path, {UNLABELLED: state})
    state = update_attention_names(state)
    source = Source("diffusers", path, {_label_by_folder(path): state}, diffusers_names=True)
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


def _label_by_folder(path: Path) -> str:
    """Return the label of weights in a folder of diffusers, where the names of file and folder state it."""
    folder = path.absolute().parent
    if folder.name == "unet_ema":
        return "ema"
    is_online = ".non_ema." in path.name or (folder.name == "unet" and (folder.parent / "unet_ema").is_dir())
    return "online" if is_online else UNLABELLED


def _has_diffusers_names(state: Mapping[str, Tensor]) -> bool:
    return any("time_embedding." in name for name in state)


def _strip_prefixes(state: Mapping[str, Tensor], path: Path) -> Tensors:
    """Remove the prefixes of wrappers (DataParallel's `module.`, torch.compile's `_orig_mod.`) from parameter names.

    Raises:
        UserError: this is no state dict, or that of a network which is known to be another.
    """
    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: the entry {wrong[0]!r} is not a tensor, so this is not a state dict.")
    bare = {".".join(p for p in str(k).split(".") if p not in ("module", "_orig_mod")): v for k, v in state.items()}
    if len(bare) < len(state):
        raise UserError(f"{path} holds parameters twice, with and without the prefix module. or _orig_mod.")
    for project, pattern in _OTHER_NETWORKS.items():
        if any(re.search(rf"(^|\.){pattern}$", name) for name in bare):
            raise UserError(
                f"{path} holds the U-Net of {project}, which is another network than DDPM's U-Net; take weights of "
                "DDPM's U-Net."
            )
    return bare
