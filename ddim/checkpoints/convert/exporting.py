"""Export of our weights: a diffusers folder, a model file, or the flat state dict of the original DDPM files."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ddim.checkpoints.convert import diffusers
from ddim.checkpoints.convert.hub import check_repository
from ddim.checkpoints.convert.model_card import Result, model_card
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.checkpoints.convert.parameter_names import ParameterNames
from ddim.checkpoints.model import UNLABELLED, StoredModel, encode_metadata, read_model, save_model, weights_hash
from ddim.config import FilePath
from ddim.diffusion.schedule import linear_schedule
from ddim.errors import UserError
from ddim.io import atomic_write, check_can_write, explain_write_errors, write_safetensors
from ddim.networks import UNetSpec

_NO_LABELS = (
    "DDIMPipeline calls a network without labels, which this one needs; README.md has an example that gives them"
)
# Layout -> the files that are written into the folder, in this order.
FILES = {
    "diffusers": (
        f"unet/{diffusers.WEIGHTS_FILES[0]}",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "README.md",
        "model_index.json",  # last: it turns a folder into a pipeline
    ),
    "safetensors": ("model.safetensors",),
    "flat": ("model.pt",),
}


@dataclass(frozen=True)
class ExportSpec:
    """See configs/export_checkpoint.yaml.

    Attributes:
        checkpoint: path of the model.
        output_dir: folder to write to; for the names of the files see FILES.
        layout: diffusers, safetensors or flat.
        weights: ema, online, or ema_RATE for an additional EMA.
        records: path of a records file; the records of these weights go into the model card. For diffusers only.
        dtype: float32, or float16, which halves the file and rounds the weights. For safetensors only.
        license: of the weights, for the model card, for example mit or cc-by-nc-4.0; null: not stated.
        push: a model repository of the Hugging Face hub, USER/NAME, that gets the files too.
        private: the repository is to be private.
        overwrite: replace existing files, in the repository too.

    Raises:
        ValueError: records or a license for a layout without a model card, or a repository that is none.
    """

    checkpoint: FilePath
    output_dir: FilePath
    layout: Literal["diffusers", "safetensors", "flat"] = "diffusers"
    weights: str = "ema"
    records: FilePath | None = None
    dtype: Literal["float32", "float16"] = "float32"
    license: str | None = None
    push: str | None = None
    private: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push, re.ASCII):
            raise ValueError(f"push={self.push!r} is no repository of the hub; write USER/NAME.")
        if self.private and self.push is None:
            raise ValueError("private=true is for a repository of the hub; add push=USER/NAME, or leave it out.")
        if self.layout != "diffusers" and (self.records or self.license):
            raise ValueError(f"layout={self.layout} has no model card, so it takes neither records nor license.")
        if self.layout != "safetensors" and self.dtype != "float32":
            raise ValueError(f"layout={self.layout} holds float32 only; dtype={self.dtype} is for layout=safetensors.")


def export_checkpoint(
    spec: ExportSpec, results: Callable[[str], Sequence[Result]] = lambda weights_hash: ()
) -> tuple[list[Path], list[str]]:
    """Write a model in the layout of another code base.

    Args:
        spec: what to write, and where.
        results: SHA-256 of the weights -> their measured results, for the model card.

    Returns:
        The files, in the order in which they were written, and warnings.

    Raises:
        UserError: bad input, a network that the layout cannot hold, or files that would be overwritten, in the
            repository too; before anything is written.
    """
    model = read_model(Path(spec.checkpoint).expanduser(), spec.weights)
    if model.spec.variance != "fixed" and spec.layout != "safetensors":
        raise UserError(
            f"layout={spec.layout} cannot hold a learned variance: DDIMPipeline of diffusers cannot sample with it, "
            "and a flat state dict does not say that it is there; take layout=safetensors."
        )
    if model.spec.categories is not None and spec.layout != "safetensors":
        raise UserError(f"layout={spec.layout} has no network for pixels that are categories; take layout=safetensors.")
    folder = Path(spec.output_dir).expanduser()
    paths = [folder / name for name in FILES[spec.layout]]
    check_network(model, spec.layout)
    for path in paths:
        check_can_write(path, spec.overwrite)
    if spec.push is not None:
        check_repository(spec.push, FILES[spec.layout], spec.private, spec.overwrite)
    with explain_write_errors(folder if spec.layout == "diffusers" else paths[0]):
        if spec.layout == "diffusers":
            write_diffusers(model, folder, results(weights_hash(model.state)), spec.license, spec.push)
        elif spec.layout == "safetensors":
            save_model(model if spec.dtype == "float32" else rounded(model), paths[0])
        else:
            with atomic_write(paths[0]) as partial, partial.open("wb") as file:
                torch.save({name: value.contiguous() for name, value in model.state.items()}, file)
    if spec.layout == "diffusers" and model.spec.num_classes is not None:
        return paths, [_NO_LABELS]
    return paths, _lost_in_flat(model) if spec.layout == "flat" else []


def rounded(model: StoredModel) -> StoredModel:
    """Return a model with its weights in float16, and the rounding in its origin.

    Raises:
        UserError: a weight is above float16's largest number, 65,504.
    """
    state = {name: value.half() for name, value in model.state.items()}
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise UserError("dtype=float16 cannot hold these weights, some of which are above 65,504; take dtype=float32.")
    return replace(model, state=state, origin={**model.origin, "rounded": "to float16"})


def check_network(model: StoredModel, layout: str) -> None:
    """Check that a layout can hold a model; `safetensors` can hold any.

    Raises:
        UserError: it cannot.
    """
    advice = "choose layout=safetensors, which holds every model"
    if layout != "safetensors" and not isinstance(model.spec.network_spec, UNetSpec):
        raise UserError(f"layout={layout} holds DDPM's U-Net, not the network {model.spec.network!r}; {advice}.")
    if layout == "diffusers":
        diffusers.unet_config(model.spec.network_spec)
        if model.spec.prediction not in diffusers.PREDICTION_TYPES:
            raise UserError(f"diffusers does not know the prediction {model.spec.prediction!r}; {advice}.")


def write_diffusers(
    model: StoredModel, folder: Path, results: Sequence[Result], license: str | None, repository: str | None = None
) -> None:
    """Write what `DDIMPipeline.from_pretrained` and `DDPMPipeline.from_pretrained` load, and a model card.

    The header of the weights keeps our own description, so that importing the folder restores the same model.
    """
    network = model.spec.network_spec
    index = {
        "_class_name": "DDIMPipeline",
        "_diffusers_version": diffusers.VERSION,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    texts = (
        _json(diffusers.unet_config(network)),
        _json(diffusers.scheduler_config(model.spec.schedule, model.spec.prediction)),
        model_card(Path(repository or folder.resolve()).name, model, results, license, repository or "PATH"),
        _json(index),
    )
    weights_file, *text_files = FILES["diffusers"]
    (folder / text_files[-1]).unlink(missing_ok=True)  # the folder is no pipeline until all its files are new
    state = ParameterNames(network, diffusers=True).to_file(model.state)
    write_safetensors(folder / weights_file, state, encode_metadata(model))
    for name, text in zip(text_files, texts, strict=True):
        with atomic_write(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _lost_in_flat(model: StoredModel) -> list[str]:
    """Return a warning about what a flat state dict cannot express and importing does not assume."""
    lost = [] if model.weights == UNLABELLED else [f"weights={model.weights}"]
    spec, network = model.spec, model.spec.network_spec
    if network not in [replace(p, dropout=network.dropout, init=network.init) for p in PRESETS.values()]:
        lost.append("the network, which is none of the presets (network=...)")
    if diffusers.scheduler_config(spec.schedule, "eps") != diffusers.scheduler_config(linear_schedule(), "eps"):
        lost.append(f"the schedule, {spec.schedule.name} with T={spec.schedule.T} (schedule=...)")
    if spec.classes:
        lost.append("the names of the classes")
    if spec.prediction != "eps":
        lost.append(f"prediction={spec.prediction}")
    return [f"a flat state dict does not store {', '.join(lost)}; state it when importing"] if lost else []
