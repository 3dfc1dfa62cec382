"""One table: numbers of one metric under one protocol, beside the paper's where they may be compared."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ddim.results import protocol
from ddim.results.paper import SIGMA_HAT, PaperTable, comparison
from ddim.results.records import Record

DIGITS = 6  # significant, of numbers in files: the last bits of a float64 are not reproducible everywhere
Verdict = Literal["", "better", "worse", "same"]


class Line(NamedTuple):
    """A printed line of a table.

    Attributes:
        kind: whose numbers: ours, paper, or the difference, ours minus the paper's.
        name: of the line.
        texts: one for each column, "" where there is nothing.
        verdicts: for each column of a difference how ours is against the paper's; "same" to the paper's last digit.
    """

    kind: Literal["ours", "paper", "difference"]
    name: str
    texts: list[str]
    verdicts: list[Verdict]

    @property
    def short_name(self) -> str:
        """Return the name without the sampler's, where it stands under the sampler's own line."""
        return self.name if self.kind == "ours" else self.name.rpartition(", ")[2]


@dataclass
class Table:
    """Numbers of one metric under one protocol.

    Attributes:
        metric: what the numbers are, for example fd_digits_classifier_5k.
        protocol: everything that its cells share.
        cells: (row label, S) -> a record for each range of images, rising.
        heading: what the table shows, if more has to be said than the title does.
    """

    metric: str
    protocol: dict[str, Any]
    cells: Mapping[tuple[str, int], tuple[Record, ...]]
    heading: str = ""
    paper: PaperTable | None = field(init=False)
    note: str = field(init=False)

    def __post_init__(self) -> None:
        p = self.protocol
        self.paper, self.note = comparison(p["paper"], self.metric, p["n"], p["reference"]["name"])

    @property
    def rows(self) -> list[str]:
        """Row labels: η rising, then σ̂."""
        return sorted({row for row, _ in self.cells}, key=row_order)

    @property
    def columns(self) -> list[int]:
        """Numbers of steps, rising."""
        return sorted({S for _, S in self.cells})

    @property
    def ranges(self) -> int:
        """The number of ranges of images behind the cells that have most."""
        return max(len(records) for records in self.cells.values())

    def values(self, row: str, S: int) -> list[float]:
        """Return the numbers of a cell, one for each range of images; [] where there is no record."""
        return [record["metrics"][self.metric] for record in self.cells.get((row, S), ())]

    def value(self, row: str, S: int) -> float | None:
        """Return the number of a cell, the mean over its ranges; None where there is no record."""
        return statistics.fmean(values) if (values := self.values(row, S)) else None

    def spread(self, row: str, S: int) -> float | None:
        """Return the sample standard deviation over the ranges of a cell, None for fewer than two."""
        # Without the last bits, so that the spread of equal numbers is 0.
        values = [rounded(value, 2 * DIGITS) for value in self.values(row, S)]
        return statistics.stdev(values) if len(values) > 1 else None

    def paper_value(self, row: str, S: int) -> float | None:
        """Return the paper's number for a cell, None where none may stand beside it."""
        return None if self.paper is None else self.paper.number(row, S)

    def difference(self, row: str, S: int) -> float | None:
        """Return ours minus the paper's, None where one of them is missing."""
        ours, paper = self.value(row, S), self.paper_value(row, S)
        return None if ours is None or paper is None else rounded(rounded(ours) - paper)

    def percent(self, row: str, S: int) -> float | None:
        """Return the difference in percent of the paper's number."""
        difference, paper = self.difference(row, S), self.paper_value(row, S)
        return None if difference is None or not paper else rounded(100 * difference / paper)

    def verdict(self, row: str, S: int) -> Verdict:
        """Return how ours is against the paper's, where less is better."""
        difference = self.difference(row, S)
        if self.paper is None or difference is None:
            return ""
        if abs(difference) <= 0.5 * 10**-self.paper.decimals:
            return "same"
        return "better" if difference < 0 else "worse"

    def title(self) -> str:
        """Return one line that says what was measured."""
        return protocol.title(self.metric, self.protocol, {len(records) for records in self.cells.values()})

    def facts(self, *, full: bool) -> list[tuple[str, str]]:
        """Return the whole protocol as (name, text), hashes and lists shortened unless `full`."""
        rows = {
            row: [r for S in self.columns for r in self.cells.get((row, S), ()) if self.metric in r["metrics"]]
            for row in self.rows
        }
        return protocol.facts(self.metric, self.protocol, rows, full=full)

    def lines(self) -> list[Line]:
        """Return the lines under the header: ours, and where there is one the paper's and the difference.

        The paper's row stands once, last, where all rows belong to it.
        """
        lines = []
        papers = {row: self._paper_line(row) for row in self.rows}
        shared = len(self.rows) > 1 and all(row.startswith(SIGMA_HAT) for row in self.rows)
        for row in self.rows:
            lines.append(Line("ours", row, [self._text(row, S) for S in self.columns], []))
            if (paper := papers[row]) is not None:
                difference = [self._difference_text(row, S) for S in self.columns]
                verdicts = [self.verdict(row, S) for S in self.columns]
                lines += [] if shared else [paper]
                lines.append(Line("difference", f"{row}, difference", difference, verdicts))
        last = papers[self.rows[-1]]
        return [*lines, last._replace(name="paper")] if shared and last is not None else lines

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"| S | {' | '.join(map(str, self.columns))} |", f"|---|{'---|' * len(self.columns)}"]
        for line in self.lines():
            cells = [cell.replace("|", r"\|") for cell in (line.name, *line.texts)]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _paper_line(self, row: str) -> Line | None:
        numbers = [self.paper_value(row, S) for S in self.columns]
        if self.paper is None or all(number is None for number in numbers):
            return None
        texts = ["" if number is None else f"{number:.{self.paper.decimals}f}" for number in numbers]
        return Line("paper", f"{row}, paper", texts, [])

    def _text(self, row: str, S: int) -> str:
        value, spread, count = self.value(row, S), self.spread(row, S), len(self.values(row, S))
        if value is None:
            return ""
        of = f" (of {count})" if count != self.ranges else ""
        # As many decimals as the mean has; all digits are in the CSV.
        return text(value) + ("" if spread is None else f" ± {text(spread, value)}") + of

    def _difference_text(self, row: str, S: int) -> str:
        difference, percent = self.difference(row, S), self.percent(row, S)
        if self.paper is None or difference is None or percent is None:
            return ""
        shown = f"{difference:+.{self.paper.decimals}f}"
        # The paper's number is itself known to its last digit only, so percents of less would mislead.
        return f"{shown[1:]} (same)" if self.verdict(row, S) == "same" else f"{shown} ({percent:+.1f} %)"


def row_order(label: str) -> tuple[bool, str]:
    """Return the key that sorts row labels: η rising, then σ̂."""
    return label.startswith("σ"), label


def rounded(value: float, digits: int = DIGITS) -> float:
    """Return a number to so many significant digits, and 0 rather than -0."""
    return float(f"{value:.{digits}g}") + 0.0


def text(value: float, like: float | None = None) -> str:
    """Return a number as people read it: two decimals, or three significant digits if it, or `like`, is below 0.1."""
    return f"{value:.2f}" if abs(value if like is None else like) >= 0.1 else f"{value:#.3g}"
