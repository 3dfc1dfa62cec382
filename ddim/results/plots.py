"""Plots of tables and records: a metric and the time to sample against S or NFE (the paper's Fig. 4)."""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddim.io import atomic_write
from ddim.results.escape import printable
from ddim.results.plot_spec import PlotSpec
from ddim.results.protocol import is_distance, precision
from ddim.results.records import Record, record_key
from ddim.results.table import Table, row_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER_IMAGES = 50_000  # Fig. 4 shows hours for 50,000 images
DPI = 200
SCREEN = PlotSpec()
LESS, MORE = "less is better", "more is better"
MOST_ROWS = 20  # in a plot, which has room for no more names
PAPER_STYLE: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "markerfacecolor": "none", "markersize": 9}


@dataclass(frozen=True)
class Timing:
    """Sampling times of one model on one kind of device.

    Attributes:
        device: its name, for example NVIDIA H200.
        compute: number of processes and images per batch.
        model: weights, and how the network was run: number format, and settings such as compile.
        images: numbers of images that were timed.
        points: (row label, NFE, hours for 50,000 images on one device).
        column: NFE, or S where both are the same.
    """

    device: str
    compute: str
    model: str
    images: tuple[int, ...]
    points: tuple[tuple[str, int, float], ...]
    column: str = "S"

    @property
    def exponent(self) -> float:
        """Return p of the least-squares fit time = c S^p, both logarithms taken; 1 is linear in S."""
        return self._fit()[0]

    def fitted(self, S: float) -> float:
        """Return the hours of the fit at S."""
        exponent, constant = self._fit()
        return math.exp(constant + exponent * math.log(S))

    def caption(self) -> str:
        """Return what was timed, and how far from linear in S the time is."""
        scaled = "" if self.images == (PAPER_IMAGES,) else f", scaled from {_and(self.images)}"
        return (
            f"Hours to sample {PAPER_IMAGES:,} images on one device{scaled} "
            f"({self.device}; {self.compute}; {self.model}). "
            f"Fit: time ∝ {self.column}^{self.exponent:.3f}, "
            f"{round(100 * (self.exponent - 1), 1) + 0.0:+.1f} % from linear."
        )

    def _fit(self) -> tuple[float, float]:
        return fit_power([(S, hours) for _, S, hours in self.points])


def fit_power(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return p and log c of the least-squares fit y = c x^p, both logarithms taken."""
    logs = np.log(points)
    exponent, constant = np.polyfit(logs[:, 0], logs[:, 1], 1)
    return float(exponent), float(constant)


def timings(records: Sequence[Record]) -> list[Timing]:
    """Return the sampling times of completed records for each device, model and way to run it, with at least two S.

    Records without a device are left out.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "fidelity" and record.get("compute") and (record.get("seconds_sampling") or 0) > 0:
            compute = record["compute"]
            shared = (compute["device"], record["model"]["weights_hash"], precision(record), compute.get("settings"))
            groups.setdefault(json.dumps(shared), []).append(record)
    candidates = (_timing(groups[key]) for key in sorted(groups))
    return [timing for timing in candidates if len({S for _, S, _ in timing.points}) > 1]


def _timing(records: list[Record]) -> Timing:
    model = records[0]["model"]
    processes = sorted({r["compute"].get("processes", 1) for r in records} - {None})
    batches = sorted({r["compute"].get("batch_size") for r in records} - {None})
    return Timing(
        device=records[0]["compute"]["device"],
        compute=f"processes: {_and(processes)}; images per batch: {_and(batches) or 'not known'}",
        # Earlier records do not state how the network was run.
        model=f"weights {model['weights_hash'][:8]}, {records[0]['compute'].get('settings') or precision(records[0])}",
        images=tuple(sorted({r["n"] for r in records})),
        points=tuple(
            sorted((r["label"], r["nfe"], r["seconds_sampling"] / r["n"] * PAPER_IMAGES / 3600) for r in records)
        ),
        column="S" if all(r["nfe"] == r["S"] for r in records) else "NFE",
    )


def plot(table: Table, paper: bool = False) -> "Figure":
    """Plot the metric against S or NFE, a line for each row, with logarithmic axes unless a value is not positive.

    With `paper` there is no title, which states hashes: a document has captions.

    Bars are the spread over ranges of images; hollow markers on dashed lines are the paper's values. Names of errors to
    the exact trajectory state the fitted slope, which is the order of convergence where the steps are small.
    """
    figure, axes = new_figure()
    shown: list[float] = []
    drawn: set[str | None] = set()  # the paper's rows: variants of σ̂ share one
    for number, row in enumerate(table.rows[:MOST_ROWS]):
        points = [(S, v, table.spread(row, S)) for S in table.columns if (v := table.value(row, S)) is not None]
        S, values, spreads = zip(*points, strict=True)
        bars = None if table.ranges == 1 else [spread or 0.0 for spread in spreads]
        style, slope = line_style(number), ""
        if table.protocol["kind"] == "trajectory" and len(S) > 1 and min(values) > 0:
            slope = f" (slope {fit_power([*zip(S, values, strict=True)])[0]:.1f})"
        axes.errorbar(S, values, yerr=bars, capsize=3, label=plain(row) + slope, **style)
        shown += values
        published = [(S, v) for S in table.columns if (v := table.paper_value(row, S)) is not None]
        if published and table.paper and (name := table.paper.row(row)) not in drawn:
            drawn.add(name)
            axes.plot(*zip(*published, strict=True), **PAPER_STYLE, **style)
    mention_more(axes, len(table.rows))
    if table.paper is not None:
        axes.plot([], [], color="gray", marker="o", label="paper", **PAPER_STYLE)
    # An unbiased kernel distance can be negative.
    _scales(axes, table.column, table.columns, "log" if min(shown) > 0 else "linear")
    label_metric(axes, table.metric, paper)
    add_legend(axes)
    set_title(axes, "" if paper else ": ".join(filter(None, (table.heading, table.title()))))
    return figure


def plot_time(timing: Timing, paper: bool = False) -> "Figure":
    """Plot hours for 50,000 images against S with the fit, both axes logarithmic; see `plot`."""
    figure, axes = new_figure()
    rows = sorted({row for row, _, _ in timing.points}, key=row_order)
    for number, row in enumerate(rows[:MOST_ROWS]):
        points = [(S, hours) for label, S, hours in timing.points if label == row]
        # Hollow markers of growing size, since the times of all samplers nearly coincide.
        style: dict[str, Any] = {
            "marker": "osD^v"[number % 5],
            "color": f"C{number % 10}",
            "markersize": 5 + 2 * number,
        }
        axes.plot(*zip(*points, strict=True), linestyle="none", markerfacecolor="none", label=plain(row), **style)
    mention_more(axes, len(rows))
    steps = sorted({S for _, S, _ in timing.points})
    label = f"fit, ${timing.column}^{{{timing.exponent:.3f}}}$"
    axes.plot(steps, [timing.fitted(S) for S in steps], color="gray", linewidth=1, zorder=1, label=label)
    _scales(axes, timing.column, steps, "log")
    scaled = "" if timing.images == (PAPER_IMAGES,) else ", scaled"
    axes.set_ylabel(f"hours for {PAPER_IMAGES:,} images{scaled}")
    add_legend(axes)
    set_title(axes, "" if paper else timing.caption())
    return figure


def plot_terms(records: Sequence[Record], paper: bool = False) -> "Figure":
    """Plot the terms of variational bounds, bits per dimension against t, a line for each record; its name has L_T."""
    figure, axes = new_figure()
    for number, record in enumerate(records[:MOST_ROWS]):
        *terms, last = record["terms"]
        name = f"{plain(record['label'])}: {sum(record['terms']):.3f} bits/dim, $L_T$ {last:.1e}"
        axes.plot(record["sampler"]["tau"], terms, marker="", label=name, color=f"C{number % 10}")
    mention_more(axes, len(records))
    axes.set(xscale="log", yscale="log", xlabel="t", ylabel="bits/dim of the step from t")
    axes.grid(alpha=0.3)
    add_legend(axes)
    set_title(
        axes, "" if paper else "Terms of the variational bound: L_0 at the first time, KL divergences at the others"
    )
    return figure


def save_plot(table: Table, path: Path, spec: PlotSpec = SCREEN, paper: bool = False) -> Path:
    """Write `plot(table)` as PNG to `path`, and as PDF for papers next to it, unless they are there; return `path`."""
    entries = [
        (row, S, table.value(row, S), table.spread(row, S), table.paper_value(row, S))
        for row in table.rows[:MOST_ROWS]
        for S in table.columns
    ]
    content = [table.metric, table.heading, table.title(), len(table.rows), entries, paper]
    return save(lambda: plot(table, paper), content, path, spec)


def save_time_plot(timing: Timing, path: Path, spec: PlotSpec = SCREEN, paper: bool = False) -> Path:
    """Write `plot_time(timing)` as `save_plot` does."""
    return save(lambda: plot_time(timing, paper), [*dataclasses.astuple(timing), paper], path, spec)


def save_terms_plot(records: Sequence[Record], path: Path, spec: PlotSpec = SCREEN, paper: bool = False) -> Path:
    """Write `plot_terms(records)` as `save_plot` does."""
    content = [[(r["label"], r["sampler"]["tau"], r["terms"]) for r in records], paper]
    return save(lambda: plot_terms(records, paper), content, path, spec)


def save(draw: Callable[[], "Figure"], content: Any, path: Path, spec: PlotSpec) -> Path:
    """Write the figure that `draw` returns as `save_plot` does; `content` is all that it shows, in plain values."""
    import matplotlib

    # Drawing is most of the work of a report, so a plot states what it was drawn from, and by which code.
    key = record_key(
        {
            "content": [content, spec.width],
            "code": [Path(file).read_text(encoding="utf-8") for file in (__file__, inspect.getfile(draw))],
            "by": matplotlib.__version__,
        }
    )
    pdf = path.with_suffix(".pdf")
    if pdf.is_file() and _comment(path) == key:
        return path
    metadata: tuple[dict[str, str | None], ...] = {"CreationDate": None}, {"Comment": key}
    with matplotlib.rc_context(spec.parameters()):
        figure = draw()
        for target, entries in zip(
            (pdf, path), metadata, strict=True
        ):  # the PNG last: it states that both are complete
            with atomic_write(target) as partial:
                figure.savefig(partial, dpi=DPI, metadata=entries)
            figure.set_layout_engine("none")  # the second picture has the layout of the first
    return path


def _comment(path: Path) -> str | None:
    """Return the comment in a PNG file, None if there is none."""
    from PIL import Image

    if not path.is_file():
        return None
    try:
        with Image.open(path) as picture:
            return picture.info.get("Comment")
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a damaged file
        return None


def mention_more(axes: "Axes", rows: int) -> None:
    """Say in the legend how many of `rows` lines are not shown."""
    if rows > MOST_ROWS:
        axes.errorbar([], [], linestyle="none", label=f"and {rows - MOST_ROWS} more")


def line_style(number: int) -> dict[str, Any]:
    """Return colour and marker of a line: no two of MOST_ROWS have both in common."""
    return {"color": f"C{number % 10}", "marker": "osD^v"[(number + number // 10) % 5]}


def label_metric(axes: "Axes", metric: str, paper: bool) -> None:
    """Name the metric at its axis, and which values are better."""
    less = is_distance(metric)
    axes.set_ylabel(f"{plain(metric)} {('↓' if less else '↑') if paper else f'({LESS if less else MORE})'}")


def add_legend(axes: "Axes") -> None:
    """Name the lines; many names stand beside the plot, where they hide none."""
    many: dict[str, Any] = {"fontsize": 6, "loc": "upper left", "bbox_to_anchor": (1, 1)}
    axes.legend(**(many if len(axes.get_legend_handles_labels()[1]) > 10 else {}))


def set_title(axes: "Axes", text: str) -> None:
    """Write a title of several lines, none if `text` is empty."""
    if text:
        axes.set_title(plain(text), fontsize=6, wrap=True)


def new_figure() -> tuple["Figure", "Axes"]:
    """Return a figure of one plot, and that plot."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    return figure, figure.add_subplot()


def _scales(axes: "Axes", column: str, steps: Sequence[int], y: str) -> None:
    axes.set(xscale="log", yscale=y, xlabel="S, steps" if column == "S" else "NFE, network evaluations of an image")
    steps = steps[:: math.ceil(len(steps) / MOST_ROWS)]
    axes.set_xticks(steps, [str(S) for S in steps])
    axes.xaxis.minorticks_off()  # only the values of S have ticks; on y, minor ticks label a narrow range
    axes.grid(alpha=0.3)


def plain(text: str) -> str:
    """Escape formulas, and make one of σ̂: matplotlib's fonts put the hat next to the letter."""
    return printable(text).replace("$", r"\$").replace("σ̂", r"$\hat{\sigma}$")


def _and(numbers: Sequence[int]) -> str:
    return " and ".join(f"{number:,}" for number in numbers)
