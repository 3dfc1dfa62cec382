"""The files of a comparison: its table, and plots of the metric against the step and against two settings."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddim.io import atomic_write
from ddim.results.compare import Comparison
from ddim.results.compare_text import as_csv, latex, markdown
from ddim.results.escape import printable
from ddim.results.plots import DPI, MOST_ROWS
from ddim.results.protocol import is_distance, setting_text
from ddim.results.table import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "comparison of scripts/compare.py"  # of its plots, by which it knows them again
WIDE = 10  # a range of values with a larger ratio is logarithmic
GRID = 0.5  # of the pairs of values must have been trained for a heat map; else the pairs are points


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the table and the plots that there are values for into `folder`, created if needed; return the paths.

    They are table.md, table.csv, table.tex, and each plot as PNG and PDF.
    """
    texts = {"table.md": markdown(comparison), "table.csv": as_csv(comparison), "table.tex": latex(comparison)}
    for name, content in texts.items():
        with atomic_write(folder / name) as partial:
            partial.write_text(content, encoding="utf-8", errors="backslashreplace")
    plots = _save_plots(comparison, folder)
    for path in folder.iterdir():  # of an earlier comparison, which would pass for this one's
        is_plot = re.fullmatch(r"(plot_\w+|heat_map)\.(png|pdf)", path.name) and path.is_file()
        if is_plot and path not in plots and TITLE.encode() in path.read_bytes():
            path.unlink()
    return [*(folder / name for name in texts), *plots]


def _save_plots(comparison: Comparison, folder: Path) -> list[Path]:
    figures = {}
    if comparison.steps:
        figures[f"plot_{comparison.metric}"] = plot_steps(comparison)
    if len(comparison.numeric_keys) == 2 and any(row.best for row in comparison.rows):
        figures["heat_map"] = plot_settings(comparison)
    paths = []
    for name, figure in figures.items():
        for suffix, metadata in (("png", {"Title": TITLE}), ("pdf", {"Title": TITLE, "CreationDate": None})):
            paths.append(folder / f"{name}.{suffix}")
            with atomic_write(paths[-1]) as partial:
                figure.savefig(partial, format=suffix, dpi=DPI, metadata=metadata)
            figure.set_layout_engine("none")  # the second picture has the layout of the first
    return paths


def plot_steps(comparison: Comparison) -> "Figure":
    """Plot the metric against the step, a line for each training, with a logarithmic axis if all are positive."""
    figure, axes = _figure(comparison)
    rows = [row for row in comparison.rows if row.points]
    for number, row in enumerate(rows[:MOST_ROWS]):
        steps = sorted(row.points)
        style: dict[str, Any] = {"color": f"C{number % 10}", "label": _plain(row.label)}
        if len(steps) <= MOST_ROWS:
            style["marker"] = "osD^v"[(number + number // 10) % 5]
        axes.plot(steps, [row.points[step] for step in steps], **style)
    if len(rows) > MOST_ROWS:
        axes.plot([], [], linestyle="none", label=f"and {len(rows) - MOST_ROWS} more")
    positive = all(value > 0 for row in rows for value in row.points.values())
    axes.set(xlabel="step", ylabel=_measure(comparison), yscale="log" if positive else "linear")
    axes.grid(alpha=0.3)
    axes.legend(**({"fontsize": 6, "loc": "upper left", "bbox_to_anchor": (1, 1)} if len(rows) > 10 else {}))
    return figure


def plot_settings(comparison: Comparison) -> "Figure":
    """Plot the best value of the metric against the two numeric settings in which the trainings differ.

    A grid of trainings becomes a heat map, and other pairs of values, as those of a random search, coloured points.
    Where several trainings have the same pair, the best of them is shown.
    """
    from matplotlib.colors import LogNorm, Normalize

    key_x, key_y = comparison.numeric_keys
    best = {(row.settings[key_x], row.settings[key_y]): row.best[1] for row in comparison.rows[::-1] if row.best}
    xs, ys = (sorted({pair[axis] for pair in best}) for axis in (0, 1))
    values = [*best.values()]
    norm = (LogNorm if 0 < WIDE * min(values) < max(values) else Normalize)(min(values), max(values))
    figure, axes = _figure(comparison)
    axes.set(xlabel=_plain(key_x), ylabel=_plain(key_y))
    colours: dict[str, Any] = {"cmap": "viridis_r" if is_distance(comparison.metric) else "viridis", "norm": norm}
    if len(best) >= GRID * len(xs) * len(ys):
        drawn: Any = axes.imshow(
            [[best.get((x, y), np.nan) for x in xs] for y in ys], origin="lower", aspect="auto", **colours
        )
        axes.set_xticks(range(len(xs)), map(setting_text, xs))
        axes.set_yticks(range(len(ys)), map(setting_text, ys))
        for (x, y), value in best.items():
            red, green, blue, _ = drawn.cmap(norm(value))
            black = 0.3 * red + 0.6 * green + 0.1 * blue > 0.5
            colour = "black" if black else "white"
            axes.text(xs.index(x), ys.index(y), number_text(value), ha="center", va="center", color=colour)
    else:
        drawn = axes.scatter([x for x, _ in best], [y for _, y in best], c=values, s=60, **colours)
        for values_of, scale in ((xs, axes.set_xscale), (ys, axes.set_yscale)):
            if 0 < WIDE * values_of[0] < values_of[-1]:
                scale("log")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.colorbar(drawn, label=f"best {_measure(comparison)}")
    return figure


def _figure(comparison: Comparison) -> tuple["Figure", "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(_plain(comparison.title()), fontsize=6, wrap=True)
    return figure, axes


def _measure(comparison: Comparison) -> str:
    return f"{_plain(comparison.metric)} ({'less' if is_distance(comparison.metric) else 'more'} is better)"


def _plain(text: str) -> str:
    return printable(text).replace("$", r"\$")  # formulas
