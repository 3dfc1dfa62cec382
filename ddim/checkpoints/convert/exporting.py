"""Our weights out: a folder of diffusers, a model file, or the flat state dict of the original DDPM files."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ddim.checkpoints.convert import diffusers
from ddim.checkpoints.convert.model_card import Result, model_card
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.checkpoints.convert.parameter_names import Parameters
from ddim.checkpoints.model import UNLABELLED, StoredModel, header, read_model, save_model, weights_hash
from ddim.diffusion.schedule import linear_schedule
from ddim.io import atomic_write, check_target, explain_write_errors, write_safetensors


@dataclass(frozen=True)
class ExportSpec:
    """See configs/export_checkpoint.yaml.

    Attributes:
        checkpoint: path of the model.
        out: path of the folder (diffusers) or file (safetensors, flat) to write.
        layout: diffusers, safetensors or flat.
        weights: ema, online, or ema_RATE for another average of the training.
        records: path of a file of records; those of these weights go into the model card. For diffusers only.
        license: of the weights, for the model card, for example mit or cc-by-nc-4.0; null says nothing.
        overwrite: replace files that are there.

    Raises:
        ValueError: records or a license for a layout without a model card.
    """

    checkpoint: str
    out: str
    layout: Literal["diffusers", "safetensors", "flat"] = "diffusers"
    weights: str = "ema"
    records: str | None = None
    license: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.layout != "diffusers" and (self.records or self.license):
            raise ValueError(f"layout={self.layout} has no model card, so it takes neither records nor license.")


def export_checkpoint(
    spec: ExportSpec, results: Callable[[str], Sequence[Result]] = lambda weights_hash: ()
) -> tuple[list[Path], list[str]]:
    """Write a model in the layout of another code base.

    Args:
        spec: what to write, and where.
        results: SHA-256 of the weights -> what was measured with them, for the model card.

    Returns:
        The files, in the order in which they were written, and warnings.

    Raises:
        UserError: bad input, or files that would be overwritten; before anything is written.
    """
    model = read_model(Path(spec.checkpoint).expanduser(), spec.weights)
    out = Path(spec.out).expanduser()
    names = FOLDER if spec.layout == "diffusers" else ("",)
    paths = [out / name for name in names]
    for path in paths:
        check_target(path, spec.overwrite)
    with explain_write_errors(out):
        return paths, _write(model, spec, out, results)


def _write(model: StoredModel, spec: ExportSpec, out: Path, results: Callable[[str], Sequence[Result]]) -> list[str]:
    """Write, and return warnings."""
    if spec.layout == "diffusers":
        write_diffusers(model, out, results(weights_hash(model.state)), spec.license)
        return []
    if spec.layout == "safetensors":
        save_model(model, out)
        return []
    with atomic_write(out) as partial, partial.open("wb") as file:
        torch.save({name: value.contiguous() for name, value in model.state.items()}, file)
    return _unsaid_by_flat(model)


FOLDER = (
    f"unet/{diffusers.WEIGHTS_FILES[0]}",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "README.md",
    "model_index.json",  # the last: it makes a folder a pipeline
)


def write_diffusers(model: StoredModel, folder: Path, results: Sequence[Result], license: str | None) -> None:
    """Write what `DDIMPipeline.from_pretrained` and `DDPMPipeline.from_pretrained` load, and a model card.

    The header of the weights keeps our own description, so that importing the folder gives the same model.
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
        model_card(folder.resolve().name, model, results, license),
        _json(index),
    )
    (folder / FOLDER[-1]).unlink(missing_ok=True)  # of an earlier export: until everything is new, it is no pipeline
    write_safetensors(folder / FOLDER[0], Parameters(network, as_diffusers=True).to_file(model.state), header(model))
    for name, text in zip(FOLDER[1:], texts, strict=True):
        with atomic_write(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _unsaid_by_flat(model: StoredModel) -> list[str]:
    """Return what a reader of a flat state dict has to know besides, because it cannot be written there."""
    unsaid = [] if model.weights == UNLABELLED else [f"weights={model.weights}"]
    spec, network = model.spec, model.spec.network_spec
    if network not in [replace(p, dropout=network.dropout, init=network.init) for p in PRESETS.values()]:
        unsaid.append("the network, which is none of the presets (network=...)")
    if diffusers.scheduler_config(spec.schedule, "eps") != diffusers.scheduler_config(linear_schedule(), "eps"):
        unsaid.append(f"the schedule, {spec.schedule.name} with T={spec.schedule.T} (schedule=...)")
    if spec.prediction != "eps":
        unsaid.append(f"prediction={spec.prediction}")
    return [f"a flat state dict cannot say {', '.join(unsaid)}; give it when importing"] if unsaid else []
