"""A table: values of one metric under one protocol, next to the paper's where both can be compared."""

import math
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from ddim.results import protocol
from ddim.results.escape import escape_markdown
from ddim.results.interval import Interval, mean_interval
from ddim.results.paper import SIGMA_HAT, PaperTable, comparison
from ddim.results.records import Record
from ddim.results.schema import IMAGES

DIGITS = 6  # significant digits of numbers in files: the last bits of a float64 are not reproducible everywhere
KINDS = {"ours": "", "paper": "paper", "difference": "difference", "paired": "to the best"}  # names of lines
INTERVALS = "of 95 %, over sets of n images"
OF_SAMPLES = " with this reference set; to the best: paired, from the same x_T"  # where images are measured
Verdict = Literal["", "better", "worse", "same", "best"]


class Line(NamedTuple):
    """A printed line of a table.

    Attributes:
        kind: our numbers, the paper's, the difference, ours minus the paper's, or "paired": ours minus the best of its
            column, from the same x_T.
        row: label of the row that the line belongs to, "" if it belongs to all rows.
        texts: one for each column, "" where there is no number.
        verdicts: for each column of a difference, whether ours is better than the paper's, worse, or the same to the
            paper's last digit; for ours, which is the best of its column; "" elsewhere.
    """

    kind: Literal["ours", "paper", "difference", "paired"]
    row: str
    texts: list[str]
    verdicts: list[Verdict]

    @property
    def name(self) -> str:
        """Return the name of the line, complete without the lines around it."""
        return ", ".join(filter(None, (self.row, KINDS[self.kind])))

    @property
    def short_name(self) -> str:
        """Return the name of the line in the group of its row (`Table.groups`)."""
        return KINDS[self.kind] or self.row


@dataclass(frozen=True)
class TableSpec:
    """What the tables of a report show besides the numbers.

    Attributes:
        interval: the 95 % interval of each number, and of its difference to the best of its column.
    """

    interval: bool = False


@dataclass
class Table:
    """Values of one metric under one protocol.

    Attributes:
        metric: name of the metric, for example fd_digits_classifier_5k.
        protocol: everything that the entries share.
        entries: (row label, NFE) -> one record for each range of images, in rising order.
        heading: what the table shows, if the title is not enough.
        with_intervals: show the 95 % interval of each number.
        differences: to the best of the column, from the same x_T, with intervals; {} if they are not shown.
        paper: the paper's table to compare with, None if there is none.
        note: what the table is compared with, or why it is not; "" if no comparison was asked for.
    """

    metric: str
    protocol: dict[str, Any]
    entries: Mapping[tuple[str, int], tuple[Record, ...]]
    heading: str = ""
    with_intervals: bool = False
    differences: Mapping[tuple[str, int], tuple[float, Interval]] = field(default_factory=dict)
    paper: PaperTable | None = field(init=False)
    note: str = field(init=False)

    def __post_init__(self) -> None:
        p = self.protocol
        names = p["paper"], self.metric, p["n"], p["reference"]["name"]
        self.paper, self.note = comparison(*names, p["last_time"])
        if self.paper is not None and self._labelled:
            self.note += "; samples with labels are not compared"
        if self.paper is not None and (p["model"] or {}).get("weights") == "raw":
            self.note += "; the paper's weights are an average (EMA), these are not"

    @cached_property
    def _labelled(self) -> set[str]:
        """Rows of samples that were made with labels, which the paper's were not."""
        return self._rows_of(lambda record: record.get("condition", {}).get("label") is not None)

    @cached_property
    def _inverted(self) -> set[str]:
        """Rows of inversions that are not the paper's, whose records do not state theirs."""
        return self._rows_of(lambda record: "inversion" in record)

    def _rows_of(self, holds: Callable[[Record], bool]) -> set[str]:
        return {row for (row, _), members in self.entries.items() if any(map(holds, members))}

    @cached_property
    def rows(self) -> list[str]:
        """Row labels, see `row_order`."""
        return sorted({row for row, _ in self.entries}, key=row_order)

    @cached_property
    def columns(self) -> list[int]:
        """Network evaluations of an image (NFE), rising."""
        return sorted({nfe for _, nfe in self.entries})

    @cached_property
    def by_nfe(self) -> bool:
        """Whether an entry has another number of evaluations than steps; then texts mark the best of each column."""
        return any(nfe != record["S"] for (_, nfe), records in self.entries.items() for record in records)

    @property
    def column(self) -> str:
        """What the columns are: NFE, or S where both are the same; the number of images where none was sampled."""
        return "images" if self.protocol["kind"] == IMAGES else "NFE" if self.by_nfe else "S"

    def records(self) -> dict[str, list[Record]]:
        """Return the records of each row, by rising NFE."""
        return {row: [r for nfe in self.columns for r in self.entries.get((row, nfe), ())] for row in self.rows}

    @property
    def ranges(self) -> int:
        """The largest number of ranges of images behind one entry."""
        return max(map(len, self.entries.values()))

    def values(self, row: str, nfe: int) -> list[float]:
        """Return the values behind an entry, one for each range of images; [] where there is no record."""
        return [record["metrics"][self.metric] for record in self.entries.get((row, nfe), ())]

    def value(self, row: str, nfe: int) -> float | None:
        """Return an entry: the mean over its ranges of images, None where there is no record."""
        return statistics.fmean(values) if (values := self.values(row, nfe)) else None

    def spread(self, row: str, nfe: int) -> float | None:
        """Return the sample standard deviation over the ranges of an entry, None for fewer than two."""
        # Without the last bits, so that the spread of equal values is 0.
        values = [rounded(value, 2 * DIGITS) for value in self.values(row, nfe)]
        return statistics.stdev(values) if len(values) > 1 else None

    def interval(self, row: str, nfe: int) -> Interval | None:
        """Return the 95 % interval of an entry, None where a record has none."""
        value = self.value(row, nfe)
        return None if value is None else mean_interval(value, self.entries[row, nfe], self.metric)

    def paper_value(self, row: str, nfe: int) -> float | None:
        """Return the paper's value for an entry, None where there is none to compare with."""
        other = row in self._labelled or row in self._inverted
        return None if self.paper is None or other else self.paper.number(row, nfe)

    def difference(self, row: str, nfe: int) -> float | None:
        """Return our value minus the paper's, None where one of them is missing."""
        ours, paper = self.value(row, nfe), self.paper_value(row, nfe)
        return None if ours is None or paper is None else rounded(rounded(ours) - paper)

    def percent(self, row: str, nfe: int) -> float | None:
        """Return the difference in percent of the paper's value."""
        difference, paper = self.difference(row, nfe), self.paper_value(row, nfe)
        return None if difference is None or not paper else rounded(100 * difference / paper)

    def verdict(self, row: str, nfe: int) -> Verdict:
        """Return how our value compares with the paper's, if less is better."""
        difference = self.difference(row, nfe)
        if self.paper is None or difference is None:
            return ""
        if abs(difference) <= 0.5 * 10**-self.paper.decimals:
            return "same"
        return "better" if difference < 0 else "worse"

    def is_best(self, row: str, nfe: int) -> bool:
        """Return whether an entry is the best of its column; never in a table of one row, unless it is by NFE."""
        column = [value for other in self.rows if (value := self.value(other, nfe)) is not None]
        if (len(self.rows) == 1 and not self.by_nfe) or (value := self.value(row, nfe)) is None:
            return False
        return value == (min if protocol.is_distance(self.metric) else max)(column)

    def title(self) -> str:
        """Return one line that states what was measured."""
        return protocol.title(self.metric, self.protocol, {len(records) for records in self.entries.values()})

    def describe_protocol(self, *, full: bool) -> list[tuple[str, str]]:
        """Return the complete protocol as (name, text), hashes and lists shortened unless `full`."""
        items = protocol.describe(self.metric, self.protocol, self.records(), full=full)
        intervals = INTERVALS + OF_SAMPLES * (self.protocol["kind"] in ("fidelity", IMAGES))
        return [*items, ("intervals", intervals)] if self.with_intervals else items

    def groups(self) -> list[list[Line]]:
        """Return the lines of each row: ours, and where the paper has such a row also the paper's and the difference.

        Where all rows are compared with the same row of the paper, that row is shown once, in a last group of its own.
        """
        shared = len(self.rows) > 1 and all(row.startswith(SIGMA_HAT) for row in self.rows)
        papers = {row: self._paper_line(row) for row in self.rows}
        groups = []
        for row, paper in papers.items():
            best: list[Verdict] = ["best" if self.is_best(row, nfe) else "" for nfe in self.columns]
            group = [Line("ours", row, [self._text(row, nfe) for nfe in self.columns], best)]
            if any((row, nfe) in self.differences for nfe in self.columns):
                texts = [self._paired_text(row, nfe) for nfe in self.columns]
                group.append(Line("paired", row, texts, [""] * len(texts)))
            if paper is not None:
                group += [self._difference_line(row)] if shared else [paper, self._difference_line(row)]
            groups.append(group)
        paper = next((line for line in papers.values() if line is not None), None)
        return [*groups, [paper._replace(row="")]] if shared and paper is not None else groups

    def lines(self) -> list[Line]:
        """Return the lines below the header."""
        return [line for group in self.groups() for line in group]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"| {self.column} | {' | '.join(map(str, self.columns))} |", f"|---|{'---|' * len(self.columns)}"]
        for line in self.lines():
            texts = [
                f"**{text}**" if verdict == "best" and self.by_nfe else text
                for text, verdict in zip(map(escape_markdown, line.texts), line.verdicts, strict=True)
            ]
            lines.append(f"| {' | '.join([escape_markdown(line.name), *texts])} |")
        return "\n".join(lines)

    def _paper_line(self, row: str) -> Line | None:
        numbers = [self.paper_value(row, nfe) for nfe in self.columns]
        if self.paper is None or all(number is None for number in numbers):
            return None
        texts = ["" if number is None else f"{number:.{self.paper.decimals}f}" for number in numbers]
        return Line("paper", row, texts, [""] * len(texts))

    def _difference_line(self, row: str) -> Line:
        texts = [self._difference_text(row, nfe) for nfe in self.columns]
        return Line("difference", row, texts, [self.verdict(row, nfe) for nfe in self.columns])

    def _text(self, row: str, nfe: int) -> str:
        value, spread, count = self.value(row, nfe), self.spread(row, nfe), len(self.values(row, nfe))
        if value is None:
            return ""
        of = f" (of {count})" if count != self.ranges else ""
        # As many decimals as the mean has; all digits are in the CSV.
        decimals = 3 if self.metric.startswith("accuracy_") else 2  # most accuracies are near 1
        shown = number_text(value, None, decimals)
        shown += "" if spread is None else f" ± {number_text(spread, value, decimals)}"
        if self.with_intervals and (ends := self.interval(row, nfe)) is not None:
            shown += f" {interval_text(ends, value, decimals)}"
        return shown + of

    def _paired_text(self, row: str, nfe: int) -> str:
        if (row, nfe) not in self.differences:
            return ""
        difference, ends = self.differences[row, nfe]
        value = self.value(row, nfe)
        return f"{'+' if difference > 0 else ''}{number_text(difference, value)} {interval_text(ends, value)}"

    def _difference_text(self, row: str, nfe: int) -> str:
        difference, percent = self.difference(row, nfe), self.percent(row, nfe)
        if self.paper is None or difference is None or percent is None:
            return ""
        shown = f"{difference:+.{self.paper.decimals}f}"
        # The paper's number is known to its last digit only, so a percentage of less than that would mislead.
        return f"{shown[1:]} (same)" if self.verdict(row, nfe) == "same" else f"{shown} ({percent:+.1f} %)"


def interval_text(ends: Interval, like: float | None = None, decimals: int = 2) -> str:
    """Return an interval, with as many decimals as the number `like`."""
    low, high = (number_text(end, like, decimals) for end in ends)
    return f"[{low}, {high}]"


def row_order(label: str) -> tuple[int, str, float, str]:
    """Return the key that sorts row labels: DDIM's by rising η, then σ̂, then other rules by name; each by rising w.

    Checkpoints of a training follow each other by their step: 500, then 1,000.
    """
    label = re.sub(r"(?<= step )[\d,]+", lambda step: step[0].replace(",", "").zfill(12), label)
    family = 0 if label.startswith("η") else 1 if label.startswith(SIGMA_HAT) else 2
    w = re.search(r", w=(-?[\d.]+(?:e[+-]\d+)?)", label)
    name = label if w is None else label[: w.start()]
    return family, name.casefold() if family == 2 else name, -math.inf if w is None else float(w[1]), label


def rounded(value: float, digits: int = DIGITS) -> float:
    """Return a number rounded to significant digits, and 0 instead of -0."""
    return float(f"{value:.{digits}g}") + 0.0


def number_text(value: float, like: float | None = None, decimals: int = 2) -> str:
    """Return a human-readable number: `decimals`, or three significant digits if it, or `like`, is below 0.1."""
    return f"{value:.{decimals}f}" if abs(value if like is None else like) >= 0.1 else f"{value:#.3g}"
