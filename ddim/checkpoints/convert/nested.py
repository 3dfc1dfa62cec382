"""Reader of dictionaries of state dicts: which of their entries are networks, and which of those are an EMA."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim.checkpoints.convert.parameter_names import has_diffusers_names, strip_prefixes, update_attention_names
from ddim.checkpoints.convert.source import SUPPORTED, Source
from ddim.checkpoints.model import UNLABELLED
from ddim.config import build
from ddim.diffusion.schedule import ScheduleSpec
from ddim.errors import UserError
from ddim.io import Tensors, printable


def read_nested(path: Path, content: Mapping[Any, Any]) -> Source:
    """Read a dictionary of which some entries are state dicts."""
    state = {
        f"{key}.{name}": value
        for key, entry in content.items()
        if isinstance(entry, Mapping) and any(str(name).endswith(".weight") for name in entry)
        for name, value in strip_prefixes(entry, path).items()
    }
    if not network_prefixes(state):
        raise UserError(
            f"{path} holds the entries {', '.join(map(printable, content))[:200]}; supported are {SUPPORTED}."
        )
    steps = [content[key] for key in ("step", "global_step") if type(content.get(key)) is int]
    has_ema = any(_label(str(key)) == "ema" for key in content)
    return replace(read_networks(path, state, has_ema), step=steps[0] if steps else None)


def read_networks(path: Path, state: Tensors, has_ema: bool = False) -> Source:
    """Read tensors of which those of each network have a prefix, such as `ema_model.`; others belong to no network.

    Args:
        path: of the file.
        state: name -> tensor.
        has_ema: the file has EMA weights, even if no prefix says so.
    """
    prefixes: dict[str, list[str]] = {}
    for prefix in network_prefixes(state):
        prefixes.setdefault(_label(prefix), []).append(prefix)
    if UNLABELLED in prefixes and (has_ema or "ema" in prefixes):
        prefixes["online"] = prefixes.pop(UNLABELLED)  # the copy that an EMA keeps of them is not needed
    if several := next((group for group in prefixes.values() if len(group) > 1), None):
        names = ", ".join(printable(prefix.rstrip(".")) for prefix in several)
        raise UserError(f"{path} holds several networks ({names}); store the state dict of one in a file of its own.")
    sets: dict[str, Tensors] = {}
    for label, (prefix,) in prefixes.items():
        longer = tuple(
            other for other in network_prefixes(state) if len(other) > len(prefix) and other.startswith(prefix)
        )
        own = {k: v for k, v in state.items() if k.startswith(prefix) and not k.startswith(longer)}
        sets[label] = update_attention_names({k.removeprefix(prefix): v for k, v in own.items()})
    betas = next((value for name, value in state.items() if name.rpartition(".")[2] == "betas"), None)
    schedule = None
    if betas is not None:
        schedule = build(ScheduleSpec, {"name": "custom", "betas": betas.tolist()}, f"betas in {path}").build()
    diffusers_names = any(map(has_diffusers_names, sets.values()))
    notes = ("its EMA weights are stored in another way and were not read",) if has_ema and "ema" not in sets else ()
    return Source("nested", path, sets, schedule=schedule, diffusers_names=diffusers_names, notes=notes)


def network_prefixes(state: Mapping[str, Tensor]) -> list[str]:
    """Return what precedes the names of each network in a state dict, by its first convolution."""
    return [name.removesuffix("conv_in.weight") for name in state if re.search(r"(^|\.)conv_in\.weight$", name)]


def _label(prefix: str) -> str:
    """Return the label of weights whose names begin with `prefix`."""
    for part in reversed(prefix.split(".")):
        if re.search(r"(^|_)ema(_|$)", part):
            return "ema"
        if re.fullmatch(r"net_model|online(_model)?", part):
            return "online"
    return UNLABELLED
