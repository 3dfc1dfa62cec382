"""What the cells of one table share, and how it is said."""

from collections.abc import Iterable
from typing import Any

from ddim.results.records import Record

DEFAULTS = {"kind": "fidelity", "first": 0, "paper": None, "seed": None, "bf16": False, "pixels": None}
SHARED = ("kind", "paper", "model", "n", "seed", "bf16", "pixels", "reference", "metric")
FULL = "full"  # the spacing of the chain 1..T
SHORT = 12  # hexadecimal digits of a hash where people read it


def completed(record: Record) -> Record:
    """Return a record with the fields that older ones lack."""
    return DEFAULTS | {"n": record["reference"]["images"]} | record


def protocol(record: Record) -> dict[str, Any]:
    """Return what a completed record shares with the other cells of its table; the spacing comes on top.

    Ranges of n images that start at a multiple of n (after the same offset) are the same or disjoint, so that the
    cells of one table can be averaged over them.
    """
    shared = {key: record[key] for key in SHARED}
    return shared | {"last_time": record["sampler"]["last_time"], "offset": record["first"] % record["n"]}


def title(metric: str, p: dict[str, Any], ranges: set[int]) -> str:
    """Return one line that says what was measured; `ranges` holds how many ranges of images the cells are over."""
    data, model = p["reference"], p["model"]
    if p["kind"] == "reconstruction":
        images = f"{p['n']:,} images of {data['name']}, encoded and decoded"
    else:
        images = f"{p['n']:,} images against {data['images']:,} of {data['name']}"
    step = "" if model["step"] is None else f" at step {model['step']:,}"
    most, fewer = max(ranges), ", or as many as a cell says" if len(ranges) > 1 else ""
    parts = [
        f"{metric}: {images}",
        f"{model['weights']} weights {model['weights_hash'][:8]}{step}",
        f"tau {p['spacing']}",
        "" if p["seed"] is None else f"seed {p['seed']}",
        f"from image {p['offset']:,} on" if p["offset"] else "",
        "bfloat16" if p["bf16"] else "",
        f"ends at alpha_bar[{p['last_time']}]" if p["last_time"] else "",
        f"mean ± sample standard deviation over {most} ranges of images{fewer}" if most > 1 else "",
    ]
    return ", ".join(part for part in parts if part)


def facts(metric: str, p: dict[str, Any], rows: dict[str, list[Record]], *, full: bool) -> list[tuple[str, str]]:
    """Return the whole protocol of a table as (name, text).

    Args:
        metric, p: of the table.
        rows: row label -> its records.
        full: hashes and lists of times in full; else shortened.
    """
    records = [record for members in rows.values() for record in members]
    model, data, features = p["model"], p["reference"], p["metric"]
    extractor = [features.get("extractor", features.get("name", "")), _named("layer", features.get("feature_layer"))]
    extractor += [
        _named("resize", features.get("resize")),
        _named("weights", _hash(features.get("weights_hash"), full)),
    ]
    reference = [data["name"], _named("split", features.get("reference_split")), f"{data['images']:,} images"]
    step = None if model["step"] is None else f"{model['step']:,}"
    weights = [model["weights"], _named("hash", _hash(model["weights_hash"], full)), _named("step", step)]
    schedule = [model.get("schedule"), f"T={model['T']}", _named("prediction", model.get("prediction"))]
    found = [
        ("metric", f"{metric} (less is better)" if is_distance(metric) else metric),
        ("images", f"n = {p['n']:,}: {_ranges(records)}"),
        ("reference set", _list([*reference, _named("fingerprint", _hash(data["fingerprint"], full))])),
        ("extractor", _list(extractor)),
        ("weights", _list([*weights, _named("trained on", _different(r.get("trained_on") for r in records))])),
        ("schedule", _list(schedule)),
        ("τ", f"{p['spacing']}: {_times(records, p['spacing'], full)}"),
        ("clip of x̂0", _clip(rows)),
        ("end", f"alpha_bar[{p['last_time']}]" + ("" if p["last_time"] else " = 1")),
        ("pixels", p["pixels"] or ""),
        ("network in", "bfloat16" if p["bf16"] else "float32"),
        ("seed", "" if p["seed"] is None else str(p["seed"])),
        ("code revision", _different(_hash(r.get("revision"), full) for r in records)),
    ]
    return [(name, text) for name, text in found if text]


def is_distance(metric: str) -> bool:
    """Return whether less of a metric is better."""
    return not metric.startswith(("is_", "precision_", "recall_"))


def times_of(records: Iterable[Record]) -> dict[str, dict[str, list[int]]]:
    """Return spacing -> S -> the list τ."""
    lists = {(r["spacing"], r["S"]): r["sampler"]["tau"] for r in records}
    found: dict[str, dict[str, list[int]]] = {}
    for spacing, S in sorted(lists, key=lambda key: (key[0] == FULL, key)):
        found.setdefault(spacing, {})[str(S)] = lists[spacing, S]
    return found


def _times(records: list[Record], own: str, full: bool) -> str:
    texts = []
    for spacing, lists in times_of(records).items():
        named = "" if spacing == own else f"{spacing} "
        for S, tau in lists.items():
            shown = [str(t) for t in tau]
            if tau == list(range(1, len(tau) + 1)):
                shown = [f"each from 1 to {len(tau)}"]
            elif not full and len(shown) > 6:
                shown = [*shown[:4], "…", *shown[-2:]]
            texts.append(f"{named}S={S}: {', '.join(shown)}")
    return "; ".join(texts)


def _clip(rows: dict[str, list[Record]]) -> str:
    members: dict[str, list[str]] = {}
    for row, records in rows.items():
        members.setdefault(_different(r["sampler"].get("clip") for r in records), []).append(row)
    return "; ".join(f"{clip} ({', '.join(rows)})" if len(members) > 1 else clip for clip, rows in members.items())


def _ranges(records: list[Record]) -> str:
    ranges = sorted({(r["first"], r["first"] + r["n"] - 1) for r in records})
    return "numbers " + "; ".join(f"{first:,} to {last:,}" for first, last in ranges)


def _different(values: Iterable[str | None]) -> str:
    return ", ".join(sorted({value for value in values if value}))


def _hash(value: str | None, full: bool) -> str:
    """Shorten a hash; a mark after it, as in "+changes", stays."""
    if value is None or full:
        return value or ""
    digits, mark, rest = value.partition("+")
    return digits[:SHORT] + mark + rest


def _named(name: str, value: Any) -> str:
    return "" if value in (None, "") else f"{name} {value}"


def _list(parts: Iterable[str | None]) -> str:
    return ", ".join(part for part in parts if part)
