"""The two files of this project: a training checkpoint, and one set of weights for everything after training.

A training checkpoint is Lightning's file plus one entry, `ddim`: the description of the model in plain values. A model
file is safetensors with the same description in its header, as JSON. Either is enough to sample from, and neither ever
needs code to load.
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
from ddim.checkpoints.spec import KEY, ModelSpec
from ddim.config import choose
from ddim.errors import UserError
from ddim.io import (
    Tensors,
    explain_read_errors,
    is_safetensors,
    read_safetensors,
    read_torch,
    write_safetensors,
)
from ddim.networks import build_network, zero_based

HAS_CHECKSUM = "sealed"  # in the description of a training checkpoint: true when the file was written with a checksum
RECIPE = "recipe"  # in the description of a training checkpoint: the settings of the training, for resuming
EMA_STATE = (
    "EMA"  # the entry of `callbacks` that holds {"shadow": {parameter name: tensor}, "others": {rate: shadow}, ...}
)
NETWORK_PREFIX = "network."  # of the online weights in `state_dict`
WEIGHTS = r"online|ema(_[\d.e-]+)?"  # pattern of a label
OLD_LABELS = {"raw": "online"}  # in files and commands of earlier versions
UNLABELLED = "unlabelled"  # weights of which nobody said whether they are averaged


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A model as it lies in a file: its description and one set of weights, without a network.

    Attributes:
        spec: its description.
        state: the weights by the names of the network's parameters.
        weights: "ema", "online" or "unlabelled".
        step: optimiser steps behind them; None when the file does not say.
        origin: where the weights were imported from, for people to read; {} for those trained here.
    """

    spec: ModelSpec
    state: Tensors
    weights: str
    step: int | None
    origin: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network ready to sample from.

    Attributes:
        spec: its description.
        network: in eval mode, on the CPU, parameters without gradients.
        weights: "ema", "online" or "unlabelled".
        weights_hash: SHA-256 of the weights that were taken.
        step: optimiser steps behind them; None when the file does not say.
    """

    spec: ModelSpec
    network: nn.Module
    weights: str
    weights_hash: str
    step: int | None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The model of the diffusion: the network behind its time adapter, at paper times 1..T."""
        return zero_based(self.network)(x_t, t)


def load_model(path: str | Path, weights: str = "ema") -> LoadedModel:
    """Rebuild a network from a checkpoint alone.

    Args:
        path: a file that `scripts/train.py`, `scripts/import_checkpoint.py` or `scripts/export_checkpoint.py` wrote.
        weights: "ema" for the EMA weights, "online" for the weights that the optimiser updates, "ema_RATE" for another
            average.

    Raises:
        UserError: no such file, a damaged or foreign one, one without those weights, or weights that do not fit its
            own description.
    """
    stored = read_model(path, weights)
    with explain_read_errors(path):
        network = build_network(stored.spec.network, stored.spec.network_spec)
    try:
        network.load_state_dict(stored.state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(f"the weights in {path} do not fit the network it describes: {reason}.") from error
    network.requires_grad_(False).eval()
    return LoadedModel(stored.spec, network, stored.weights, weights_hash(stored.state), stored.step)


def read_model(path: str | Path, weights: str = "ema") -> StoredModel:
    """Return what a file of this project holds, without building a network; see `load_model`."""
    weights = OLD_LABELS.get(weights, weights)
    if not re.fullmatch(WEIGHTS, weights):
        choose("weights", weights, {"ema": None, "online": None, "ema_RATE": None})
    path = Path(path)
    with explain_read_errors(path):
        if path.is_file() and is_safetensors(path):
            return _read_model_file(path, weights)
        checkpoint = read_checkpoint(path)
        sets = weight_sets(checkpoint)
        if weights == "ema" and weights not in sets:
            raise UserError(f"{path} holds no EMA weights (it was trained without EMA); choose weights=online.")
        state = choose("weights", weights, sets)
        return StoredModel(ModelSpec.from_dict(checkpoint[KEY]), state, weights, checkpoint["global_step"])


def save_model(model: StoredModel, path: Path) -> None:
    """Write a model file: the weights under the network's own names, everything else in the header."""
    write_safetensors(path, model.state, header(model))


def header(model: StoredModel) -> dict[str, str]:
    """Return the metadata of a model file."""
    description = model.spec.to_dict()
    description["schedule"]["alpha_bar"] = model.spec.schedule.alpha_bar.tolist()  # JSON keeps every digit of a float64
    facts = {"weights": model.weights, "step": model.step, "origin": model.origin}
    return {KEY: json.dumps({**description, **facts})}


def read_header(metadata: Mapping[str, str], path: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """Return the description in a header, and the facts beside it: weights, step, origin.

    Raises:
        UserError: it has none, or one that is not understood.
    """
    if KEY not in metadata:
        raise UserError(
            f"{path} is not a checkpoint of this project: it does not describe its model; make one of it with "
            "scripts/import_checkpoint.py."
        )
    try:
        values = json.loads(metadata[KEY])
        facts = {key: values[key] for key in ("weights", "step", "origin")}
        facts["weights"] = OLD_LABELS.get(facts["weights"], facts["weights"])
        values["schedule"]["alpha_bar"] = torch.tensor(values["schedule"]["alpha_bar"], dtype=torch.float64)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"the description of the model in {path} is not understood ({reason}).") from error
    understood = {
        "weights": isinstance(facts["weights"], str) and re.fullmatch(rf"{WEIGHTS}|{UNLABELLED}", facts["weights"]),
        "step": facts["step"] is None or (type(facts["step"]) is int and facts["step"] >= 0),
        "origin": isinstance(facts["origin"], dict) and all(isinstance(v, str) for v in facts["origin"].values()),
    }
    if wrong := [f"{key}={facts[key]!r}"[:80] for key, right in understood.items() if not right]:
        raise UserError(f"the description of the model in {path} is not understood ({', '.join(wrong)}).")
    return ModelSpec.from_dict(values), facts


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a training checkpoint, tensors on the CPU.

    Raises:
        UserError: no such file, a damaged one, one that needs code to load, or one that is not ours.
    """
    path = Path(path)
    has_seal = path.is_file() and has_checksum(path)
    checkpoint = read_torch(path)
    if not is_training_checkpoint(checkpoint):
        raise UserError(
            f"{path} is not a checkpoint of this project: it does not describe its model; if it is a published one, "
            "make one of it with scripts/import_checkpoint.py."
        )
    if checkpoint[KEY].get(HAS_CHECKSUM) and not has_seal:
        raise checksum_error(path)
    return checkpoint


def is_training_checkpoint(content: Any) -> bool:
    """Whether the content of a file is that of a training checkpoint of this project."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), Mapping) for key in (KEY, "state_dict")):
        return False
    step = content.get("global_step")
    return type(step) is int and step >= 0


def weight_sets(checkpoint: Mapping[str, Any]) -> dict[str, Tensors]:
    """Return the weights in a training checkpoint: "online"; "ema", the first average; "ema_RATE" for each other."""
    state, average = checkpoint["state_dict"], checkpoint.get("callbacks", {}).get(EMA_STATE, {})
    online = {k.removeprefix(NETWORK_PREFIX): v for k, v in state.items() if k.startswith(NETWORK_PREFIX)}
    shadows = {"ema": average["shadow"]} if average.get("shadow") else {}
    shadows |= {f"ema_{rate}": shadow for rate, shadow in average.get("others", {}).items()}
    # The average covers parameters; a network's buffers, if it has any, are taken as they are.
    return {"online": online} | {label: online | shadow for label, shadow in shadows.items()}


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and values, in the order of the names; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        flat = value.reshape(-1)
        flat = flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)  # of a single number
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_model_file(path: Path, weights: str) -> StoredModel:
    state, metadata = read_safetensors(path)
    spec, facts = read_header(metadata, path)
    if facts["weights"] not in (weights, UNLABELLED):
        raise UserError(f"{path} holds {facts['weights']} weights only; choose weights={facts['weights']}.")
    return StoredModel(spec, state, **facts)
