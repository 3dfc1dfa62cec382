"""Plots of trainings: the loss against the step, and a metric of several checkpoints against step or EMA length."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddim.results.plot_spec import PlotSpec
from ddim.results.plots import (
    MOST_ROWS,
    SCREEN,
    add_legend,
    label_metric,
    line_style,
    mention_more,
    new_figure,
    plain,
    save,
    set_title,
)
from ddim.results.protocol import weights_label
from ddim.results.runs import LOSS, LOSSES, Run
from ddim.results.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


FEW = 10  # points of a curve that are marked


class Curves(NamedTuple):
    """A metric of several checkpoints.

    Attributes:
        x: what the checkpoints differ in.
        lines: name of a line -> (x, value, sample standard deviation over ranges of images or None), by rising x.
    """

    x: str
    lines: dict[str, list[tuple[float, float, float | None]]]


def checkpoint_curves(table: Table) -> Curves | None:
    """Return the curves of a table of trainings' checkpoints of several EMA lengths or steps, None for other tables."""
    checkpoints: dict[str, dict[str, Any]] = (table.protocol["model"] or {}).get("checkpoints", {})
    labels = {name: weights_label(model) for name, model in checkpoints.items()}
    lengths = {name: float(found[1]) for name, label in labels.items() if (found := re.match(r"posthoc_(.+)", label))}
    steps = {name: model["step"] for name, model in checkpoints.items()}
    if len(set(lengths.values())) > 1:
        x, of, shown = "EMA length σ_rel", lengths, {name: ("", f"step {steps[name]:,}") for name in lengths}
    elif None not in steps.values() and len(set(steps.values())) > 1:
        x, of, shown = "optimiser step", steps, {name: (labels[name], "") for name in steps}
    else:
        return None
    runs = {name: _run(name, steps[name], labels[name]) for name in of}
    parts = [tuple(filter(None, (runs[name], *shown[name]))) for name in of]
    common = set.intersection(*map(set, parts))
    others = {name: [part for part in own if part not in common] for name, own in zip(of, parts, strict=True)}
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in table.rows:
        sampled = re.sub(r", S=\d+$", "", row)  # which stands last, where NFE does not tell the rows apart
        name = max((name for name in checkpoints if sampled.endswith(f", {name}")), key=len)
        if name not in of:  # of other weights than a post-hoc average
            continue
        for nfe in table.columns:
            if (value := table.value(row, nfe)) is not None:
                shown_row = sampled.removesuffix(f", {name}") + row.removeprefix(sampled)
                line = ", ".join([shown_row, f"{table.column}={nfe}", *others[name]])
                points.setdefault(line, []).append((of[name], value, table.spread(row, nfe)))
    if all(len(line) < 2 for line in points.values()):  # one checkpoint of each training
        return None
    return Curves(x, {line: sorted(points[line]) for line in points})


def _run(name: str, step: int | None, label: str) -> str:
    """Return the training that the name of a checkpoint in a table is of, without step, weights and EMA length."""
    name = re.sub(r"_step_\d+_length_[\d.e-]+", "", name)
    return name.replace(f" step {step:,}" if step is not None else "", "").replace(f" {label}", "")


def plot_checkpoints(table: Table, curves: Curves, paper: bool = False) -> "Figure":
    """Plot the metric of checkpoints against what they differ in, a line for each sampler and number of steps.

    Bars are the spread over ranges of images; with `paper` there is no title.
    """
    from matplotlib.ticker import ScalarFormatter

    figure, axes = new_figure()
    shown: list[float] = []
    for number, (line, points) in enumerate([*curves.lines.items()][:MOST_ROWS]):
        x, values, spreads = zip(*points, strict=True)
        bars = None if table.ranges == 1 else [spread or 0.0 for spread in spreads]
        axes.errorbar(x, values, yerr=bars, capsize=3, label=plain(line), **line_style(number))
        shown += values
    mention_more(axes, len(curves.lines))
    axes.set(xlabel=plain(curves.x), yscale="log" if min(shown) > 0 else "linear")
    if min(shown) > 0 and max(shown) < 10 * min(shown):  # 4 rather than 4 × 10⁰
        for of in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            of(ScalarFormatter())
    label_metric(axes, table.metric, paper)
    axes.grid(alpha=0.3)
    add_legend(axes)
    set_title(axes, "" if paper else table.title())
    return figure


def plot_training(runs: Sequence[Run]) -> "Figure":
    """Plot the loss of training runs against the step, and below it each metric that was measured meanwhile.

    Dotted vertical lines are the steps at which a run was stopped, and went on later.
    """
    from matplotlib.figure import Figure

    names = sorted({name for run in runs for name in run.curves}, key=lambda name: (name != LOSS, name))
    figure = Figure(layout="constrained")
    figure.set_figheight(figure.get_figheight() * (1 + len(names)) / 2)
    for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], names, strict=True):
        shown = [(run, run.curves[name]) for run in runs[:MOST_ROWS] if name in run.curves]
        for number, (run, points) in enumerate(shown):
            axes.plot(
                *zip(*points, strict=True),
                marker="" if name in LOSSES and len(points) > FEW else "o",
                label=plain(run.name),
            )
            for stop in run.stops:
                axes.axvline(stop, color=f"C{number % 10}", linestyle=":", linewidth=0.8)
        positive = min(value for _, points in shown for _, value in points) > 0
        axes.set(ylabel=plain(name), yscale="log" if positive else "linear")
        axes.grid(alpha=0.3)
        if any(run.stops for run, _ in shown):
            axes.plot([], [], color="gray", linestyle=":", linewidth=0.8, label="stopped and resumed")
        add_legend(axes)
    axes.set_xlabel("optimiser step")
    return figure


def save_checkpoints_plot(
    table: Table, curves: Curves, path: Path, spec: PlotSpec = SCREEN, paper: bool = False
) -> Path:
    """Write `plot_checkpoints(table, curves)` as PNG to `path` and as PDF next to it, as `save_plot` does."""
    content = [table.metric, table.title(), curves.x, curves.lines, paper]
    return save(lambda: plot_checkpoints(table, curves, paper), content, path, spec)


def save_training_plot(runs: Sequence[Run], path: Path, spec: PlotSpec = SCREEN) -> Path:
    """Write `plot_training(runs)` as `save_plot` does."""
    content = [(run.name, run.curves, run.stops) for run in runs[:MOST_ROWS]]
    return save(lambda: plot_training(runs), content, path, spec)
