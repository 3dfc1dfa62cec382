"""Readers of checkpoints of other code bases: recognise the layout; return the weights and their description."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.checkpoints.convert import diffusers
from ddim.checkpoints.convert.nested import COUNTER, network_prefixes, read_nested, read_networks
from ddim.checkpoints.convert.parameter_names import strip_prefixes, update_attention_names
from ddim.checkpoints.convert.source import SUPPORTED, Source
from ddim.checkpoints.model import (
    UNLABELLED,
    decode_metadata,
    has_diffusers_names,
    is_training_checkpoint,
    read_checkpoint,
    recipe_of,
    weight_sets,
)
from ddim.checkpoints.spec import KEY, ModelSpec
from ddim.config import changed_words
from ddim.errors import UserError
from ddim.io import Tensors, explain_read_errors, is_safetensors, printable, read_safetensors, read_torch


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
    return replace(_read_state_dict(index, state), shards=shards)


def _read_safetensors(path: Path) -> Source:
    state, metadata = read_safetensors(path)
    if KEY not in metadata:
        return _read_state_dict(path, state)
    model = decode_metadata(metadata, state, path)  # which states everything
    own = _own_weights(model.state, model.spec, path)
    source = Source("safetensors", path, {model.weights: own}, model.step, model.spec, model.recipe)
    if model.spec.network != "unet" or not has_diffusers_names(own):
        return source
    config = path.parent / "config.json"
    if config.is_file():
        network = diffusers.unet_spec(diffusers.read_json(config), config)
        if diffusers.unet_config(network) != diffusers.unet_config(model.spec.network_spec):
            raise UserError(f"the config.json next to {path} is not the one that it was exported with; restore it.")
    return replace(source, layout="diffusers", diffusers_names=True)


def _own_weights(state: Tensors, spec: ModelSpec, path: Path) -> Tensors:
    """Return weights of a file of this project; another network than the U-Net may have modules of any name."""
    return strip_prefixes(state, path) if spec.network == "unet" else state


def _read_torch(path: Path) -> Source:
    content = read_torch(path, mmap=True)
    if is_training_checkpoint(content):
        return _read_lightning(path, read_checkpoint(path))  # again, with its checksum: torch does not check weights
    if isinstance(content, list | tuple):
        return _read_official(path, content)
    if isinstance(content, Mapping) and content and all(isinstance(value, Tensor) for value in content.values()):
        return _read_state_dict(path, dict(content))
    if isinstance(content, Mapping):
        return read_nested(path, content)
    raise UserError(f"{path} holds {type(content)}; supported are {SUPPORTED}.")


def _read_lightning(path: Path, content: Mapping[str, Any]) -> Source:
    spec = ModelSpec.from_dict(content[KEY])
    sets = {label: _own_weights(state, spec, path) for label, state in weight_sets(content).items()}
    return Source("lightning", path, sets, content["global_step"], spec, recipe_of(content[KEY]))


def _read_official(path: Path, content: Any) -> Source:
    online_and_ema = [content[i] for i in (0, 4) if i < len(content)]
    if not 4 <= len(content) <= 5 or not all(isinstance(state, Mapping) for state in online_and_ema):
        types = ", ".join(type(entry).__name__ for entry in content[:8])
        raise UserError(
            f"{path} holds a list of {len(content)} entries ({types}), not the official implementation's model, "
            "optimiser, epoch, step and average."
        )
    step = content[3] if isinstance(content[3], int) else None
    both = [strip_prefixes({k: v for k, v in state.items() if k != COUNTER}, path) for state in online_and_ema]
    sets = dict(zip(("online", "ema"), both, strict=False))
    return Source("official", path, sets, step)


def _read_state_dict(path: Path, state: Tensors) -> Source:
    """Read a plain state dict; with diffusers' names, also the configurations next to it."""
    state = strip_prefixes(state, path)
    prefixes = network_prefixes(state)
    if any(prefixes) or (prefixes and COUNTER in state):
        return read_networks(path, state)
    if not has_diffusers_names(state):
        return Source("flat", path, {UNLABELLED: state})
    state = update_attention_names(state)
    source = Source("diffusers", path, {_label_by_folder(path): state}, diffusers_names=True)
    config = path.parent / "config.json"
    if not config.is_file():
        return source
    return _read_scheduler(replace(source, network=diffusers.unet_spec(diffusers.read_json(config), config)))


def _read_scheduler(source: Source) -> Source:
    folder = source.file.parent
    candidates = (folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json")
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return replace(source, unstated=f"no scheduler_config.json belongs to {source.file}")
    config = diffusers.read_json(path)
    if not diffusers.has_betas(config):
        name = printable(config.get("_class_name", "a scheduler without a name"))
        return replace(source, unstated=f"{path} is of {name}, which has no betas as DDPM has", may_assume=False)
    schedule, prediction = diffusers.read_scheduler(config, path)
    sampler = diffusers.read_sampler(config, path)
    clips = "its scheduler clips the predicted x0, which the paper does not; {} does the same"
    clip = " ".join(changed_words("sampler", sampler, ("clip", "clip_range", "threshold_ratio", "threshold_max")))
    notes = () if sampler.clip == "none" else (clips.format(clip),)
    words = " ".join(changed_words("sampler", sampler))
    return replace(source, schedule=schedule, prediction=prediction, sampler=words, notes=notes)


def _label_by_folder(path: Path) -> str:
    """Return the label of weights in a folder of diffusers, where the names of file and folder state it."""
    folder = path.absolute().parent
    if folder.name == "unet_ema":
        return "ema"
    is_online = ".non_ema." in path.name or (folder.name == "unet" and (folder.parent / "unet_ema").is_dir())
    return "online" if is_online else UNLABELLED
