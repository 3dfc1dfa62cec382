"""Tables as Markdown, CSV, JSON and LaTeX; seconds as CSV, in a file of their own."""

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from ddim.results.protocol import times_of
from ddim.results.records import Record
from ddim.results.table import DIGITS, Table, rounded

NOTHING = "There are no records.\n"
TABLE_COLUMNS = ("table", "metric", "sampler", "S", "value", "std", "ranges", "paper", "difference", "percent")
CELL_FACTS = ("n", "spacing", "distinct_evaluations")


def markdown(tables: Sequence[Table]) -> str:
    """Return each table with its title, its numbers, how it stands to the paper, and its whole protocol."""
    return "\n".join(map(_section, tables)) or NOTHING


def _section(table: Table) -> str:
    heading = f"### {table.heading}\n\n" if table.heading else ""
    note = f"{table.note}\n\n" if table.note else ""
    facts = "".join(f"- {name}: {text}\n" for name, text in table.facts(full=False))
    return f"{heading}**{table.title()}**\n\n{table.markdown()}\n\n{note}{facts}"


def as_csv(tables: Sequence[Table]) -> str:
    """Return a line for each cell; `ranges` counts those that `value` is the mean over, `key` names their records."""
    lines: list[Sequence[Any]] = [[*TABLE_COLUMNS, *CELL_FACTS, "key"]]
    for number, table in enumerate(tables):
        for row, S in ((row, S) for row in table.rows for S in table.columns if (row, S) in table.cells):
            records = table.cells[row, S]
            comparison = [_digits(of(row, S)) for of in (table.paper_value, table.difference, table.percent)]
            numbers = [_digits(table.value(row, S)), _digits(table.spread(row, S)), len(records), *comparison]
            facts = [records[0].get(fact, "") for fact in CELL_FACTS]
            lines.append([number, table.metric, row, S, *numbers, *facts, " ".join(r["key"] for r in records)])
    return _lines(lines)


def timing_csv(records: Sequence[Record]) -> str:
    """Return the seconds of each record; they differ from run to run, and so are not in the tables."""
    header = ["sampler", "S", "spacing", "n", "first", "seconds_sampling", "seconds_per_image", "seconds_metrics"]
    lines: list[Sequence[Any]] = [[*header, "device", "processes", "batch_size", "key"]]
    for r in sorted(records, key=lambda r: (r["label"], r["S"], r["spacing"], r["first"], r["key"])):
        compute, seconds = r.get("compute") or {}, r.get("seconds_sampling")
        per_image = None if seconds is None else seconds / r["n"]
        times = [_digits(seconds), _digits(per_image), _digits(r.get("seconds_metrics"))]
        where = [compute.get(key, "") for key in ("device", "processes", "batch_size")]
        lines.append([r["label"], r["S"], r["spacing"], r["n"], r["first"], *times, *where, r["key"]])
    return _lines(lines)


def as_json(tables: Sequence[Table]) -> str:
    """Return a list with everything about each table, the lists τ in full."""
    text = json.dumps([_content(table) for table in tables], indent=2, ensure_ascii=False)
    # Lists of numbers on one line; a line break cannot be inside a string.
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\n\s*", " ", found[0]), text) + "\n"


def _content(table: Table) -> dict[str, Any]:
    records = {row: [r for S in table.columns for r in table.cells.get((row, S), ())] for row in table.rows}
    every = [r for members in records.values() for r in members]
    content = {
        "metric": table.metric,
        "title": table.title(),
        "heading": table.heading,
        "protocol": table.protocol,
        "tau": times_of(every),
        "clip": {row: sorted({r["sampler"].get("clip", "") for r in records[row]}) for row in table.rows},
        "first": sorted({r["first"] for r in every}),
        "revisions": sorted({r["revision"] for r in every if "revision" in r}),
        "columns": table.columns,
        "rows": _rows(table, table.value),
        "ranges": {row: [len(table.values(row, S)) for S in table.columns] for row in table.rows},
    }
    if table.ranges > 1:
        content["std"] = _rows(table, table.spread)
    if table.note:
        content["comparison"] = table.note
    if table.paper is not None:
        content["paper"] = _rows(table, table.paper_value)
        content["difference"] = _rows(table, table.difference)
        content["percent"] = _rows(table, table.percent)
    return content


def _rows(table: Table, of: Any) -> dict[str, list[float | None]]:
    numbers = {row: [of(row, S) for S in table.columns] for row in table.rows}
    return {row: [None if x is None else rounded(x) for x in values] for row, values in numbers.items()}


def latex(tables: Sequence[Table]) -> str:
    """Return a table environment for each table; the document needs the package booktabs and nothing else."""
    return "\n".join(["% \\usepackage{booktabs}", *map(_environment, tables)]) + "\n"


def _environment(table: Table) -> str:
    lines = []
    for number, line in enumerate(table.lines()):
        if number and (line.kind == "ours" or line.name == "paper"):
            lines.append(r"\addlinespace")
        name = ("" if line.kind == "ours" or line.name == "paper" else r"\quad ") + escape(line.short_name)
        # Percents on a line of their own, since a page is narrow.
        texts = zip(*(text.partition(" ")[::2] for text in line.texts), strict=True)
        pairs = texts if line.kind == "difference" else [line.texts]
        lines += [" & ".join([name * (i == 0), *map(escape, part)]) + r" \\" for i, part in enumerate(pairs)]
    caption = ". ".join(filter(None, (table.heading, table.title(), table.note)))
    facts = "; ".join(f"{name}: {text}" for name, text in table.facts(full=False))
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{escape(caption)}.}}\par\smallskip",
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            rf"$S$ & {' & '.join(map(str, table.columns))} \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\scriptsize\raggedright {escape(facts)}.\end{{minipage}}",
            r"\end{table}",
        ]
    )


SPECIAL = {
    "σ̂": r"$\hat\sigma$",
    "x̂0": r"$\hat{x}_0$",
    "η": r"$\eta$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
    "±": r"$\pm$",
    "…": r"\ldots{}",
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
# Longest first; then signs, and what is not ASCII.
_PIECES = [*map(re.escape, sorted(SPECIAL, key=len, reverse=True)), r"(?<![\w.])[+-](?=\d)", r"[^ -~]"]
_PATTERN = re.compile("|".join(_PIECES))


def escape(text: str) -> str:
    """Return a text as LaTeX that prints it; a character that plain LaTeX has not is shown by its code point."""

    def print_as(found: re.Match[str]) -> str:
        piece = found[0]
        if piece in "+-":  # a sign
            return f"${piece}$"
        return SPECIAL.get(piece) or f"[U+{ord(piece):04X}]"

    return _PATTERN.sub(print_as, text)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{rounded(value):.{DIGITS}g}"


def _lines(lines: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()
