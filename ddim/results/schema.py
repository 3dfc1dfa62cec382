"""Which fields the record of an evaluation has, and of which types: a file may be edited, or come from elsewhere."""

import reprlib
from pathlib import Path
from types import NoneType
from typing import Any

from ddim.results.records import Record, RecordFile

IMAGES = "images"  # the kind of a record of images that no checkpoint here made
Types = tuple[type, ...]
TEXT, INTEGER, NUMBER = (str,), (int,), (int, float)
REQUIRED: dict[str, Types] = {
    **dict.fromkeys(("key", "label", "spacing"), TEXT),
    **dict.fromkeys(("model.weights", "model.weights_hash", "reference.name", "reference.fingerprint"), TEXT),
    **dict.fromkeys(("S", "model.T", "sampler.last_time"), INTEGER),
    **dict.fromkeys(("model.step", "reference.images"), (*INTEGER, NoneType)),
    **dict.fromkeys(("metrics", "metric"), (dict,)),
    "sampler.tau": (list,),
}
OPTIONAL: dict[str, Types] = {  # that earlier versions did not write, or that are null
    **dict.fromkeys(("kind", "grid", "run", "training_run"), TEXT),
    **dict.fromkeys(("compute.device", "compute.settings", "compute.reason"), TEXT),
    **dict.fromkeys(
        ("paper", "pixels", "trained_on", "revision", "model.schedule", "model.prediction"), (str, NoneType)
    ),
    **dict.fromkeys(("sampler.clip", "metric.extractor", "metric.name", "metric.weights_hash"), (str, NoneType)),
    **dict.fromkeys(("n", "first", "nfe"), INTEGER),
    **dict.fromkeys(("seed", "compute.processes", "compute.batch_size"), (*INTEGER, NoneType)),
    **dict.fromkeys(("seconds_sampling", "seconds_metrics"), (*NUMBER, NoneType)),
    **dict.fromkeys(("config", "versions", "recipe", "intervals"), (dict,)),
    **dict.fromkeys(("condition", "per_class"), (dict,)),
    "tf32": (bool,),
    "compute": (dict, NoneType),
    "terms": (list,),
    "bf16": (bool,),
}
ITEMS: dict[str, Types] = {"metrics": NUMBER, "versions": (str, NoneType), "sampler.tau": NUMBER, "terms": NUMBER}
OF_IMAGES = (  # required where no model is sampled
    *("key", "label", "n", "images.fingerprint", "metrics", "metric"),
    *("reference.name", "reference.images", "reference.fingerprint"),
)
AT_LEAST_1 = ("S", "n", "model.T")
LARGEST = 1 << 64
NAMES = {str: "text", int: "an integer", float: "a number", bool: "true or false", dict: "a mapping", list: "a list"}
MISSING = object()


def evaluation_records(path: Path) -> RecordFile:
    """Return a file of records of evaluations, whose lines are checked as they are read."""
    return RecordFile(path, check_evaluation)


def check_evaluation(record: Record) -> None:
    """Check that a record has the fields that tables are made from.

    Raises:
        ValueError: one is missing, of another type, or out of range.
    """
    required = REQUIRED | {"images.fingerprint": TEXT, "n": INTEGER}
    for path in OF_IMAGES if record.get("kind") == IMAGES else REQUIRED:
        types = required[path]
        if (value := _value(record, path)) is MISSING:
            raise ValueError(f"it lacks {path}")
        _check(path, value, types)
    for path, types in OPTIONAL.items():
        if (value := _value(record, path)) is not MISSING:
            _check(path, value, types)
    for path, types in ITEMS.items():
        if (values := _value(record, path)) is not MISSING:
            for value in values.values() if isinstance(values, dict) else values:
                _check(f"an entry of {path}", value, types)
    for name, ends in record.get("intervals", {}).items():
        if not isinstance(ends, list) or len(ends) != 2:
            raise ValueError(f"the interval of {name} must be two numbers")
        for end in ends:
            _check(f"an end of the interval of {name}", end, NUMBER)
    if "n" not in record and record["reference"]["images"] is None:
        raise ValueError("it lacks n")
    if record.get("compute") and "device" not in record["compute"]:
        raise ValueError("it lacks compute.device")


def _value(record: Record, path: str) -> Any:
    outer, _, inner = path.partition(".")
    value = record.get(outer, MISSING)
    if not inner:
        return value
    return value.get(inner, MISSING) if isinstance(value, dict) else MISSING


def _check(path: str, value: Any, types: Types) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        allowed = " or ".join(NAMES.get(kind, "null") for kind in types if kind is not int or float not in types)
        raise ValueError(f"{path}={reprlib.repr(value)} must be {allowed}")
    if isinstance(value, int) and not (path in AT_LEAST_1) <= value < LARGEST:
        raise ValueError(f"{path}={reprlib.repr(value)} is out of range")
