"""The two file formats of this project: training checkpoints, and model files with one set of weights.

A training checkpoint is Lightning's file plus one entry, `ddim`: the description of the model in plain values. A model
file is safetensors with the same description as JSON in its header. Each is sufficient to sample from, and loading
never executes code from the file.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.checkpoints.checksum import checksum_error, has_checksum
from ddim.checkpoints.shipped import locate_checkpoint
from ddim.checkpoints.spec import KEY, ModelSpec
from ddim.config import choose
from ddim.diffusion.guidance import Condition
from ddim.errors import UserError
from ddim.io import Tensors, explain_read_errors, is_safetensors, read_safetensors, read_torch, write_safetensors
from ddim.networks import build_network, without_memory, zero_based

# Entries of a training checkpoint.
HAS_CHECKSUM = "sealed"  # in the description: true if the file was written with a checksum
WANDB_RUN = "wandb_run"  # in the description: [ENTITY/]PROJECT/RUNID of the training, if it was logged to W&B
RECIPE = "recipe"  # in the description: the training settings, compared when resuming; also in that of model files
EMA_STATE = "EMA"  # in `callbacks`: {"shadow": {parameter name: tensor}, "others": {rate: shadow}, ...}
NETWORK_PREFIX = "network."  # of the online weights in `state_dict`

# Labels of weights.
POSTHOC = "posthoc_"  # begins the label of a post-hoc EMA, which ends with its length; see posthoc.py
WEIGHTS = rf"online|ema(_[\d.e-]+)?|{POSTHOC}[\d.e-]+"  # regular expression of the labels that can be requested
OLD_LABELS = {"raw": "online"}  # in files and commands of earlier versions
UNLABELLED = "unlabelled"  # imported weights of which it is not known whether they are EMA or online


@dataclass(frozen=True, eq=False)
class StoredModel:
    """The content of a model file: a description and one set of weights, without a network.

    Attributes:
        spec: the description of the model.
        state: parameter name -> weights.
        weights: their label: "ema", "ema_RATE", "posthoc_LENGTH", "online" or "unlabelled".
        step: number of optimiser steps; None if unknown.
        origin: where the weights come from, human-readable: the imported file, or the W&B run of the training.
        recipe: the settings of the training by key; {} where they are not known.
    """

    spec: ModelSpec
    state: Tensors
    weights: str
    step: int | None
    origin: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network ready to sample from.

    Attributes:
        spec: the description of the model.
        network: in eval mode, on the CPU, parameters without gradients.
        weights: label of the weights: "ema", "ema_RATE", "posthoc_LENGTH", "online" or "unlabelled".
        weights_hash: SHA-256 of the weights.
        step: number of optimiser steps; None if unknown.
        recipe: the settings of the training by key; {} where they are not known.
        origin: as in `StoredModel`.
        condition: what the images of a conditional network are to show; None leaves that to who calls it.
    """

    spec: ModelSpec
    network: nn.Module
    weights: str
    weights_hash: str
    step: int | None
    recipe: dict[str, Any] = field(default_factory=dict, kw_only=True)
    origin: dict[str, str] = field(default_factory=dict, kw_only=True)
    condition: Condition | None = field(default=None, kw_only=True)

    def __call__(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the network's prediction for x_t (B, C, H, W) at the paper's times t (B,), 1..T.

        A conditional network takes labels y too, (B,) int64 in 0..K, where K is no label, which None stands for. x_t
        may be on another device, where the prediction then is: on the CPU for a device without float64.
        """
        if y is None and self.spec.num_classes is not None:
            y = torch.full_like(t, self.spec.num_classes, dtype=torch.int64)
        device = next(self.network.parameters(), x_t).device
        y = None if y is None else y.to(device)
        return zero_based(self.network)(x_t.to(device), t.to(device), y).to(x_t.device)


def load_model(path: str | Path, weights: str = "ema") -> LoadedModel:
    """Build the network that a checkpoint describes, with its weights.

    Args:
        path: a file that `scripts/train.py`, `scripts/import_checkpoint.py` or `scripts/export_checkpoint.py` wrote, or
            the name of a model that ships with the package: a key of `SHIPPED`.
        weights: "ema" for the EMA weights, "online" for the weights that the optimiser updates, "ema_RATE" for an
            additional EMA, "posthoc_LENGTH" for a post-hoc EMA, which "ema" takes too.

    Raises:
        UserError: the file does not exist, is damaged or unknown, lacks these weights, or its weights do not fit its
            description.
    """
    stored = read_model(path, weights)
    device = without_memory(stored.spec.network)  # a description may claim any size
    with explain_read_errors(path), device:
        network = build_network(stored.spec.network, stored.spec.network_spec)
        state = {name: value.to(device) for name, value in stored.state.items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        if len(reason) > 300:  # hundreds of names
            reason = f"{reason[:300].rpartition(', ')[0] or reason[:300]} and more"
        raise UserError(f"the weights in {path} do not fit the network it describes: {reason}.") from error
    with explain_read_errors(path):
        network = build_network(stored.spec.network, stored.spec.network_spec)
        network.load_state_dict(stored.state)
    network.requires_grad_(False).eval()
    hashed = weights_hash(stored.state)
    return LoadedModel(
        stored.spec, network, stored.weights, hashed, stored.step, recipe=stored.recipe, origin=stored.origin
    )


def read_model(path: str | Path, weights: str = "ema") -> StoredModel:
    """Read a training checkpoint or model file without building the network; see `load_model`."""
    weights = OLD_LABELS.get(weights, weights)
    if not re.fullmatch(WEIGHTS, weights):
        choose("weights", weights, {"ema": None, "online": None, "ema_RATE": None, f"{POSTHOC}LENGTH": None})
    path = locate_checkpoint(path)
    with explain_read_errors(path):
        if path.is_file() and is_safetensors(path):
            return _read_model_file(path, weights)
        checkpoint = read_checkpoint(path)
        sets = weight_sets(checkpoint)
        if weights.startswith(POSTHOC):
            raise UserError(f"{path} holds no post-hoc EMA, which is a file of its own; make it with scripts/ema.py.")
        if weights == "ema" and weights not in sets:
            raise UserError(f"{path} holds no EMA weights (it was trained without EMA); choose weights=online.")
        state = choose("weights", weights, sets)
        description = checkpoint[KEY]
        run, recipe = description.get(WANDB_RUN), recipe_of(description)
        origin = {WANDB_RUN: run} if isinstance(run, str) else {}
        return StoredModel(ModelSpec.from_dict(description), state, weights, checkpoint["global_step"], origin, recipe)


def recipe_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe in a description, as JSON holds it; {} without one that it can hold.

    A file may be made up, and older model files have none; no number depends on it.
    """
    try:
        return dict(json.loads(json.dumps(description.get(RECIPE) or {}, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        return {}


def save_model(model: StoredModel, path: Path) -> None:
    """Write a model file: the weights under the network's parameter names, everything else in the header."""
    write_safetensors(path, model.state, encode_metadata(model))


def encode_metadata(model: StoredModel) -> dict[str, str]:
    """Return the metadata of a model file: everything about the model except its weights, as JSON."""
    description = model.spec.to_dict()
    description["schedule"]["alpha_bar"] = model.spec.schedule.alpha_bar.tolist()  # JSON keeps every digit of a float64
    recipe = {RECIPE: model.recipe} if model.recipe else {}
    values = {**description, "weights": model.weights, "step": model.step, "origin": model.origin, **recipe}
    return {KEY: json.dumps(values)}


def decode_metadata(metadata: Mapping[str, str], state: Tensors, path: Path) -> StoredModel:
    """Return the model that a file's metadata and tensors make up; undoes `encode_metadata`.

    Raises:
        UserError: the description is missing, damaged or of another version.
    """
    if KEY not in metadata:
        raise UserError(
            f"{path} is not a checkpoint of this project: it does not describe its model; convert it with "
            "scripts/import_checkpoint.py."
        )
    try:
        values = json.loads(metadata[KEY])
        fields = {key: values[key] for key in ("weights", "step", "origin")}
        fields["weights"] = OLD_LABELS.get(fields["weights"], fields["weights"])
        values["schedule"]["alpha_bar"] = torch.tensor(values["schedule"]["alpha_bar"], dtype=torch.float64)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"the description of the model in {path} is not understood ({reason}).") from error
    weights, step, origin = fields.values()
    valid = {
        "weights": isinstance(weights, str) and re.fullmatch(rf"{WEIGHTS}|{UNLABELLED}", weights),
        "step": step is None or (type(step) is int and step >= 0),
        "origin": isinstance(origin, dict) and all(isinstance(v, str) for v in origin.values()),
    }
    if wrong := [f"{key}={fields[key]!r}"[:80] for key, is_valid in valid.items() if not is_valid]:
        raise UserError(f"the description of the model in {path} is not understood ({', '.join(wrong)}).")
    return StoredModel(ModelSpec.from_dict(values), state, **fields, recipe=recipe_of(values))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a training checkpoint, tensors on the CPU.

    Raises:
        UserError: the file does not exist, is damaged, needs code to load, or was not written by this project.
    """
    path = Path(path)
    checksum_verified = path.is_file() and has_checksum(path)
    checkpoint = read_torch(path)
    if not is_training_checkpoint(checkpoint):
        raise UserError(
            f"{path} is not a checkpoint of this project: it does not describe its model; if it is a published one, "
            "convert it with scripts/import_checkpoint.py."
        )
    if checkpoint[KEY].get(HAS_CHECKSUM) and not checksum_verified:
        raise checksum_error(path)
    return checkpoint


def is_training_checkpoint(content: Any) -> bool:
    """Whether the content of a file is that of a training checkpoint of this project."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), Mapping) for key in (KEY, "state_dict")):
        return False
    step = content.get("global_step")
    return type(step) is int and step >= 0


def weight_sets(checkpoint: Mapping[str, Any]) -> dict[str, Tensors]:
    """Return the weights in a training checkpoint: label ("online", "ema", "ema_RATE") -> weights."""
    state, ema = checkpoint["state_dict"], checkpoint.get("callbacks", {}).get(EMA_STATE, {})
    online = {k.removeprefix(NETWORK_PREFIX): v for k, v in state.items() if k.startswith(NETWORK_PREFIX)}
    shadows = {"ema": ema["shadow"]} if ema.get("shadow") else {}
    shadows |= {f"ema_{rate}": shadow for rate, shadow in ema.get("others", {}).items()}
    # The EMA covers parameters only; buffers, if the network has any, are those of the online network.
    return {"online": online} | {label: online | shadow for label, shadow in shadows.items()}


def saw_labels_only(model: StoredModel | LoadedModel) -> bool:
    """Return whether a conditional network was trained without dropping labels; False where that is not known."""
    return model.spec.num_classes is not None and model.recipe.get("objective.label_drop") == 0


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values, sorted by name; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        flat = value.reshape(-1)
        flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)  # one element
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def has_diffusers_names(state: Mapping[str, Tensor]) -> bool:
    """Return whether parameters of a U-Net have the names that they have in files of diffusers."""
    return any("time_embedding." in name for name in state)


def _read_model_file(path: Path, weights: str) -> StoredModel:
    state, metadata = read_safetensors(path)
    half = (torch.float16, torch.bfloat16)  # of half the size; their numbers are float32's too
    state = {name: value.float() if value.dtype in half else value for name, value in state.items()}
    stored = decode_metadata(metadata, state, path)
    if stored.spec.network == "unet" and has_diffusers_names(state):
        folder = path.parent.parent if path.parent.name == "unet" else path.parent
        place = folder if (path.parent / "config.json").is_file() else path
        raise UserError(
            f"the parameters in {path} have diffusers' names; make a model file of it with "
            f"scripts/import_checkpoint.py checkpoint={place}, and give that."
        )
    is_asked = stored.weights in (weights, UNLABELLED) or (weights == "ema" and stored.weights.startswith(POSTHOC))
    if not is_asked:
        raise UserError(f"{path} holds {stored.weights} weights only; choose weights={stored.weights}.")
    return stored
