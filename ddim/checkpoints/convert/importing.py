"""Import of published DDPM and DDIM checkpoints: recognised, checked parameter by parameter, written as model file."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ddim.checkpoints.convert.download import fetch
from ddim.checkpoints.convert.model_zoo import (
    DOWNLOADS,
    HUB_ONLINE_CIFAR10,
    MANUAL_DOWNLOADS,
    PRESETS,
    PublishedFile,
    file_checksums,
)
from ddim.checkpoints.convert.parameter_names import ParameterNames, describe_mismatches
from ddim.checkpoints.convert.readers import read_source
from ddim.checkpoints.convert.source import Source
from ddim.checkpoints.model import OLD_LABELS, UNLABELLED, WEIGHTS, StoredModel, save_model, weights_hash
from ddim.checkpoints.spec import ModelSpec
from ddim.config import FilePath, build, check_name, choose
from ddim.diffusion.schedule import ScheduleSpec, linear_schedule
from ddim.errors import UserError
from ddim.io import Tensors, check_can_write, explain_read_errors, explain_write_errors
from ddim.networks import NETWORKS, UNetSpec

_ONLINE_ONLY = "it holds no EMA weights: the online ones were taken, whose samples are worse"
_KNOWN_ONLINE = (
    "{} is known to hold online, not EMA weights: on CIFAR-10 an FID near 12 instead of 3 with all steps; for the "
    "paper's numbers take the EMA weights (download=ema_cifar10 and so on)"
)
_NO_LABEL = (
    "the last of the {} embeddings of classes is taken as that of no label, as in classifier-free guidance; if it is "
    "one of a class, import with no_label=none"
)
_UNLABELLED = (
    "the file does not state whether its weights are EMA or online, so every result will be labelled unlabelled; "
    "state it with weights=ema or weights=online"
)


@dataclass(frozen=True)
class ImportSpec:
    """See configs/import_checkpoint.yaml.

    Attributes:
        output_dir: folder of the model file.
        download_dir: folder of downloads.
        checkpoint: path of a file, or of a diffusers folder.
        download: or the name of a published file, a key of DOWNLOADS, to download first.
        name: of the model file, without .safetensors; null: that of the checkpoint.
        layout: the expected layout; auto accepts all.
        weights: which weights to take; auto: EMA if there are any. For a file that does not state which it holds, this
            states it.
        preset: network of a checkpoint that does not describe its own, a key of PRESETS; null: the one that fits.
        network: instead of a preset, a network as in configs/network.
        schedule: of a checkpoint that does not describe its own; null: linear, T=1000, as in all published files.
        prediction: likewise; null: eps.
        classes: names of the classes of a conditional network, in the order of the labels; null: those that the file
            states, or none.
        no_label: of a conditional network of diffusers: `last` if its last embedding is that of no label, which
            guidance needs, or `none` if all are of classes; then the mean of them stands in for it.
        trained_on: name of the training set, human-readable; null: that of the published file, if known.
        overwrite: replace an existing model file.

    Raises:
        ValueError: both checkpoint and download, neither, both preset and network, or an unknown name.
    """

    output_dir: FilePath
    download_dir: FilePath
    checkpoint: FilePath | None = None
    download: str | None = None
    name: str | None = None
    layout: Literal["auto", "flat", "official", "diffusers", "nested", "lightning", "safetensors"] = "auto"
    weights: str = "auto"
    preset: str | None = None
    network: dict[str, Any] | None = None
    schedule: ScheduleSpec | None = None
    prediction: str | None = None
    classes: tuple[str, ...] | None = None
    no_label: Literal["last", "none"] = "last"
    trained_on: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.checkpoint is None) == (self.download is None):
            raise ValueError(f"give either checkpoint=PATH or download=NAME, one of {', '.join(DOWNLOADS)}.")
        if self.name is not None:
            check_name(self.name)
        object.__setattr__(self, "weights", OLD_LABELS.get(self.weights, self.weights))
        if not re.fullmatch(rf"auto|{WEIGHTS}", self.weights):
            raise ValueError(
                f"weights={self.weights!r} is not known; allowed: auto, ema, online, ema_RATE, posthoc_LENGTH."
            )
        if self.download in MANUAL_DOWNLOADS:
            raise ValueError(
                f"{self.download} can only be downloaded by hand, in a browser: {MANUAL_DOWNLOADS[self.download]}; "
                f"then give its path, checkpoint=PATH trained_on={self.download}."
            )
        if self.download is not None:
            choose("download", self.download, DOWNLOADS)
        if self.preset is not None:
            choose("preset", self.preset, PRESETS)
            if self.network is not None:
                raise ValueError("give either preset or network, not both.")


@dataclass(frozen=True, eq=False)
class Imported:
    """The result of an import.

    Attributes:
        path: of the model file.
        model: its content.
        weights_hash: SHA-256 of its weights.
        lines: a human-readable summary.
        warnings: what users should know before they use it.
    """

    path: Path
    model: StoredModel
    weights_hash: str
    lines: list[str]
    warnings: list[str]


def import_checkpoint(spec: ImportSpec) -> Imported:
    """Read a checkpoint of any supported layout, check every parameter's name and shape, and write a model file.

    Raises:
        UserError: bad input; or a source that is damaged, unsafe, unsupported, or does not fit its network.
    """
    path = Path(spec.checkpoint or str(spec.download)).expanduser()
    output = _output_path(spec, path)
    check_can_write(output, spec.overwrite)
    if spec.download:
        path = fetch(DOWNLOADS[spec.download], Path(spec.download_dir))
    with explain_read_errors(path):
        source = read_source(path, spec.weights)
        if spec.layout not in ("auto", source.layout):
            raise UserError(f"{path} has the layout {source.layout}, not {spec.layout}; leave layout=auto.")
        imported = _convert(spec, source, output)
    with explain_write_errors(output):
        save_model(imported.model, output)
    return imported


def _output_path(spec: ImportSpec, path: Path) -> Path:
    with explain_read_errors(path):
        own_name = path.stem if path.is_file() or spec.download else path.resolve().name
    return Path(spec.output_dir).expanduser() / f"{spec.name or own_name}.safetensors"


def _convert(spec: ImportSpec, source: Source, output: Path) -> Imported:
    """Choose the weights, match them with a network, and describe the model."""
    sums = file_checksums(source.file, *source.shards)
    known = sums.published
    label, warnings = _choose_weights(spec, source, known)
    if source.network is not None and source.network.classes is not None:
        source, more = _with_no_label(source, spec.no_label)
        warnings = [*warnings, *more]
    elif spec.no_label != "last":
        raise UserError(
            f"no_label={spec.no_label} is for a network with classes that diffusers wrote; leave it out for "
            f"{source.file}."
        )
    state = source.sets[label if label in source.sets else UNLABELLED]
    assumptions = _assumptions(spec, source)
    model_spec, network_from = _describe(spec, source, known, state)
    state, remark = _our_weights(state, model_spec, source)

    origin = {"file": source.file.name, "layout": source.layout, "sha256": sums.sha256}
    if known:
        origin["published"] = known.name
    if source.sampler:
        origin["sampler"] = source.sampler
    step = source.step if source.step is not None else known.step if known else None
    digest = weights_hash(state)
    lines = [
        f"source: {source.file} (layout {source.layout}, SHA-256 {sums.sha256[:16]}...)",
        f"known file: {known.name}, checksum {known.checksum}" if known else "known file: none that is published",
        f"network: {network_from}, {sum(v.numel() for v in state.values()):,} parameters, every name and shape checked",
        f"schedule: {model_spec.schedule.name}, T={model_spec.schedule.T}; prediction: {model_spec.prediction}"
        + (f"; as its scheduler samples: {source.sampler}" if source.sampler else ""),
        f"weights: {label}{'' if step is None else f' at step {step:,}'}, hash {digest[:16]}{remark}",
    ]
    model = StoredModel(model_spec, state, label, step, origin, source.recipe)
    return Imported(output, model, digest, lines, [*source.notes, *assumptions, *warnings])


def _choose_weights(spec: ImportSpec, source: Source, known: PublishedFile | None) -> tuple[str, list[str]]:
    """Return the label of the weights to take, and warnings."""
    if UNLABELLED not in source.sets:
        held = next((one for one in ("ema", "online") if one in source.sets), next(iter(source.sets)))
        label = held if spec.weights == "auto" else spec.weights
        if label not in source.sets:
            raise UserError(f"{source.file} holds {' and '.join(source.sets)} weights only; choose weights=auto.")
        return label, [_ONLINE_ONLY] if label == "online" != spec.weights else []
    # Copies of this upload, in the hub's cache or a clone, whatever their exact bytes.
    named_online = {HUB_ONLINE_CIFAR10, f"models--google--{HUB_ONLINE_CIFAR10}"} & set(source.file.absolute().parts)
    label = known.weights if known else "online" if named_online and spec.weights != "ema" else ""
    if label and spec.weights not in ("auto", label):
        raise UserError(f"{source.file} is known to hold {label} weights, not {spec.weights}; leave weights=auto.")
    if label == "online":
        return label, [_KNOWN_ONLINE.format(known.name if known else HUB_ONLINE_CIFAR10)]
    if spec.weights == "auto" and not label:
        return UNLABELLED, [_UNLABELLED]
    return label or spec.weights, []


def _with_no_label(source: Source, no_label: str) -> tuple[Source, list[str]]:
    """Return a conditional network of diffusers with an embedding of no label, and warnings."""
    network, name = source.network, "class_embedding.weight"
    assert network is not None
    assert network.classes is not None
    if no_label == "last":
        return source, [_NO_LABEL.format(network.classes + 1)]
    sets = {
        label: state | {name: torch.cat([state[name], state[name].mean(0, keepdim=True)])} if name in state else state
        for label, state in source.sets.items()
    }
    network = replace(network, classes=network.classes + 1)
    return replace(source, sets=sets, network=network), [
        "no embedding of no label was trained: the mean of the others stands in for it, and guidance is not that of a "
        "network that was trained for it"
    ]


def _assumptions(spec: ImportSpec, source: Source) -> list[str]:
    """Return a warning about what neither the source nor the command states.

    Raises:
        UserError: it cannot be assumed.
    """
    options = {"a linear schedule": spec.schedule, "noise prediction": spec.prediction}
    missing = [what for what, given in options.items() if given is None]
    if not source.unstated or not missing:
        return []
    if not source.may_assume:
        raise UserError(
            f"{source.unstated}, so schedule and prediction of the model are unknown; state both, schedule=... and "
            "prediction=..."
        )
    return [f"{source.unstated}: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} assumed"]


def _choose_network(spec: ImportSpec, source: Source, state: Tensors) -> tuple[UNetSpec, str]:
    """Return the network of weights of another project, and where it is from: the file, the command, or a preset."""
    if source.network is not None:
        return source.network, "described by the file"
    given = _given_network(spec)
    if given is None:
        candidates = {f"preset {name}": network for name, network in PRESETS.items()}
    else:
        name, network = given
        if name != "unet":
            raise UserError(
                f"{source.file} was not written by this project, so it can be read as DDPM's U-Net only, not as the "
                f"network {name!r}; give network.name=unet and its fields, or leave network out."
            )
        candidates = {f"preset {spec.preset}" if spec.preset else "the given network": network}
    mismatches = {
        name: ParameterNames(network, source.diffusers_names).mismatches(state) for name, network in candidates.items()
    }
    name = min(mismatches, key=lambda name: sum(map(len, mismatches[name].values())))
    if mismatches[name]:
        nearest = "" if given else "the nearest, "
        advice = "" if given else " If it is another network, describe it with network=..., as in configs/network."
        reasons = describe_mismatches(mismatches[name])
        raise UserError(f"the weights in {source.file} do not fit {nearest}{name}: {reasons}.{advice}")
    return candidates[name], name


def _given_network(spec: ImportSpec) -> tuple[str, Any] | None:
    """Return the name and the spec of the network that the command gives."""
    if spec.preset:
        return "unet", PRESETS[spec.preset]
    if spec.network is None:
        return None
    fields = dict(spec.network)
    name = fields.pop("name", "unet")
    return name, build(choose("network", name, NETWORKS)[0], fields, "network")


def _describe(spec: ImportSpec, source: Source, known: PublishedFile | None, state: Tensors) -> tuple[ModelSpec, str]:
    """Return the description of the model, and where its network is from.

    It is what the source states, completed by the command, which must agree.
    """
    schedule, network_from = spec.schedule.build() if spec.schedule else None, "described by the file"
    if source.spec is not None:
        data, classes = spec.trained_on or source.spec.data, source.spec.classes or spec.classes or ()
        described = replace(source.spec, data=data, classes=classes)
    else:
        network, network_from = _choose_network(spec, source, state)
        described = ModelSpec(
            network="unet",
            network_spec=network,
            schedule=source.schedule or schedule or linear_schedule(),
            prediction=source.prediction or spec.prediction or "eps",
            data=spec.trained_on or (known.data if known else ""),
            classes=spec.classes or (),
            variance="fixed" if network.out_channels in (None, network.channels) else "learned_range",
        )
    name, network_spec = _given_network(spec) or (described.network, described.network_spec)
    requested = replace(
        described,
        network=name,
        network_spec=network_spec,
        schedule=schedule or described.schedule,
        prediction=spec.prediction or described.prediction,
        classes=spec.classes or described.classes,
    )
    if differences := described.differences(requested):
        listed = "; ".join(differences)
        raise UserError(f"{source.file} describes another model than the command ({listed}); leave these options out.")
    return described, network_from


def _our_weights(state: Tensors, spec: ModelSpec, source: Source) -> tuple[Tensors, str]:
    """Return the weights under our names and in our types, float32 in a U-Net; and a remark if they had others."""
    names = ParameterNames(spec.network_spec, source.diffusers_names, spec.network)
    if mismatches := names.mismatches(state):
        reasons = describe_mismatches(mismatches)
        raise UserError(f"the weights in {source.file} do not fit the network that it describes: {reasons}.")
    types = {other: names.parameters[name].dtype for name, other in names.names.items()}
    invalid = [
        name
        for name, value in state.items()
        if not (value.is_floating_point() if types[name].is_floating_point else value.dtype == types[name])
    ]
    ours = {}
    if not invalid:
        ours = {name: value.to(names.parameters[name].dtype) for name, value in names.from_file(state).items()}
        trained = (name for name, value in names.parameters.items() if value.requires_grad)  # a mask may be infinite
        invalid = [name for name in trained if not ours[name].isfinite().all()]
    if invalid:
        raise UserError(
            f"{source.file}: {invalid[0]} holds values that are not finite real numbers; the file is damaged, or its "
            "training diverged."
        )
    changed = {(value.dtype, types[name]) for name, value in state.items() if value.dtype != types[name]}
    stored, written = (", ".join(sorted({str(pair[i]).removeprefix("torch.") for pair in changed})) for i in (0, 1))
    return ours, f" (stored as {stored}, written as {written})" if changed else ""
