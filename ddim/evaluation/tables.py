"""Tables and plots, made from records and from nothing else.

A table holds cells of one protocol: same model, weights, number of images, seed, reference, extractor and spacing. Rows
are samplers, columns are numbers of steps. The full chain (S = T) belongs to every spacing.
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim.evaluation.records import Record, record_key
from ddim.files import whole


@dataclass
class Table:
    """Numbers of one metric under one protocol.

    Attributes:
        metric: what the numbers are, for example fd_digits_classifier_5k.
        protocol: everything that its cells share.
        cells: (row label, S) -> record.
    """

    metric: str
    protocol: dict[str, Any]
    cells: dict[tuple[str, int], Record]

    @property
    def rows(self) -> list[str]:
        """Row labels: η rising, then σ̂."""
        return sorted({row for row, _ in self.cells}, key=lambda row: (row.startswith("σ"), row))

    @property
    def columns(self) -> list[int]:
        """Numbers of steps, rising."""
        return sorted({S for _, S in self.cells})

    def value(self, row: str, S: int) -> float | None:
        """Return the number of a cell, None where there is no record."""
        record = self.cells.get((row, S))
        return None if record is None else record["metrics"][self.metric]

    def title(self) -> str:
        """Return one line that says what was measured."""
        p = self.protocol
        unusual = (", bfloat16" if p["bf16"] else "") + (", ends at alpha_bar[1]" if p["last_time"] else "")
        step = "" if p["model"]["step"] is None else f" at step {p['model']['step']:,}"
        return (
            f"{self.metric}: {p['n']:,} images against {p['reference']['images']:,} of {p['reference']['name']}, "
            f"{p['model']['weights']} weights {p['model']['weights_hash'][:8]}{step}, "
            f"tau {p['spacing']}, seed {p['seed']}{unusual}"
        )

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"| S | {' | '.join(map(str, self.columns))} |", f"|---|{'---|' * len(self.columns)}"]
        lines += [f"| {row} | {' | '.join(_text(self.value(row, S)) for S in self.columns)} |" for row in self.rows]
        return "\n".join(lines)


def build_tables(records: list[Record]) -> list[Table]:
    """Sort records into tables, one for each metric and protocol; of records that share a cell the last one stays."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record_key(_protocol(record)), []).append(record)
    tables = []
    for group in groups.values():
        for spacing in sorted({r["spacing"] for r in group} - {"full"}) or ["full"]:
            members = [r for r in group if r["spacing"] in (spacing, "full")]
            for metric in group[0]["metrics"]:
                cells = {(r["label"], r["S"]): r for r in members}
                tables.append(Table(metric, _protocol(group[0]) | {"spacing": spacing}, cells))
    return tables


def _protocol(record: Record) -> dict[str, Any]:
    shared = ("model", "n", "seed", "bf16", "pixels", "reference", "metric")
    return {key: record[key] for key in shared} | {"last_time": record["sampler"]["last_time"]}


def write_report(records: list[Record], folder: Path) -> list[Path]:
    """Write table.md, table.csv, table.json and a plot for each table into `folder`; return their paths."""
    tables = build_tables(records)
    paths = [folder / name for name in ("table.md", "table.csv", "table.json")]
    sections = [f"**{table.title()}**\n\n{table.markdown()}\n" for table in tables]
    for path, text in zip(paths, ("\n".join(sections), _csv(tables), _json(tables)), strict=True):
        with whole(path) as partial:
            partial.write_text(text)
    for number, table in enumerate(tables):
        path = folder / (f"plot_{table.metric}.png" if number == 0 else f"plot_{table.metric}_{number}.png")
        plot(table, path)
        paths.append(path)
    return paths


def plot(table: Table, path: Path) -> None:
    """Plot the metric against S, a line for each row, both axes logarithmic unless a value is not positive."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    lines = {row: [(S, v) for S in table.columns if (v := table.value(row, S)) is not None] for row in table.rows}
    for row, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=row)
    # An unbiased kernel distance can be negative.
    positive = all(value > 0 for points in lines.values() for _, value in points)
    axes.set(xscale="log", yscale="log" if positive else "linear", xlabel="S, steps", ylabel=table.metric)
    axes.set_xticks(table.columns, [str(S) for S in table.columns])
    axes.xaxis.minorticks_off()  # the values of S stand there; on y, minor ticks carry the labels of a narrow range
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(table.title(), fontsize=6, wrap=True)
    with whole(path) as partial:
        figure.savefig(partial)


def _csv(tables: list[Table]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    facts = ["n", "spacing", "distinct_evaluations", "seconds_sampling", "key"]
    writer.writerow(["table", "metric", "sampler", "S", "value", *facts])
    for number, table in enumerate(tables):
        for row, S in ((row, S) for row in table.rows for S in table.columns if (row, S) in table.cells):
            record = table.cells[row, S]
            writer.writerow([number, table.metric, row, S, table.value(row, S), *(record[fact] for fact in facts)])
    return out.getvalue()


def _json(tables: list[Table]) -> str:
    content = [
        {
            "metric": table.metric,
            "protocol": table.protocol,
            "columns": table.columns,
            "rows": {row: [table.value(row, S) for S in table.columns] for row in table.rows},
        }
        for table in tables
    ]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"
