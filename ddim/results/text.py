"""Tables as Markdown, CSV, JSON and LaTeX; seconds as CSV, in a file of their own."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from ddim.results.escape import escape_csv, escape_latex, escape_markdown
from ddim.results.interval import Interval
from ddim.results.protocol import times_of
from ddim.results.records import Record, revisions
from ddim.results.table import DIGITS, Table, rounded
from ddim.results.templates import load_template

TABLE_COLUMNS = ("table", "metric", "sampler", "S", "value", "std", "ranges", "paper", "difference", "percent")
INTERVAL_COLUMNS = ("low", "high", "to_best", "to_best_low", "to_best_high")  # with table.interval=true
RECORD_COLUMNS = ("n", "spacing", "distinct_evaluations")
LATEX_DELIMITERS = {  # of the template's expressions: Jinja's own braces belong to LaTeX
    **{"block_start_string": "<%", "block_end_string": "%>"},
    **{"variable_start_string": "<<", "variable_end_string": ">>"},
    **{"comment_start_string": "<#", "comment_end_string": "#>"},
}


def markdown(tables: Sequence[Table], impossible: Sequence[tuple[str, str]] = ()) -> str:
    """Return each table with its title, the comparison with the paper, and its complete protocol.

    Below them stands what is `impossible`: (evaluation, reason).
    """
    sections = [*map(_section, tables)] or ["There are no records.\n"]
    if impossible:
        entries = (f"- {escape_markdown(title)}: {escape_markdown(reason)}\n" for title, reason in impossible)
        sections.append(f"**Not possible**\n\n{''.join(entries)}")
    return "\n".join(sections)


def _section(table: Table) -> str:
    heading = f"### {escape_markdown(table.heading)}\n\n" if table.heading else ""
    note = f"{escape_markdown(table.note)}\n\n" if table.note else ""
    items = table.describe_protocol(full=False)
    protocol = "".join(f"- {name}: {escape_markdown(text)}\n" for name, text in items)
    return f"{heading}**{escape_markdown(table.title())}**\n\n{table.markdown()}\n\n{note}{protocol}"


def as_csv(tables: Sequence[Table]) -> str:
    """Return a line for each entry: `value` is the mean over `ranges` ranges of images, `key` lists their records."""
    added = ["nfe"] if any(table.by_nfe for table in tables) else []
    intervals = INTERVAL_COLUMNS if any(table.with_intervals for table in tables) else ()
    lines: list[Sequence[Any]] = [[*TABLE_COLUMNS, *RECORD_COLUMNS, *added, *intervals, "key"]]
    for number, table in enumerate(tables):
        for row, nfe in ((row, nfe) for row in table.rows for nfe in table.columns if (row, nfe) in table.entries):
            records = table.entries[row, nfe]
            comparison = [_digits(of(row, nfe)) for of in (table.paper_value, table.difference, table.percent)]
            numbers = [_digits(table.value(row, nfe)), _digits(table.spread(row, nfe)), len(records), *comparison]
            settings = [records[0].get(column, "") for column in (*RECORD_COLUMNS, *added)]
            keys = " ".join(r["key"] for r in records)
            if intervals:
                difference, ends = table.differences.get((row, nfe), (None, None))
                settings += map(_digits, (*_ends(table.interval(row, nfe)), difference, *_ends(ends)))
            lines.append([number, table.metric, row, records[0]["S"], *numbers, *settings, keys])
    return csv_text(lines)


def timing_csv(records: Sequence[Record]) -> str:
    """Return the seconds of each record. They differ from run to run, so they are not in the tables."""
    header = ["sampler", "S", "spacing", "n", "first", "seconds_sampling", "seconds_per_image", "seconds_metrics"]
    lines: list[Sequence[Any]] = [[*header, "device", "processes", "batch_size", "key"]]
    for r in sorted(records, key=lambda r: (r["label"], r["S"], r["spacing"], r["first"], r["key"])):
        compute, seconds = r.get("compute") or {}, r.get("seconds_sampling")
        per_image = None if seconds is None else seconds / r["n"]
        times = [_digits(seconds), _digits(per_image), _digits(r.get("seconds_metrics"))]
        device = [compute.get(key, "") for key in ("device", "processes", "batch_size")]
        lines.append([r["label"], r["S"], r["spacing"], r["n"], r["first"], *times, *device, r["key"]])
    return csv_text(lines)


def terms_csv(records: Sequence[Record]) -> str:
    """Return the terms of variational bounds: L_s of the step from t to s, bits per dimension; the last is L_T."""
    lines: list[Sequence[Any]] = [["sampler", "term", "t", "bits_per_dim", "key"]]
    for r in records:
        tau = r["sampler"]["tau"]
        names = [*(f"L_{s}" for s in (0, *tau[:-1])), "L_T"]
        rows = zip(names, [*tau, tau[-1]], r["terms"], strict=True)
        lines += [[r["label"], name, t, _digits(term), r["key"]] for name, t, term in rows]
    return csv_text(lines)


def class_csv(records: Sequence[Record]) -> str:
    """Return the numbers of each class, of records whose metrics have them."""
    lines: list[Sequence[Any]] = [["sampler", "S", "nfe", "metric", "class", "value", "key"]]
    for r in sorted(records, key=lambda r: (r["label"], r["S"], r["key"])):
        for metric, values in r.get("per_class", {}).items():
            lines += [[r["label"], r["S"], r["nfe"], metric, name, _digits(x), r["key"]] for name, x in values.items()]
    return csv_text(lines)


def as_json(tables: Sequence[Table]) -> str:
    """Return a list with everything about each table, including the complete lists τ."""
    text = json.dumps([_content(table) for table in tables], indent=2, ensure_ascii=False)
    # Lists of numbers on one line; a line break cannot be inside a string.
    return re.sub(r"\[[^\[\]{}]*\]", lambda match: re.sub(r"\n\s*", " ", match[0]), text) + "\n"


def _content(table: Table) -> dict[str, Any]:
    records = table.records()
    all_records = [r for members in records.values() for r in members]
    content = {
        "metric": table.metric,
        "title": table.title(),
        "heading": table.heading,
        "protocol": table.protocol,
        "tau": times_of(records),
        "clip": {row: sorted({r["sampler"].get("clip", "") for r in records[row]}) for row in table.rows},
        "first": sorted({r["first"] for r in all_records}),
        "revisions": sorted({revision for r in all_records for revision in revisions(r)}),
        **({"column": table.column} if table.by_nfe else {}),
        "columns": table.columns,
        "rows": _rows(table, table.value),
        "ranges": {row: [len(table.values(row, nfe)) for nfe in table.columns] for row in table.rows},
    }
    if table.ranges > 1:
        content["std"] = _rows(table, table.spread)
    if table.with_intervals:
        ends = {row: [table.interval(row, nfe) for nfe in table.columns] for row in table.rows}
        differences = {row: [table.differences.get((row, nfe)) for nfe in table.columns] for row in table.rows}
        content["interval"] = {row: [_rounded(pair) for pair in pairs] for row, pairs in ends.items()}
        content["to_best"] = {
            row: [None if d is None else [rounded(d[0]), *map(rounded, d[1])] for d in members]
            for row, members in differences.items()
        }
    if table.note:
        content["comparison"] = table.note
    if table.paper is not None:
        content["paper"] = _rows(table, table.paper_value)
        content["difference"] = _rows(table, table.difference)
        content["percent"] = _rows(table, table.percent)
    return content


def _rows(table: Table, entry: Callable[[str, int], float | None]) -> dict[str, list[float | None]]:
    numbers = {row: [entry(row, nfe) for nfe in table.columns] for row in table.rows}
    return {row: [None if x is None else rounded(x) for x in values] for row, values in numbers.items()}


def latex(tables: Sequence[Table]) -> str:
    """Return a table environment for each table; the document needs the package booktabs and no other."""
    return load_template("table.tex.j2", finalize=escape_latex, **LATEX_DELIMITERS).render(tables=tables)


def latex_body(table: Table) -> str:
    """Return a table as a tabular alone, the best of each column bold, for a float and a caption of one's own."""
    return load_template("table_body.tex.j2", finalize=escape_latex, **LATEX_DELIMITERS).render(
        table=table, mark_best=True
    )


def _digits(value: float | None) -> str:
    return "" if value is None else f"{rounded(value):.{DIGITS}g}"


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else interval


def _rounded(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [rounded(end) for end in interval]


def csv_text(lines: Sequence[Sequence[Any]]) -> str:
    """Return lines of entries as a CSV file."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([escape_csv(entry) for entry in line] for line in lines)
    return out.getvalue()
