"""Tables, plots and a page, made from records and from nothing else.

A table holds cells of one protocol: same model, weights, number of images, seed, reference, extractor and spacing. Rows
are samplers, columns are numbers of steps. The full chain (S = T) belongs to every spacing. Neither the order of the
records nor anything that differs between two runs of the same cells, such as seconds, changes a table.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddim.io import atomic_write
from ddim.results import plots, text
from ddim.results.html import page
from ddim.results.paper import SIGMA_HAT
from ddim.results.protocol import FULL, completed, protocol
from ddim.results.records import Record, record_key
from ddim.results.table import Table


def build_tables(records: Sequence[Record]) -> list[Table]:
    """Sort records into tables, one for each metric and protocol, in an order that does not depend on theirs.

    A cell that is there for several disjoint ranges of images holds them all. Of several records for the same images
    one stays, by a hash: neither their order nor which number is better decides.
    """
    tables = []
    for shared, members in _groups(records):
        for spacing in sorted({r["spacing"] for r in members} - {FULL}) or [FULL]:
            rows = [(r["label"], r) for r in members if r["spacing"] == spacing]
            # The full chain joins the samplers that have this spacing, or have none.
            elsewhere = {r["label"] for r in members if r["spacing"] != FULL} - {label for label, _ in rows}
            rows += [
                (r["label"], r) for r in members if r["spacing"] == FULL != spacing and r["label"] not in elsewhere
            ]
            tables += _tables(shared | {"spacing": spacing}, rows)
    return tables


def sigma_hat_variants(records: Sequence[Record]) -> list[Table]:
    """Return a table of the σ̂ row in each of its readings, where a protocol has more than one.

    The paper does not say on which times, nor whether clipped, its σ̂ row was made. The rows are the spacings and clip
    policies that there are; the full chain belongs to every spacing.
    """
    tables = []
    for shared, members in _groups(records):
        members = [r for r in members if r["label"].startswith(SIGMA_HAT)]
        rows = {(r["label"], r["spacing"]) for r in members if r["spacing"] != FULL}
        if len(rows) < 2:
            continue
        cells = [
            (f"{label}, {spacing}", r)
            for label, spacing in rows
            for r in members
            if r["label"] == label and r["spacing"] in (spacing, FULL)
        ]
        count = {2: "two", 3: "three", 4: "four"}.get(len(rows), str(len(rows)))
        found = _tables(shared | {"spacing": "of each row"}, cells)
        for table in found:
            table.heading = f"{SIGMA_HAT}: {count} readings" + (" against the paper" if table.paper else "")
        tables += found
    return tables


def write_report(
    records: Sequence[Record],
    folder: Path,
    *,
    command: str | None = None,
    failures: Sequence[tuple[str, str]] = (),
) -> list[Path]:
    """Write tables, plots and report.html of all records into `folder`.

    Args:
        records: of a sweep; there may be none.
        folder: that the records' grids lie in; made if it is not there.
        command: that repeats the sweep, shown on the page.
        failures: (cell, reason) of those that failed, shown on the page.

    Returns:
        The paths: table.md, table.csv, table.json, table.tex, timing.csv, the plots, each as PNG and PDF, report.html.
    """
    tables = [*build_tables(records), *sigma_hat_variants(records)]
    timings = plots.timings([completed(record) for record in records])
    texts = {
        "table.md": text.markdown(tables),
        "table.csv": text.as_csv(tables),
        "table.json": text.as_json(tables),
        "table.tex": text.latex(tables),
        "timing.csv": text.timing_csv([completed(record) for record in records]),
    }
    paths = [_write(folder / name, text) for name, text in texts.items()]
    pictures: list[Path] = []
    for number, table in enumerate(tables):
        name = f"plot_{table.metric}" if number == 0 else f"plot_{table.metric}_{number}"
        pictures.append(plots.save(plots.plot(table), folder / f"{name}.png"))
    for number, timing in enumerate(timings):
        pictures.append(plots.save(plots.plot_time(timing), folder / f"plot_time{f'_{number}' if number else ''}.png"))
    paths += [path for picture in pictures for path in (picture, picture.with_suffix(".pdf"))]
    html = page(tables, timings, pictures, records, folder, command, failures)
    return [*paths, _write(folder / "report.html", html)]


def _groups(records: Sequence[Record]) -> list[tuple[dict[str, Any], list[Record]]]:
    groups: dict[str, tuple[dict[str, Any], list[Record]]] = {}
    for record in map(completed, records):
        shared = protocol(record)
        groups.setdefault(json.dumps(shared, sort_keys=True), (shared, []))[1].append(record)
    return [groups[key] for key in sorted(groups)]


def _tables(shared: dict[str, Any], rows: list[tuple[str, Record]]) -> list[Table]:
    """Return a table for each metric that any record of `rows`, pairs of label and record, has."""
    tables = []
    for metric in sorted({metric for _, r in rows for metric in r["metrics"]}):
        cells: dict[tuple[str, int], dict[int, Record]] = {}
        for row, record in sorted(rows, key=lambda pair: _tie(pair[1])):
            if metric in record["metrics"]:
                cells.setdefault((row, record["S"]), {})[record["first"]] = record
        tables.append(
            Table(metric, shared, {key: tuple(found[first] for first in sorted(found)) for key, found in cells.items()})
        )
    return tables


def _tie(record: Record) -> str:
    return record_key({key: record.get(key) for key in ("key", "metrics", "revision")})


def _write(path: Path, text: str) -> Path:
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
