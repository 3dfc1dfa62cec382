"""What a checkpoint of any layout holds: its weights by label, and as much of its description as it states."""

from dataclasses import dataclass, replace
from pathlib import Path

from ddim.checkpoints.spec import ModelSpec
from ddim.diffusion.schedule import NoiseSchedule
from ddim.io import Tensors
from ddim.networks import UNetSpec

LAYOUTS = {
    "flat": "a state dict of the original DDPM names (temb.dense.0.weight, ...)",
    "official": "a training list of the official implementation: model, optimiser, epoch, step, average",
    "diffusers": "a folder or file of diffusers: config.json, diffusion_pytorch_model.safetensors or .bin",
    "nested": "a dictionary of state dicts: net_model and ema_model, model and ema, or state_dict",
    "lightning": "a training checkpoint of this project",
    "safetensors": "a model file of this project",
}
SUPPORTED = "; ".join(f"{name}: {text}" for name, text in LAYOUTS.items())


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
