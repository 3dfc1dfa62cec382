"""Validation of configurations: plain mapping -> typed spec. Below the entry points there are only specs.

A *spec* is a frozen dataclass. `build` creates one from a plain mapping (from YAML or a checkpoint). Unknown keys,
missing keys and wrong types raise a UserError that names the key, the value and the allowed values.
"""

import dataclasses
import difflib
import json
import math
import os
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ddim.errors import UserError

Spec = TypeVar("Spec")
FilePath = Annotated[str, "path"]  # the type of a spec's field that holds a path, in which `build` expands ~
NAME_BYTES = 255  # the longest file name that common file systems take


def build(spec_type: type[Spec], values: Mapping[str, Any], where: str) -> Spec:
    """Build the dataclass `spec_type` from a mapping.

    Args:
        spec_type: a dataclass type; nested dataclass fields are built from nested mappings.
        values: plain Python values, as parsed from YAML.
        where: the name of this mapping in error messages, for example "sampler"; "" at the top level.

    Raises:
        UserError: unknown key, missing key, wrong type, or a value that the spec's own validation rejects.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where} must be a mapping with the keys {_names(spec_type)}, not {values!r}.")
    hints = get_type_hints(spec_type, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(spec_type)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise UserError(
                f"unknown key {_join(where, key)}{suggest(str(key), fields)}; allowed: {_names(spec_type)}."
            )
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in values]:
        raise UserError(f"{where or 'the configuration'} lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    checked = {key: convert(value, hints[key], _join(where, key)) for key, value in values.items()}
    with config_context(where):
        return spec_type(**checked)


@contextmanager
def config_context(where: str) -> Iterator[None]:
    """Turn a ValueError in the block into a UserError that names the affected part of the configuration."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """Return `value` as the type `hint` (int, float, bool, str, Literal, X | None, tuple[X, ...], a dataclass).

    An int is accepted as a float. A float (even 1.0) is not accepted as an int, a numeric string not as a number.

    Raises:
        UserError: the value is of another type or not allowed.
    """
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, where)
    if origin is Annotated:  # FilePath
        return expand_path(convert(value, str, where), where)
    if origin is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(map(str, get_args(hint)))
            raise UserError(f"{where}={value!r} is not known{suggest(str(value), get_args(hint))}; allowed: {allowed}.")
        return value
    if origin is tuple:
        return _convert_tuple(value, hint, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, not {value!r}.")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}={value!r} must be {_type_name(hint)}, not {_type_name(type(value))}.")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where}={value!r} must be a finite number.")
    return value


def _convert_union(value: Any, hint: Any, where: str) -> Any:
    members = get_args(hint)
    if value is None and types.NoneType in members:
        return None
    others = [m for m in members if m is not types.NoneType]
    for member in others:
        try:
            return convert(value, member, where)
        except UserError as error:
            failure = error
    if len(others) == 1:
        raise failure
    raise UserError(f"{where}={value!r} must be {' or '.join(_type_name(m) for m in members)}.")


def _convert_tuple(value: Any, hint: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        count = len(get_args(hint)) if Ellipsis not in get_args(hint) else 1
        example = f", such as [{','.join([str(value)] * count)}]" if isinstance(value, int | float) else ""
        raise UserError(f"{where}={value!r} must be a list{example}.")
    members = get_args(hint)
    if len(members) == 2 and members[1] is Ellipsis:
        members = (members[0],) * len(value)
    if len(members) != len(value):
        raise UserError(f"{where}={list(value)!r} must have {len(members)} entries.")
    return tuple(convert(v, m, f"{where}[{i}]") for i, (v, m) in enumerate(zip(value, members, strict=True)))


def expand_path(text: str, where: str) -> str:
    """Return a path with ~ replaced by the user's folder.

    Raises:
        UserError: it is empty, or has a NUL character.
    """
    if not text or "\0" in text:
        raise UserError(f"{where}={text!r} must be a path; write . for the folder you are in.")
    return os.path.expanduser(text)


def changed_words(key: str, spec: Any, fields: Collection[str] | None = None) -> list[str]:
    """Return what differs from the defaults of a specification, as words of a command: "sampler.clip=x0", ...

    Args:
        key: of the specification, such as sampler.
        spec: a dataclass whose fields have defaults.
        fields: the ones to look at; None for all.
    """
    values, default = dataclasses.asdict(spec), dataclasses.asdict(type(spec)())
    values = {name: v for name, v in values.items() if name in (fields or values) and v != default[name]}
    texts = {name: v if isinstance(v, str) else json.dumps(v, separators=(",", ":")) for name, v in values.items()}
    return [f"{key}.{name}={text}" for name, text in texts.items()]


def check_name(name: str) -> None:
    """Check that a name can be that of a file or folder.

    Raises:
        ValueError: it is empty, a path, too long, or has characters that cannot be printed.
    """
    size = len(name.encode(errors="replace"))
    if not name or name in (".", "..") or {"/", "\\"} & set(name) or not name.isprintable() or size > NAME_BYTES:
        shown = name if len(name) <= 80 else f"{name[:80]}..."
        raise ValueError(
            f"name={shown!r} must be a file name without a folder; choose that by output_dir=... (a name has 1 to "
            f"{NAME_BYTES} printable bytes)."
        )


def suggest(name: str, allowed: Any) -> str:
    """Return ' (did you mean X?)' if one of `allowed` is similar to `name`, else ''."""
    near = difflib.get_close_matches(name, [str(a) for a in allowed], n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def choose(kind: str, name: str, registry: Mapping[str, Any]) -> Any:
    """Return `registry[name]`.

    Raises:
        UserError: the name is not registered; the message lists the registered names.
    """
    if name not in registry:
        raise UserError(f"unknown {kind} {name!r}{suggest(name, registry)}; allowed: {', '.join(registry)}.")
    return registry[name]


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _names(spec_type: Any) -> str:
    return ", ".join(f.name for f in dataclasses.fields(spec_type))


def _type_name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
