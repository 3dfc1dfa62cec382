"""What travels with the weights, and reading it back.

A training checkpoint is Lightning's file plus one entry, `ddim`: the description of the model in plain values. So a
checkpoint file alone is enough to sample, and it loads with `weights_only=True`; nothing in it is ever executed.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.config import build, choose
from ddim.diffusion.prediction import PREDICTIONS
from ddim.diffusion.schedule import NoiseSchedule
from ddim.errors import UserError
from ddim.networks import NETWORKS, build_network, zero_based

FORMAT = 1
KEY = "ddim"  # the entry of a checkpoint that holds ModelSpec.to_dict()
RECIPE = "recipe"  # in that entry: the settings of the training, for resuming
EMA_STATE = "EMA"  # the entry of `callbacks` that holds {"shadow": {parameter name: tensor}, ...}
NETWORK_PREFIX = "network."  # of the raw weights in `state_dict`


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """Everything about a model but its weights.

    Attributes:
        network: a key of NETWORKS.
        network_spec: the spec of that network.
        schedule: the noise levels it is trained with.
        prediction: what it predicts, a key of PREDICTIONS.
        data: the name of the training set, for people to read.

    Images are float tensors (C, H, W) in [-1, 1]; networks take the times 0..T-1.
    """

    network: str
    network_spec: Any
    schedule: NoiseSchedule
    prediction: str = "eps"
    data: str = ""

    def __post_init__(self) -> None:
        choose("prediction", self.prediction, PREDICTIONS)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.network_spec.channels, *self.network_spec.image_size)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values and one tensor, as stored in a checkpoint."""
        network_spec = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self.network_spec).items()
        }
        return {
            "format": FORMAT,
            "network": {"name": self.network, **network_spec},
            "schedule": {"name": self.schedule.name, "alpha_bar": self.schedule.alpha_bar},
            "prediction": self.prediction,
            "image": {"shape": list(self.image_shape), "range": [-1.0, 1.0]},
            "data": self.data,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """Read what `to_dict` wrote.

        Raises:
            UserError: another format, or an entry that is missing or not understood.
        """
        if values.get("format") != FORMAT:
            raise UserError(f"the checkpoint has format {values.get('format')!r}; this version reads format {FORMAT}.")
        try:
            network = dict(values["network"])
            name = network.pop("name")
            schedule = NoiseSchedule(values["schedule"]["alpha_bar"], values["schedule"]["name"])
            network_spec = build(choose("network", name, NETWORKS)[0], network, "network")
            return cls(name, network_spec, schedule, values["prediction"], values["data"])
        except KeyError as error:
            raise UserError(f"the checkpoint's description of its model lacks {error}.") from error
        except (TypeError, ValueError, AttributeError) as error:
            reason = str(error).rstrip(".")
            raise UserError(f"the checkpoint's description of its model is not understood: {reason}.") from error

    def differences(self, other: "ModelSpec") -> list[str]:
        """Return one phrase for each thing that makes weights of one model useless for the other; [] when none does."""
        mine, theirs = self.to_dict(), other.to_dict()
        found = [
            f"network.{key}: {mine['network'].get(key)} and {theirs['network'].get(key)}"
            for key in {**mine["network"], **theirs["network"]}
            # These two change how a network is trained, not what its weights mean.
            if key not in ("dropout", "init") and mine["network"].get(key) != theirs["network"].get(key)
        ]
        if not torch.equal(self.schedule.alpha_bar, other.schedule.alpha_bar):
            found.append(
                f"schedule: {self.schedule.name} with T={self.schedule.T} and "
                f"{other.schedule.name} with T={other.schedule.T}"
            )
        if self.prediction != other.prediction:
            found.append(f"prediction: {self.prediction} and {other.prediction}")
        return found


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network ready to sample from.

    Attributes:
        spec: its description.
        network: in eval mode, on the CPU, parameters without gradients.
        weights: "ema" or "raw".
        weights_hash: SHA-256 of the weights that were taken.
        step: optimiser steps behind them.
    """

    spec: ModelSpec
    network: nn.Module
    weights: str
    weights_hash: str
    step: int

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The model of the diffusion: the network behind its time adapter, at paper times 1..T."""
        return zero_based(self.network)(x_t, t)


def load_model(path: str | Path, weights: str = "ema") -> LoadedModel:
    """Rebuild a network from a checkpoint alone.

    Args:
        path: a file that `scripts/train.py` wrote.
        weights: "ema" for the averaged weights, "raw" for those that the optimiser moves.

    Raises:
        UserError: no such file, a damaged or foreign one, or weights that do not fit its own description.
    """
    checkpoint = read_checkpoint(path)
    spec = ModelSpec.from_dict(checkpoint[KEY])
    state = choose("weights", weights, {"ema": _ema_weights, "raw": _raw_weights})(checkpoint, path)
    network = build_network(spec.network, spec.network_spec)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise UserError(f"the weights in {path} do not fit the network it describes: {reason}.") from error
    network.requires_grad_(False).eval()
    return LoadedModel(spec, network, weights, weights_hash(state), int(checkpoint["global_step"]))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return the content of a training checkpoint, tensors on the CPU.

    Raises:
        UserError: no such file, a damaged one, one that needs code to load, or one that is not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give the path of a .ckpt file that scripts/train.py wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes of a damaged or foreign file make the reader stumble over
        reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"{path} cannot be read as a checkpoint: it is cut short, damaged or of another kind ({reason})."
        ) from error
    entries = {KEY: Mapping, "state_dict": Mapping, "global_step": int}
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), kind) for k, kind in entries.items()):
        raise UserError(f"{path} is not a checkpoint of this project: it does not describe its model.")
    return checkpoint


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names and values, in the order of the names; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}:".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _raw_weights(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    state = checkpoint["state_dict"]
    return {k.removeprefix(NETWORK_PREFIX): v for k, v in state.items() if k.startswith(NETWORK_PREFIX)}


def _ema_weights(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    shadow = checkpoint.get("callbacks", {}).get(EMA_STATE, {}).get("shadow")
    if not shadow:
        raise UserError(f"{path} holds no averaged weights (it was trained without EMA); choose weights=raw.")
    # The average covers parameters; a network's buffers, if it has any, are taken as they are.
    return {**_raw_weights(checkpoint, path), **shadow}
