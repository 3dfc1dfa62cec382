"""Reader of dictionaries of state dicts: which of their entries are networks, and which of those are an EMA."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.checkpoints.convert.parameter_names import strip_prefixes, update_attention_names
from ddim.checkpoints.convert.source import SUPPORTED, Source
from ddim.checkpoints.model import UNLABELLED, has_diffusers_names
from ddim.config import build
from ddim.diffusion.schedule import NoiseSchedule, ScheduleSpec
from ddim.errors import UserError
from ddim.io import Tensors, printable

COUNTER = "n_averaged"  # of torch's AveragedModel: how many weights were averaged
# Lightning's WeightAveraging stores both sets under these names.
_WEIGHT_AVERAGING = {"state_dict": "ema", "current_model_state": "online"}
_AVERAGED = (
    "the file does not state which average its averaged weights are (torch's AveragedModel can keep any), and they are "
    "labelled ema"
)
_NOT_READ = "its EMA weights are stored in another way and were not read"


def read_nested(path: Path, content: Mapping[Any, Any]) -> Source:
    """Read a dictionary of which some entries are state dicts."""
    names = _WEIGHT_AVERAGING if content.keys() >= _WEIGHT_AVERAGING.keys() else {}
    state = {
        f"{place}{name}": value
        for place, entry in _state_dicts({names.get(key, key): entry for key, entry in content.items()})
        for name, value in strip_prefixes(entry, path).items()
    }
    if not network_prefixes(state):
        raise UserError(
            f"{path} holds the entries {', '.join(map(printable, content))[:200]}; supported are {SUPPORTED}."
        )
    steps = [content[key] for key in ("step", "global_step") if type(content.get(key)) is int]
    source = read_networks(path, state, _holds_ema(content), names.values())
    callbacks = content.get("callbacks")
    is_stated = isinstance(callbacks, Mapping) and any("EMA" in str(name) for name in callbacks)
    notes = (*source.notes, _AVERAGED) if names and not is_stated else source.notes
    return replace(source, step=steps[0] if steps else None, notes=notes)


def _state_dicts(content: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the state dicts in a dictionary, and deeper those of an EMA, each with what precedes its names."""
    for key, entry in content.items():
        if not isinstance(entry, Mapping):
            continue
        inner = f"{place}{key}."
        if not any(str(name).endswith(".weight") and isinstance(value, Tensor) for name, value in entry.items()):
            yield from _state_dicts(entry, inner)
        elif not place or label_of(inner) == "ema":
            yield inner, entry


def read_networks(path: Path, state: Tensors, has_ema: bool = False, stated: Collection[str] = ()) -> Source:
    """Read tensors of which those of each network have a prefix, such as `ema_model.`; others belong to no network.

    Args:
        path: of the file.
        state: name -> tensor.
        has_ema: the file has EMA weights, even if no prefix says so.
        stated: labels that a prefix begins with, whatever a part after it is called.
    """

    def label(prefix: str) -> str:
        first = prefix.partition(".")[0]
        return first if first in stated else label_of(prefix)

    averaged = tuple(name.removesuffix(COUNTER) for name in state if name.rpartition(".")[2] == COUNTER)
    state = {name: value for name, value in state.items() if name.rpartition(".")[2] != COUNTER}
    has_ema = has_ema or _holds_ema(state)
    prefixes: dict[str, list[str]] = {}
    for prefix in network_prefixes(state):
        prefixes.setdefault("ema" if prefix.startswith(averaged) else label(prefix), []).append(prefix)
    if UNLABELLED in prefixes and (has_ema or "ema" in prefixes):
        prefixes["online"] = prefixes.pop(UNLABELLED)  # the copy that an EMA keeps of them is not needed
    if several := next((group for group in prefixes.values() if len(group) > 1), None):
        names = ", ".join(printable(prefix.rstrip(".")) for prefix in several)
        raise UserError(f"{path} holds several networks ({names}); store the state dict of one in a file of its own.")
    sets: dict[str, Tensors] = {}
    for name, (prefix,) in prefixes.items():
        longer = tuple(
            other for other in network_prefixes(state) if len(other) > len(prefix) and other.startswith(prefix)
        )
        own = {k: v for k, v in state.items() if k.startswith(prefix) and not k.startswith(longer)}
        sets[name] = {k.removeprefix(prefix): v for k, v in own.items()}
    if has_ema and "ema" not in sets and (average := _lit_ema(state, prefixes["online"][0], sets["online"])):
        sets["ema"] = average
    sets = {name: update_attention_names(weights) for name, weights in sets.items()}
    notes = (_NOT_READ,) if has_ema and "ema" not in sets else ()
    if "ema" in prefixes and label(prefixes["ema"][0]) != "ema":
        notes = (_AVERAGED,)
    diffusers_names = any(map(has_diffusers_names, sets.values()))
    return Source("nested", path, sets, schedule=_schedule(path, state), diffusers_names=diffusers_names, notes=notes)


def _lit_ema(state: Tensors, prefix: str, online: Tensors) -> Tensors:
    """Return the average of the weights `online` that LitEma of latent diffusion keeps; {} if there is none.

    Its names are those inside the module that it averages, without their dots: model_ema.diffusion_modelconv_inweight
    for model.diffusion_model.conv_in.weight.
    """
    kept = {n.rpartition(".")[2]: value for n, value in state.items() if label_of(f".{n}".split(".")[-2]) == "ema"}
    parts = prefix.split(".")
    for inside in (parts[i:] for i in range(len(parts))):
        names = {name: "".join([*inside, *name.split(".")]) for name in online}
        if kept.keys() >= set(names.values()):
            return {name: kept[theirs] for name, theirs in names.items()}
    return {}


def _holds_ema(entry: Any, is_ema: bool = False) -> bool:
    """Return whether the name of an EMA leads to a tensor other than a scalar, such as its decay."""
    if isinstance(entry, Tensor):
        return is_ema and entry.ndim > 0
    if isinstance(entry, Mapping):
        for name, value in entry.items():
            # A tensor's own name, the last in its path, names no EMA.
            modules = str(name).rpartition(".")[0] if isinstance(value, Tensor) else str(name)
            if _holds_ema(value, is_ema or label_of(modules) == "ema"):
                return True
    return isinstance(entry, list | tuple) and any(_holds_ema(value, is_ema) for value in entry)


def _schedule(path: Path, state: Tensors) -> NoiseSchedule | None:
    """Return the schedule of the `betas` among tensors; None without any."""
    betas = next((value for name, value in state.items() if name.rpartition(".")[2] == "betas"), None)
    if betas is None:
        return None
    return build(ScheduleSpec, {"name": "custom", "betas": betas.tolist()}, f"betas in {path}").build()


def network_prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Return what precedes the names of each network in a state dict, by its first convolution."""
    return [name.removesuffix("conv_in.weight") for name in state if re.search(r"(^|\.)conv_in\.weight$", name)]


def label_of(prefix: str) -> str:
    """Return the label of weights whose names begin with `prefix`."""
    for part in reversed(prefix.split(".")):
        if re.search(r"(^|_)ema(_|$)", part, re.IGNORECASE):
            return "ema"
        if re.fullmatch(r"net_model|online(_model)?", part):
            return "online"
    return UNLABELLED
