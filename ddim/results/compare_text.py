"""A comparison of trainings as Markdown, CSV and LaTeX."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from ddim.results.compare import LOSS, Comparison, Row
from ddim.results.escape import escape_latex, escape_markdown
from ddim.results.protocol import setting_text
from ddim.results.table import number_text, rounded
from ddim.results.templates import load_template
from ddim.results.text import LATEX_DELIMITERS, csv_text

MOST_STEPS = 4  # columns of steps in a table for people; the CSV file has all
Column = tuple[str, Callable[[Row], Any]]


def markdown(comparison: Comparison) -> str:
    """Return the table under its title, its columns aligned for terminals."""
    lines = [[escape_markdown(text) for text in line] for line in _lines(comparison, _columns(comparison))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    rows = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return f"**{escape_markdown(comparison.title())}, the best first**\n\n" + "\n".join(rows) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Return the table with six significant digits, and the value of each step."""
    columns = _columns(comparison, comparison.steps)
    return csv_text(
        [[name for name, _ in columns], *([_plain(of(row)) for _, of in columns] for row in comparison.rows)]
    )


def latex(comparison: Comparison) -> str:
    """Return the table without paths; the document needs the package booktabs and no other."""
    header, *lines = _lines(comparison, _columns(comparison)[:-1])
    template = load_template("compare.tex.j2", finalize=escape_latex, **LATEX_DELIMITERS)
    return template.render(
        title=f"{comparison.title()}, the best first", header=header, lines=lines, keys=len(comparison.keys)
    )


def _columns(comparison: Comparison, steps: Sequence[int] | None = None) -> list[Column]:
    """Return the name of each column and what it holds; the checkpoint, a path, is the last."""
    columns: list[Column] = [("run", lambda row: row.name)]
    columns += [(key, lambda row, key=key: row.settings[key]) for key in comparison.keys]  # type: ignore[misc]
    if comparison.metric != LOSS:
        shown = _spread(comparison.steps) if steps is None else steps
        columns += [(f"step {step}", lambda row, step=step: row.points.get(step)) for step in shown]  # type: ignore[misc]
        columns += [
            ("best", lambda row: row.best and row.best[1]),
            ("at step", lambda row: row.best and row.best[0]),
        ]
    return [
        *columns,
        ("loss", lambda row: row.loss),
        ("hours", lambda row: row.run.hours or None),
        ("steps", lambda row: row.run.step),
        ("checkpoint", lambda row: row.run.checkpoint and str(row.run.checkpoint)),
    ]


def _lines(comparison: Comparison, columns: Sequence[Column]) -> list[list[str]]:
    """Return the header and each row as texts."""
    lines = [[name for name, _ in columns]]
    for row in comparison.rows:
        lines.append([_text(name, of(row), comparison) for name, of in columns])
    return lines


def _text(column: str, value: Any, comparison: Comparison) -> str:
    if value is None or column in comparison.keys:
        return setting_text(value)
    if column in ("loss", "hours"):
        return f"{value:.{4 if column == 'loss' else 3}g}"
    return number_text(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value or ""
    return rounded(value) if isinstance(value, float) else json.dumps(value)


def _spread(steps: Sequence[int]) -> list[int]:
    """Return at most MOST_STEPS of the steps, evenly apart, the last among them."""
    every = -(-len(steps) // MOST_STEPS)
    return list(steps[::-1][:: every or 1][::-1])
