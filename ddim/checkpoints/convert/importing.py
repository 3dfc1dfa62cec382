"""Any published DDPM or DDIM checkpoint in: recognised, checked key by key, written as a model file."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ddim.checkpoints.convert.download import fetch
from ddim.checkpoints.convert.model_zoo import BY_HAND, DOWNLOADS, HUB_ONLINE_CIFAR10, PRESETS, Published, checksums
from ddim.checkpoints.convert.parameter_names import Parameters, in_words
from ddim.checkpoints.convert.readers import Source, read_source
from ddim.checkpoints.model import OLD_LABELS, UNLABELLED, WEIGHTS, StoredModel, save_model, weights_hash
from ddim.checkpoints.spec import ModelSpec
from ddim.config import build, choose
from ddim.diffusion.schedule import ScheduleSpec, linear_schedule
from ddim.errors import UserError
from ddim.io import Tensors, check_target, explain_read_errors, explain_write_errors
from ddim.networks import NETWORKS, UNetSpec

_ONLINE_ONLY = "it holds no EMA weights: the online ones were taken, whose samples are worse"
_KNOWN_RAW = (
    "{} is known to hold online, not EMA weights: on CIFAR-10 an FID near 12 instead of 3 with all steps; for the "
    "paper's numbers take the averaged ones (download=ema_cifar10 and so on)"
)
_UNLABELLED = (
    "the file does not say whether its weights are averaged (ema) or online, and every result will say unlabelled; "
    "weights=ema or weights=online says it"
)


@dataclass(frozen=True)
class ImportSpec:
    """See configs/import_checkpoint.yaml.

    Attributes:
        source: path of a file, or of a folder of diffusers.
        download: or the name of a published file, a key of DOWNLOADS, to fetch first.
        out: path of the model file to write; null: in output_dir, under the source's name.
        output_dir: see out.
        download_dir: where downloads are kept.
        layout: what the source is expected to be; auto: whatever it is found to be.
        weights: which set to take; auto: the averaged one where there are two. For a source that does not say what it
            holds, this says it.
        preset: architecture of a source that does not describe itself, a key of PRESETS; null: the one that fits.
        network: instead of a preset, a network as in configs/network.
        schedule: of a source that does not describe its own; null: linear, T=1000, as in every published file.
        prediction: likewise; null: eps.
        trained_on: name of the training set, for people to read; null: the published file's, else none.
        overwrite: replace `out`.

    Raises:
        ValueError: both source and download, neither, or both preset and network.
    """

    output_dir: str
    download_dir: str
    source: str | None = None
    download: str | None = None
    out: str | None = None
    layout: Literal["auto", "flat", "official", "diffusers", "lightning", "safetensors"] = "auto"
    weights: str = "auto"
    preset: str | None = None
    network: dict[str, Any] | None = None
    schedule: ScheduleSpec | None = None
    prediction: str | None = None
    trained_on: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.source is None) == (self.download is None):
            names = ", ".join(DOWNLOADS)
            raise ValueError(f"give either source=PATH or download=NAME, one of {names}.")
        object.__setattr__(self, "weights", OLD_LABELS.get(self.weights, self.weights))
        if not re.fullmatch(rf"auto|{WEIGHTS}", self.weights):
            raise ValueError(f"weights={self.weights!r} is not known; allowed: auto, ema, online, ema_RATE.")
        if self.download in BY_HAND:
            raise ValueError(
                f"{self.download} can only be fetched by hand, in a browser: {BY_HAND[self.download]}; then give its "
                f"path, source=PATH trained_on={self.download}."
            )
        if self.download is not None:
            choose("download", self.download, DOWNLOADS)
        if self.preset is not None:
            choose("preset", self.preset, PRESETS)
            if self.network is not None:
                raise ValueError("give either preset or network, not both.")


@dataclass(frozen=True, eq=False)
class Imported:
    """What an import did.

    Attributes:
        path: of the model file.
        model: what it holds.
        weights_hash: of its weights.
        lines: what was found and taken, for people to read.
        warnings: what they should know before they use it.
    """

    path: Path
    model: StoredModel
    weights_hash: str
    lines: list[str]
    warnings: list[str]


def import_checkpoint(spec: ImportSpec) -> Imported:
    """Read a checkpoint of any layout, check every name and shape, and write it as a model file.

    Raises:
        UserError: bad input, or a source that is damaged, unsafe, not understood, or does not fit its architecture.
    """
    path = Path(spec.source or str(spec.download)).expanduser()
    with explain_read_errors(path):
        name = path.stem if path.is_file() or spec.download else path.resolve().name
    out = Path(spec.out).expanduser() if spec.out else Path(spec.output_dir) / f"{name}.safetensors"
    check_target(out, spec.overwrite)
    if spec.download:
        path = fetch(DOWNLOADS[spec.download], Path(spec.download_dir))
    with explain_read_errors(path):
        done = _read(spec, path, out)
    with explain_write_errors(out):
        save_model(done.model, out)
    return done


def _read(spec: ImportSpec, path: Path, out: Path) -> Imported:
    source = read_source(path)
    if spec.layout not in ("auto", source.layout):
        raise UserError(f"{path} has the layout {source.layout}, not {spec.layout}; leave layout=auto.")
    sums = checksums(source.file)
    known = sums.published
    label, warnings = _choose_weights(spec, source, known)
    state = source.sets[label if label in source.sets else UNLABELLED]
    model_spec, where = _describe(spec, source, known, state)
    state, remark = _convert(state, model_spec.network_spec, source)
    origin = {"file": source.file.name, "layout": source.layout, "sha256": sums.sha256}
    if known:
        origin["published"] = known.name
    step = source.step if source.step is not None else known.step if known else None
    digest = weights_hash(state)
    lines = [
        f"source: {source.file} (layout {source.layout}, SHA-256 {sums.sha256[:16]}...)",
        f"known file: {known.name}, checksum {known.checksum}" if known else "known file: none that is published",
        f"network: {where}, {sum(v.numel() for v in state.values()):,} parameters, every name and shape checked",
        f"schedule: {model_spec.schedule.name}, T={model_spec.schedule.T}; prediction: {model_spec.prediction}",
        f"weights: {label}{'' if step is None else f' at step {step:,}'}, hash {digest[:16]}{remark}",
    ]
    model = StoredModel(model_spec, state, label, step, origin)
    return Imported(out, model, digest, lines, [*source.notes, *warnings])


def _choose_weights(spec: ImportSpec, source: Source, known: Published | None) -> tuple[str, list[str]]:
    """Return the label of the weights to take, and warnings."""
    if UNLABELLED not in source.sets:
        label = spec.weights if spec.weights != "auto" else "ema" if "ema" in source.sets else "online"
        if label not in source.sets:
            raise UserError(f"{source.file} holds {' and '.join(source.sets)} weights only; choose weights=auto.")
        return label, [_ONLINE_ONLY] if label == "online" != spec.weights else []
    # Copies of this upload, in the hub's cache or a clone, whatever their exact bytes.
    named_online = {HUB_ONLINE_CIFAR10, f"models--google--{HUB_ONLINE_CIFAR10}"} & set(source.file.absolute().parts)
    found = known.weights if known else "online" if named_online and spec.weights != "ema" else None
    if found and spec.weights not in ("auto", found):
        raise UserError(f"{source.file} is known to hold {found} weights, not {spec.weights}; leave weights=auto.")
    if found == "online":
        return found, [_KNOWN_RAW.format(known.name if known else HUB_ONLINE_CIFAR10)]
    if spec.weights == "auto" and not found:
        return UNLABELLED, [_UNLABELLED]
    return found or spec.weights, []


def _describe(spec: ImportSpec, source: Source, known: Published | None, state: Tensors) -> tuple[ModelSpec, str]:
    """Return the description of the model, from the source or else from the user, and where its network is from."""
    schedule = spec.schedule.build() if spec.schedule else None
    given = _given_network(spec)
    if source.network is not None:
        network, where = source.network, "described by the file"
    else:
        network, where = _fitting_network(given, spec.preset, source, state)
    found = ModelSpec(
        network="unet",
        network_spec=network,
        schedule=source.schedule or schedule or linear_schedule(),
        prediction=source.prediction or spec.prediction or "eps",
        data=spec.trained_on or source.data or (known.data if known else ""),
    )
    asked = replace(
        found,
        network_spec=given or network,
        schedule=schedule or found.schedule,
        prediction=spec.prediction or found.prediction,
    )
    if differences := found.differences(asked):
        listed = "; ".join(differences)
        raise UserError(f"{source.file} describes another model than the command ({listed}); leave these options out.")
    return found, where


def _given_network(spec: ImportSpec) -> UNetSpec | None:
    if spec.preset:
        return PRESETS[spec.preset]
    if spec.network is None:
        return None
    fields = dict(spec.network)
    return build(choose("network", fields.pop("name", "unet"), NETWORKS)[0], fields, "network")


def _fitting_network(
    given: UNetSpec | None, preset: str | None, source: Source, state: Tensors
) -> tuple[UNetSpec, str]:
    """Return the network that the user gave, or else the preset that fits the weights, and what it is."""
    candidates = (
        {f"preset {preset}" if preset else "the given network": given}
        if given
        else {f"preset {name}": network for name, network in PRESETS.items()}
    )
    problems = {name: Parameters(network, source.as_diffusers).problems(state) for name, network in candidates.items()}
    name = min(problems, key=lambda name: sum(map(len, problems[name].values())))
    if problems[name]:
        advice = "" if given else " If it is another network, describe it with network=..., as in configs/network."
        nearest = "" if given else "the nearest, "
        raise UserError(f"the weights in {source.file} do not fit {nearest}{name}: {in_words(problems[name])}.{advice}")
    return candidates[name], name


def _convert(state: Tensors, network: UNetSpec, source: Source) -> tuple[Tensors, str]:
    """Return the weights under our names as float32, and a remark if they were something else."""
    parameters = Parameters(network, source.as_diffusers)
    if problems := parameters.problems(state):
        raise UserError(f"the weights in {source.file} do not fit the network that it describes: {in_words(problems)}.")
    unfit, ours = [name for name, value in state.items() if not value.is_floating_point()], {}
    if not unfit:
        ours = {name: value.to(torch.float32) for name, value in parameters.to_ours(state).items()}
        unfit = [name for name, value in ours.items() if not value.isfinite().all()]
    if unfit:
        raise UserError(
            f"{source.file}: {unfit[0]} holds values that are not finite real numbers; the file is damaged, or its "
            "training diverged."
        )
    others = {str(value.dtype).removeprefix("torch.") for value in state.values()} - {"float32"}
    remark = f" (stored as {', '.join(sorted(others))}, written as float32)" if others else ""
    return ours, remark
