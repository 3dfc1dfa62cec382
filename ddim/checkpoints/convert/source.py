"""What a checkpoint of any layout holds: its weights by label, and as much of its description as it states."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        spec: the complete description in a file that this project wrote; None for other files.
        recipe: of such a file, the settings of the training by key; {} where they are not known.
        network, schedule, prediction: of other files, what they state; None for what they do not.
        unstated: why a folder states neither schedule nor prediction; "" for other files.
        may_assume: it may be taken for one of DDPM all the same.
        sampler: the options of sample.py with which it is sampled as the source does, "" for what is not stated.
        diffusers_names: the weights have diffusers' parameter names.
        notes: warnings for the user.
        shards: the files that hold the weights, if there are several.
    """

    layout: str
    file: Path
    sets: dict[str, Tensors]
    step: int | None = None
    spec: ModelSpec | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    network: UNetSpec | None = None
    schedule: NoiseSchedule | None = None
    prediction: str | None = None
    unstated: str = ""
    may_assume: bool = True
    sampler: str = ""
    diffusers_names: bool = False
    notes: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()
