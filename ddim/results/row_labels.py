"""Labels of the rows of tables, which tell samplers and checkpoints apart."""

import json
from collections.abc import Sequence
from typing import Any

from ddim.results.protocol import SHORT, differing_keys, setting_text, shared_protocol, weights_label
from ddim.results.records import Record, record_key


def distinct_labels(records: Sequence[Record]) -> list[Record]:
    """Return completed records whose label names one sampler, among those of the same protocol.

    Labels leave out what is rarely set, such as some `kwargs`, and of files they have the name at most. Where samplers
    of one label differ, it is followed by the settings in which they do, or by a hash of the times.
    """
    labelled = [(_entry(record), record) for record in _with_differences(records)]
    taus: dict[str, set[tuple[float, ...]]] = {}
    for entry, record in labelled:
        taus.setdefault(entry, set()).add(tuple(record["sampler"]["tau"]))
    return [
        record | {"label": f"{record['label']} (τ {record_key({'tau': record['sampler']['tau']})[:6]})"}
        if len(taus[entry]) > 1
        else record
        for entry, record in labelled
    ]


def _with_differences(records: Sequence[Record]) -> list[Record]:
    rows: dict[str, list[dict[str, Any]]] = {}
    named = [(record, _row(record), _settings(record)) for record in records]
    for _, row, settings in named:
        rows.setdefault(row, []).append(settings)
    texts = {row: _texts(samplers) for row, samplers in rows.items()}
    labelled = []
    for record, row, settings in named:
        text = texts[row][record_key(settings)]
        labelled.append(record | {"label": f"{record['label']} ({text})"} if text else record)
    return labelled


def _texts(samplers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return key of the settings of a sampler -> what to add to their label; "" for samplers that are all the same."""
    keys = differing_keys(samplers)
    orders = {settings.get("order") for settings in samplers} - {None}
    if len(orders) == 1:  # the default of the rule, or given
        keys = [key for key in keys if key != "order"]
    texts = {}
    for settings in samplers:
        given = [(key, settings[key]) for key in keys if settings.get(key) is not None]
        texts[record_key(settings)] = ", ".join(f"{key}={setting_text(value)[:SHORT]}" for key, value in given)
    if keys and len(set(texts.values())) < len({record_key({k: s.get(k) for k in keys}) for s in samplers}):
        return {key: ", ".join(filter(None, (text, key[:6]))) for key, text in texts.items()}
    return texts


def _settings(record: Record) -> dict[str, Any]:
    """Return the settings of a record's sampler on one level, without its times, which stand with S."""
    sampler = record["sampler"] | (record["sampler"].get("kwargs") or {})
    return {key: value for key, value in sampler.items() if key not in ("tau", "kwargs")}


def _row(record: Record) -> str:
    return json.dumps([shared_protocol(record) | {"seed": None}, record["label"]], sort_keys=True)


def _entry(record: Record) -> str:
    return json.dumps([_row(record), record["spacing"], record["S"]])


def join_checkpoints(records: Sequence[Record]) -> list[Record]:
    """Return completed records such that those of several checkpoints can share a table.

    Where checkpoints share the rest of a protocol, the labels of their records name the run, with step, weights and
    hash as far as runs do not differ; `model` then is what all have in common, and each of them under "checkpoints".
    """
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        shared = shared_protocol(record) | {"seed": None, "model": None}
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(i)
    joined = list(records)
    for members in groups.values():
        # One record of each model, whatever their order.
        ordered = sorted((records[i] for i in members), key=lambda r: (r.get("run", ""), r["key"]))
        models = {json.dumps(r["model"], sort_keys=True): r for r in ordered[::-1]}
        if len(models) == 1 or len({str(r.get("config", {}).get("checkpoint")) for r in ordered}) == 1:
            continue
        names = dict(zip(models, _checkpoint_names(list(models.values())), strict=True))
        recipes = [r.get("recipe", {}) for r in models.values()]
        keys = differing_keys(recipes) if all(recipes) else []  # older records have none
        checkpoints = {
            names[m]: r["model"] | {"settings": {key: r.get("recipe", {}).get(key) for key in keys}}
            for m, r in sorted(models.items(), key=lambda item: names[item[0]])
        }
        first, *others = (r["model"] for r in models.values())
        common = {key: value if all(m.get(key) == value for m in others) else None for key, value in first.items()}
        for i in members:
            label = f"{records[i]['label']}, {names[json.dumps(records[i]['model'], sort_keys=True)]}"
            joined[i] = records[i] | {"label": label, "model": common | {"checkpoints": checkpoints}}
    return joined


def _checkpoint_names(records: Sequence[Record]) -> list[str]:
    """Return a name for each of several models: as few of run, step, weights and hash as tell them from each other."""
    parts = [
        (
            r.get("run") or "weights",
            "" if r["model"]["step"] is None else f"step {r['model']['step']:,}",
            weights_label(r["model"]) or "the",
            r["model"]["weights_hash"][:8],
            r["model"].get("description_hash", ""),
        )
        for r in records
    ]
    for shown in ((0,), (0, 1), (0, 2), (0, 1, 2), (0, 3), (0, 1, 2, 3)):
        names = [" ".join(filter(None, (part[i] for i in shown))) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [" ".join(filter(None, part)) for part in parts]
