"""Reports: tables, plots and a page, made from nothing but records.

The entries of a table share one protocol: model, weights, number of images, reference set, extractor and spacing.
Rows are samplers, columns are network evaluations of an image (NFE), which most samplers have as many of as steps S.
The full chain (S = T) belongs to every spacing. A table depends on neither the order of the records nor anything that
differs between two runs of the same evaluation, such as seconds.
"""

import json
import re
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

from ddim.io import atomic_write
from ddim.results import plots, text, training_plots
from ddim.results.html import render_page
from ddim.results.interval import Interval, paired_difference
from ddim.results.paper import SIGMA_HAT
from ddim.results.plot_spec import PlotSpec
from ddim.results.protocol import ADAPTIVE, FULL, completed, is_distance, shared_protocol
from ddim.results.records import Record, record_key
from ddim.results.row_labels import distinct_labels, join_checkpoints
from ddim.results.runs import Run, find_runs
from ddim.results.schema import IMAGES
from ddim.results.table import Table, TableSpec

PLAIN = TableSpec()


def build_tables(records: Sequence[Record]) -> list[Table]:
    """Return a table for each metric and protocol, in an order that does not depend on that of the records.

    An entry holds the records of all its seeds and disjoint ranges of images. Of several records for the same images
    one is chosen by a hash, so that neither their order nor their values matter. Samplers of the same label are told
    apart by what else is set. Several checkpoints share a table, whose rows name their runs.
    Samplers of one label and NFE that differ in S, as under guidance at some times only, have a row for each S.
    """
    tables = []
    labelled = distinct_labels([completed(record) for record in records])
    for shared, members in _by_protocol(join_checkpoints(labelled)):
        for spacing in sorted({r["spacing"] for r in members} - {FULL}) or [FULL]:
            rows = [(r["label"], r) for r in members if r["spacing"] == spacing]
            # The full chain joins the samplers that have this spacing, or no other.
            elsewhere = {r["label"] for r in members if r["spacing"] != FULL} - {label for label, _ in rows}
            if spacing != FULL:
                rows += [(r["label"], r) for r in members if r["spacing"] == FULL and r["label"] not in elsewhere]
            tables += _by_metric(shared | {"spacing": spacing}, rows)
    return tables


def sigma_hat_variants(records: Sequence[Record]) -> list[Table]:
    """Return a table of the variants of the σ̂ row for each protocol that has more than one.

    The paper states neither the times of its σ̂ row nor whether it was clipped. A variant is a spacing with a clip
    policy; the full chain belongs to every spacing.
    """
    tables = []
    for shared, members in _by_protocol([completed(record) for record in records]):
        members = [r for r in members if r["label"].startswith(SIGMA_HAT)]
        variants = {(r["label"], r["spacing"]) for r in members if r["spacing"] != FULL}
        if len(variants) < 2:
            continue
        rows = [
            (f"{label}, {spacing}", r)
            for label, spacing in variants
            for r in members
            if r["label"] == label and r["spacing"] in (spacing, FULL)
        ]
        count = {2: "two", 3: "three", 4: "four"}.get(len(variants), str(len(variants)))
        for table in _by_metric(shared | {"spacing": "of each row"}, rows):
            table.heading = f"{SIGMA_HAT}: {count} variants" + (" against the paper" if table.paper else "")
            tables.append(table)
    return tables


def write_report(
    records: Sequence[Record],
    folder: Path,
    *,
    command: str | None = None,
    failures: Sequence[tuple[str, str]] = (),
    impossible: Sequence[tuple[str, str]] = (),
    shown: TableSpec = PLAIN,
    style: Literal["screen", "paper"] = "screen",
    figure: PlotSpec = plots.SCREEN,
) -> list[Path]:
    """Write tables, plots and report.html of all records into `folder`.

    Args:
        records: of a sweep; there may be none.
        folder: that the records' grids lie in; created if needed.
        command: that repeats the sweep, shown on the page.
        failures: (evaluation, reason) of those that failed, shown on the page.
        impossible: (evaluation, reason) of those that no table can have, listed below the tables.
        shown: what the tables show besides the numbers.
        style: paper leaves the titles of the plots to the captions of a document.
        figure: size and format of the plots.

    Returns:
        The paths: table.md, table.csv, table.json, table.tex, a table_body_METRIC.tex of each table, timing.csv, the
        plots, each as PNG and PDF unless one format is asked for, report.html; terms.csv and a plot of bounds;
        classes.csv; those of `_training_plots`.
    """
    named = join_checkpoints(complete := distinct_labels([completed(record) for record in records]))
    tables = [*build_tables(records), *sigma_hat_variants(records)]
    if shown.interval:
        show_intervals(tables, folder)
    names = _names(tables)
    timings, runs, bounds = plots.timings(complete), find_runs(records), _bounds(named)
    texts = {
        "table.md": text.markdown(tables, impossible),
        "table.csv": text.as_csv(tables),
        "table.json": text.as_json(tables),
        "table.tex": text.latex(tables),
        **{f"table_body_{name}.tex": text.latex_body(table) for name, table in zip(names, tables, strict=True)},
        "timing.csv": text.timing_csv(named),
    }
    texts |= {"terms.csv": text.terms_csv(bounds)} if bounds else {}
    texts |= {"classes.csv": text.class_csv(named)} if any(r.get("per_class") for r in named) else {}
    paths = [_write(folder / name, content) for name, content in texts.items()]
    drawing = figure, style == "paper"
    table_plots = _table_plots(tables, names, folder, *drawing)
    time_plots = [
        plots.save_time_plot(timing, folder / f"{_numbered('plot_time', i)}.png", *drawing)
        for i, timing in enumerate(timings)
    ]
    of_training = _training_plots(tables, names, runs, folder, *drawing)
    terms = [plots.save_terms_plot(bounds, folder / "plot_terms.png", *drawing)] if bounds else []
    with_plots = list(zip(tables, table_plots, strict=True)), list(zip(timings, time_plots, strict=True))
    page = render_page(*with_plots, named, folder, command, failures, impossible, runs, [*of_training.items()], terms)
    drawings = [path for path in (*table_plots, *time_plots, *of_training, *terms) if path is not None]
    written = [*paths, *_formats(drawings, figure.format), _write(folder / "report.html", page)]
    _remove_others(folder, {table.metric for table in tables}, written)
    return written


def _table_plots(
    tables: Sequence[Table], names: Sequence[str], folder: Path, figure: PlotSpec, paper: bool
) -> list[Path | None]:
    """Draw tables; return the path of each, None for those of images, which have a single column."""
    return [
        None if table.column == IMAGES else plots.save_plot(table, folder / f"plot_{name}.png", figure, paper)
        for name, table in zip(names, tables, strict=True)
    ]


def _training_plots(
    tables: Sequence[Table], names: Sequence[str], runs: Sequence[Run], folder: Path, figure: PlotSpec, paper: bool
) -> dict[Path, str]:
    """Draw runs, and metrics of checkpoints against step or EMA length; return path of a plot -> what it shows."""
    drawn = [run for run in runs if run.curves]
    shown = {}
    if drawn:
        path = training_plots.save_training_plot(drawn, folder / "plot_training.png", figure)
        shown[path] = "losses and metrics of the training against the optimiser step"
    for name, table in zip(names, tables, strict=True):
        if (curves := training_plots.checkpoint_curves(table)) is not None:
            path = folder / f"plot_checkpoints_{name}.png"
            training_plots.save_checkpoints_plot(table, curves, path, figure, paper)
            shown[path] = f"{table.metric} against the {curves.x}"
    return shown


def _bounds(records: Sequence[Record]) -> list[Record]:
    """Return the records of variational bounds, by label."""
    return sorted((r for r in records if r.get("terms")), key=lambda r: (r["label"], r["key"]))


def _formats(pictures: Sequence[Path], kept: Literal["png", "pdf"] | None) -> list[Path]:
    """Return the PNG and the PDF of each plot; where one format is asked for, the other is removed."""
    paths = [path.with_suffix(f".{kind}") for path in pictures for kind in ("png", "pdf")]
    for path in paths:
        if kept is not None and path.suffix != f".{kept}":
            path.unlink()
    return [path for path in paths if kept is None or path.suffix == f".{kept}"]


def show_intervals(tables: Sequence[Table], folder: Path) -> None:
    """Let tables show intervals, and differences to the best entries, whose influences are in the records' folder."""
    for table in tables:
        table.with_intervals, table.differences = True, _differences(table, folder)


def _differences(table: Table, folder: Path) -> dict[tuple[str, int], tuple[float, Interval]]:
    """Return the difference of each entry to the best of its column, where both are from the same x_T."""
    differences = {}
    for nfe in table.columns:
        values = {row: value for row in table.rows if (value := table.value(row, nfe)) is not None}
        best = (min if is_distance(table.metric) else max)(values, key=values.__getitem__)
        for row in values.keys() - {best}:
            sides = table.entries[row, nfe], table.entries[best, nfe]
            if (difference := paired_difference(*sides, table.metric, folder)) is not None:
                differences[row, nfe] = difference
    return differences


def _by_protocol(records: Sequence[Record]) -> list[tuple[dict[str, Any], list[Record]]]:
    groups: dict[str, tuple[dict[str, Any], list[Record]]] = {}
    for record in records:
        shared = shared_protocol(record)
        groups.setdefault(json.dumps(shared | {"seed": None}, sort_keys=True), (shared, []))[1].append(record)
    return [groups[key] for key in sorted(groups)]


def _by_metric(shared: dict[str, Any], rows: list[tuple[str, Record]]) -> list[Table]:
    """Return a table for each metric of the records in `rows`, pairs of row label and record."""
    rows = _in_columns(sorted(rows, key=lambda pair: _tie_break(pair[1])))
    tables = []
    for metric in sorted({metric for _, r in rows for metric in r["metrics"]}):
        sets: dict[tuple[str, int], dict[tuple[int, int], Record]] = {}  # of images, by row and NFE
        for row, record in rows:
            if metric in record["metrics"]:
                seed = -1 if record["seed"] is None else record["seed"]
                sets.setdefault((row, record["nfe"]), {})[seed, record["first"]] = record
        entries = {key: tuple(by_set[name] for name in sorted(by_set)) for key, by_set in sets.items()}
        seeds = sorted({seed for by_set in sets.values() for seed, _ in by_set} - {-1})
        tables.append(Table(metric, shared | {"seed": seeds if len(seeds) > 1 else next(iter(seeds), None)}, entries))
    return tables


def _in_columns(rows: list[tuple[str, Record]]) -> list[tuple[str, Record]]:
    """Return rows of which each label has one S in a column, else S is added to it.

    The evaluations of an adaptive rule differ from seed to seed: the column is that of their median.
    """
    counts: dict[str, list[int]] = {}
    for row, record in rows:
        counts.setdefault(row, []).append(record["nfe"])
    medians = {row: statistics.median_low(counts[row]) for row, r in rows if r["spacing"] == ADAPTIVE}
    rows = [(row, r | dict.fromkeys(("S", "nfe"), medians[row]) if row in medians else r) for row, r in rows]
    steps: dict[tuple[str, int], set[int]] = {}
    for row, record in rows:
        steps.setdefault((row, record["nfe"]), set()).add(record["S"])
    return [(row if len(steps[row, r["nfe"]]) == 1 else f"{row}, S={r['S']}", r) for row, r in rows]


def _tie_break(record: Record) -> str:
    return record_key({key: record.get(key) for key in ("key", "metrics", "revision")})


def _names(tables: Sequence[Table]) -> list[str]:
    """Return the metric of each table, with a number from its second table on."""
    metrics = [table.metric for table in tables]
    return [_numbered(metric, metrics[:i].count(metric)) for i, metric in enumerate(metrics)]


def _remove_others(folder: Path, metrics: Collection[str], written: Collection[Path]) -> None:
    """Remove plots and bodies of tables that an earlier report had more of, which would pass for today's."""
    named = "|".join(map(re.escape, metrics))
    plot, body = rf"(plot_time|(plot|plot_checkpoints)_({named}))", rf"table_body(_({named}))?"
    ours = re.compile(rf"{plot}(_\d+)?\.(png|pdf)|{body}(_\d+)?\.tex")
    for path in folder.iterdir():
        if ours.fullmatch(path.name) and path.is_file() and path not in written:
            path.unlink()


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


def _write(path: Path, content: str) -> Path:
    with atomic_write(path) as partial:
        partial.write_text(content, encoding="utf-8", errors="backslashreplace")
    return path
