"""The protocol of a measurement: what all entries of a table share, and its description in words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddim.results.records import Record, revisions
from ddim.results.schema import IMAGES

DEFAULTS = {"kind": "fidelity", "first": 0, "paper": None, "seed": None, "bf16": False, "pixels": None}
SHARED = ("kind", "paper", "model", "n", "seed", "bf16", "pixels", "reference", "metric")
FULL = "full"  # the spacing of the chain 1..T
ADAPTIVE = "adaptive"  # the spacing where the error of a step decides the next
NO_MODEL = {"model": None, "sampler": {"last_time": 0, "tau": []}, "spacing": FULL}  # of a record of images
LABELS = {"raw": "online"}  # how records name weights -> how tables do
SHORT = 12  # hexadecimal digits of a shortened hash


def completed(record: Record) -> Record:
    """Return a record with the fields that older records lack."""
    if record.get("kind") == IMAGES:
        record = {"S": record["n"]} | record | NO_MODEL
    return DEFAULTS | {"n": record["reference"]["images"], "nfe": record["S"]} | record


def shared_protocol(record: Record) -> dict[str, Any]:
    """Return what a completed record shares with the other entries of its table, except for the spacing.

    Ranges of n images that start at a multiple of n (after the same offset) are the same or disjoint, so the entries
    of one table can be averaged over them.
    """
    shared = {key: record[key] for key in SHARED} | ({"tf32": True} if record.get("tf32") else {})
    if record["kind"] == "trajectory":  # what samples are compared with has the seed's x_T; its name says the rest
        shared["reference"] = record["reference"] | {"fingerprint": None}
    return shared | {"last_time": record["sampler"]["last_time"], "offset": record["first"] % record["n"]}


def measured_by(record: Record) -> tuple[str, int, str]:
    """Return what numbers of one name, sampler and seed may differ in: their reference, first image and precision."""
    reference = record["reference"]
    return f"{reference['name']} ({reference['fingerprint'][:SHORT]})", record["first"], precision(record)


def precision(record: Mapping[str, Any]) -> str:
    """Return in what a network was run: bfloat16, TF32 or float32."""
    return "bfloat16" if record["bf16"] else "TF32" if record.get("tf32") else "float32"


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that have several values; a key that is missing counts as null."""
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if len({json.dumps(values.get(key)) for values in settings}) > 1]


def setting_text(value: Any) -> str:
    """Return a setting as on the command line, floats to four digits; "" for null."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def title(metric: str, p: dict[str, Any], ranges: set[int]) -> str:
    """Return one line that states what was measured.

    Args:
        metric, p: of the table.
        ranges: the numbers of ranges of images behind the entries, of all seeds together.
    """
    data, model = p["reference"], p["model"]
    if p["kind"] == "reconstruction":
        images = f"{p['n']:,} images of {data['name']}, encoded and decoded"
    elif p["kind"] == "likelihood":
        images = f"{p['n']:,} images of {data['name']}, {p['pixels']}"
    elif p["kind"] == "trajectory":
        images = f"{p['n']:,} images against {data['name']}, from the same x_T"
    else:
        # Published statistics do not state their number of images.
        count = "" if data["images"] is None else f"{data['images']:,} of "
        images = f"{p['n']:,} images against {count}{data['name']}"
    if p["kind"] == IMAGES:
        return f"{metric}: {images}"
    of = f"of {len(model['checkpoints'])} checkpoints" if "checkpoints" in model else model["weights_hash"][:8]
    step = "" if model["step"] is None else f" at step {model['step']:,}"
    sets = "sets of images" if isinstance(p["seed"], list) else "ranges of images"
    if p["kind"] == "likelihood" and isinstance(p["seed"], list):  # of the same images
        sets = "seeds"
    fewer = ", or as many as an entry states" if len(ranges) > 1 else ""
    return _join(
        f"{metric}: {images}",
        f"{_weights_label(model)} weights {of}{step}",
        f"tau {p['spacing']}",
        _seeds(p["seed"]),
        f"from image {p['offset']:,} on" if p["offset"] else "",
        "" if precision(p) == "float32" else precision(p),
        f"ends at alpha_bar[{p['last_time']}]" if p["last_time"] else "",
        f"mean ± sample standard deviation over {max(ranges)} {sets}{fewer}" if max(ranges) > 1 else "",
    )


def describe(metric: str, p: dict[str, Any], rows: dict[str, list[Record]], *, full: bool) -> list[tuple[str, str]]:
    """Return the complete protocol of a table as (name, text).

    Args:
        metric, p: of the table.
        rows: row label -> its records.
        full: give hashes and lists of times in full; else shortened.
    """
    records = [record for members in rows.values() for record in members]
    of_images = p["kind"] == IMAGES
    items = [
        ("metric", f"{metric} (less is better)" if is_distance(metric) else metric),
        ("images", f"n = {p['n']:,}: {_fingerprints(records, full) if of_images else _ranges(records, full)}"),
        ("reference set", _reference(p["reference"], p["metric"], full)),
        ("extractor", _extractor(p["metric"], full)),
    ]
    if not of_images:
        items += _sampling(p, rows, full)
    items.append(("code revision", distinct(_hash(revision, full) for r in records for revision in revisions(r))))
    return [(name, text) for name, text in items if text]


def _sampling(p: dict[str, Any], rows: dict[str, list[Record]], full: bool) -> list[tuple[str, str]]:
    """Return the part of the protocol that is about the model and the sampler."""
    records = [record for members in rows.values() for record in members]
    model = p["model"]
    models = [*model.get("checkpoints", {"": model}).values()]
    return [
        ("weights", _weights(model, records, full)),
        ("settings", _settings(model)),
        ("schedule", "; ".join(dict.fromkeys(map(_schedule, models)))),
        ("τ", f"{p['spacing']}: {_times(rows, p['spacing'], full)}"),
        ("clip of x̂0", _clip(rows)),
        ("end", f"alpha_bar[{p['last_time']}]" + ("" if p["last_time"] else " = 1")),
        ("pixels", p["pixels"] or ""),
        ("network in", precision(p)),
        ("computed with", distinct((r.get("compute") or {}).get("settings") for r in records)),
        ("seed", _seeds(p["seed"], full).removeprefix("seed ")),
    ]


def is_distance(metric: str) -> bool:
    """Return whether less of a metric is better."""
    return not metric.startswith(("is_", "precision_", "recall_", "accuracy_"))


def times_of(rows: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, list[float]]]:
    """Return spacing -> S -> the list τ; where rows have several, each S is followed by the rows in brackets.

    Args:
        rows: row label -> its records.
    """
    lists: dict[tuple[str, int], dict[tuple[float, ...], list[str]]] = {}
    for row, records in rows.items():
        for r in records:
            lists.setdefault((r["spacing"], r["S"]), {}).setdefault(tuple(r["sampler"]["tau"]), []).append(row)
    times: dict[str, dict[str, list[float]]] = {}
    for spacing, S in sorted(lists, key=lambda key: (key[0] == FULL, key)):
        for tau, members in lists[spacing, S].items():
            of = f" ({', '.join(dict.fromkeys(members))})" if len(lists[spacing, S]) > 1 else ""
            times.setdefault(spacing, {})[f"{S}{of}"] = list(tau)
    return times


def distinct(values: Iterable[str | None]) -> str:
    """Return the distinct values that are not empty, sorted, in one line."""
    return ", ".join(sorted({value for value in values if value}))


def _reference(data: dict[str, Any], metric: dict[str, Any], full: bool) -> str:
    fingerprint = _named("fingerprint", _hash(data["fingerprint"], full))
    if data["images"] is None:  # whose split the file does not state
        return _join(data["name"], "published statistics", fingerprint)
    count = f"{data['images']:,} images"
    return _join(data["name"], _named("split", metric.get("reference_split")), count, fingerprint)


def _extractor(metric: dict[str, Any], full: bool) -> str:
    layer, resize = (_named(name, metric.get(key)) for name, key in (("layer", "feature_layer"), ("resize", "resize")))
    weights = _named("weights", _hash(metric.get("weights_hash"), full))
    traces = (_named(name, metric.get(name)) for name in ("probe", "probes", "tolerance"))  # of a likelihood
    bfloat16 = "in bfloat16" if metric.get("bf16") else ""
    return _join(metric.get("extractor", metric.get("name")), layer, resize, weights, bfloat16, *traces)


def _weights(model: dict[str, Any], records: list[Record], full: bool) -> str:
    trained_on = _named("trained on", distinct(r.get("trained_on") for r in records))
    texts = []
    for name, one in model.get("checkpoints", {"": model}).items():
        step = "" if one["step"] is None else f"step {one['step']:,}"
        text = _join(_weights_label(one), _named("hash", _hash(one["weights_hash"], full)), step, trained_on)
        texts.append(f"{name}: {text}" if name else text)
    return "; ".join(texts)


def weights_label(model: Mapping[str, Any]) -> str:
    """Return how tables name the weights of a record's `model`."""
    return LABELS.get(model["weights"], model["weights"])


def _weights_label(model: Mapping[str, Any]) -> str:
    return weights_label(model) or "the"


def _schedule(model: dict[str, Any]) -> str:
    return _join(model.get("schedule"), f"T={model['T']}", _named("prediction", model.get("prediction")))


def _settings(model: dict[str, Any]) -> str:
    """Return the settings in which the trainings of several checkpoints differ."""
    return "; ".join(
        f"{name}: {_join(*(_named(key, setting_text(value)) for key, value in one['settings'].items()))}"
        for name, one in model.get("checkpoints", {}).items()
        if one["settings"]
    )


def _times(rows: dict[str, list[Record]], own: str, full: bool) -> str:
    texts = []
    for spacing, lists in times_of(rows).items():
        named = "" if spacing == own else f"{spacing} "
        for S, tau in lists.items():
            shown = _shortened([str(t) if full else setting_text(t) for t in tau], full)
            if tau == list(range(1, len(tau) + 1)):
                shown = [f"each from 1 to {len(tau)}"]
            texts.append(f"{named}S={S}: {', '.join(shown)}")
    return "; ".join(texts)


def _clip(rows: dict[str, list[Record]]) -> str:
    members: dict[str, list[str]] = {}
    for row, records in rows.items():
        members.setdefault(distinct(_clip_policy(r["sampler"]) for r in records), []).append(row)
    return "; ".join(f"{clip} ({', '.join(rows)})" if len(members) > 1 else clip for clip, rows in members.items())


def _clip_policy(sampler: dict[str, Any]) -> str:
    limits = (_named(key, sampler.get(key)) for key in ("clip_range", "threshold_ratio", "threshold_max"))
    return " ".join([sampler.get("clip") or "", *filter(None, limits)])


def _fingerprints(records: list[Record], full: bool) -> str:
    return "; ".join(f"{r['label']} fingerprint {_hash(r['images']['fingerprint'], full)}" for r in records)


def _ranges(records: list[Record], full: bool) -> str:
    ranges = sorted({(r["first"], r["first"] + r["n"] - 1) for r in records})
    return "numbers " + "; ".join(_shortened([f"{first:,} to {last:,}" for first, last in ranges], full))


def _seeds(seed: int | list[int] | None, full: bool | None = None) -> str:
    """Return the seed, or the number of seeds: all of them if `full`, the first and the last if not `full`."""
    if not isinstance(seed, list):
        return _named("seed", seed)
    return f"{len(seed)} seeds" + ("" if full is None else f": {', '.join(_shortened([*map(str, seed)], full))}")


def _shortened(texts: list[str], full: bool) -> list[str]:
    return texts if full or len(texts) <= 6 else [*texts[:4], "…", *texts[-2:]]


def _hash(value: str | None, full: bool) -> str:
    """Shorten a hash unless `full`; a mark after it, as in "+changes", stays."""
    if value is None or full:
        return value or ""
    digits, mark, rest = value.partition("+")
    return digits[:SHORT] + mark + rest


def _named(name: str, value: Any) -> str:
    return "" if value in (None, "") else f"{name} {value}"


def _join(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)
