"""Plots show the given points, and the fitted exponent is that of the times."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from made_records import record
from PIL import Image

from ddim.results import plots
from ddim.results.plot_spec import PlotSpec
from ddim.results.protocol import completed
from ddim.results.report import build_tables, write_report

pytestmark = pytest.mark.integration

H200 = {"device": "NVIDIA H200", "processes": 2, "batch_size": 250}


def curves(figure: Any) -> list[list[tuple[float, float]]]:
    return [
        list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in figure.axes[0].lines
        if len(line.get_xdata())
    ]


@pytest.mark.parametrize("numbers", [[13.36, 4.16], [-0.001, 0.002], [-1.0, -2.0]])
def test_plot_is_written_as_png_and_pdf(tmp_path: Path, numbers: list[float]) -> None:
    records = [record("σ̂", S, value) for S, value in zip((10, 100), numbers, strict=True)]
    [path] = [path for path in write_report(records, tmp_path) if path.suffix == ".png"]
    with Image.open(path) as plot:
        assert (plot.format, plot.size) == ("PNG", (1200, 800))  # 6 x 4 inches at 200 dots per inch
        assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 10
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_a_plot_for_a_paper_has_its_width_and_no_title(tmp_path: Path) -> None:
    records = [record("η=0.0", S, 100.0 / S) for S in (10, 20)]
    paths = write_report(records, tmp_path, style="paper", figure=PlotSpec(width=3.25, format="pdf"))
    [path] = [path for path in paths if path.stem.startswith("plot_")]
    content = path.read_bytes()
    assert path.suffix == ".pdf"
    assert not path.with_suffix(".png").exists()
    assert b"/Type3" not in content
    assert b"/MediaBox [ 0 0 234 156 ]" in content  # 3.25 x 2.17 inches of 72 points
    [table] = build_tables(records)
    with matplotlib.rc_context(PlotSpec(width=3.25).parameters()):
        [axes] = plots.plot(table, paper=True).axes
    assert axes.get_title() == ""
    sizes = {text.get_fontsize() for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels())}
    assert sizes == {8}
    assert "01234567" in plots.plot(table).axes[0].get_title()  # the hash of the weights
    with pytest.raises(ValueError, match=r"width=0\.5 must be 1 to 40 inches"):
        PlotSpec(width=0.5)


def test_plot_shows_ours_paper_and_spread() -> None:
    records = [record("η=0.0", S, v, paper="table1_cifar10") for S, v in ((10, 13.0), (50, 5.0))]
    records += [
        record("η=0.0", 10, 15.0, paper="table1_cifar10", first=50_000),
        record("η=0.3", 10, 14.0, paper="table1_cifar10"),
    ]
    [table] = build_tables(records)
    figure = plots.plot(table)
    shown = curves(figure)
    assert [(10, 14.0), (50, 5.0)] in shown
    assert [(10, 14.0)] in shown  # η = 0.3, which the paper does not have
    assert [(10, 13.36), (50, 4.67)] in shown
    [axes] = figure.axes
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert {line.get_linestyle() for line in hollow} == {"--"}
    assert "paper" in [text.get_text() for text in axes.get_legend().get_texts()]
    bars = axes.collections[0].get_segments()[0]
    assert bars[:, 1] == pytest.approx([14 - np.sqrt(2), 14 + np.sqrt(2)])
    [plain] = build_tables([r | {"paper": None} for r in records])
    assert "paper" not in [text.get_text() for text in plots.plot(plain).axes[0].get_legend().get_texts()]


def test_the_papers_sigma_hat_row_is_drawn_once() -> None:
    labels = ("σ̂", "σ̂ (clip x0_and_eps)")
    [table] = build_tables([record(label, S, 100.0 / S, paper="table1_cifar10") for label in labels for S in (10, 20)])
    assert curves(plots.plot(table)).count([(10, 367.43), (20, 133.37)]) == 1


def test_a_report_draws_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a report."""
    drawn: list[str] = []
    draw = plots.plot
    monkeypatch.setattr(plots, "plot", lambda table, paper: (drawn.append(table.protocol["n"]), draw(table))[1])
    records = [record("η=0.0", 10, 1.0, n=n) for n in (1000, 2000)]
    names = [path.name for path in write_report(records, tmp_path)]
    assert sorted(drawn) == [1000, 2000]
    drawn.clear()
    assert [path.name for path in write_report(records, tmp_path)] == names
    assert drawn == []
    write_report([*records, record("η=0.0", 20, 1.0, n=2000)], tmp_path)
    assert drawn == [2000]
    first, *_ = sorted(tmp_path.glob("plot_fid*.png"))
    for damage in (lambda: first.with_suffix(".pdf").unlink(), lambda: first.write_bytes(b"\x89PNG\r\n\x1a\nx")):
        drawn.clear()
        damage()
        write_report([*records, record("η=0.0", 20, 1.0, n=2000)], tmp_path)
        assert len(drawn) == 1


def test_a_plot_names_as_many_rows_as_fit() -> None:
    [table] = build_tables([record(f"η={row / 100}", S, 1.0 + row) for row in range(200) for S in (10, 20)])
    figure = plots.plot(table)
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert (len(names), names[0], names[-1]) == (21, "η=0.0", "and 180 more")


@pytest.mark.parametrize("text", ["$x$", r"\frac{ a_b^c σ̂ $"])
def test_text_is_not_parsed_as_a_formula(tmp_path: Path, text: str) -> None:
    records = [record(text, 10, 1.0, reference__name=text, compute=H200 | {"device": text})]
    records.append(record(text, 20, 1.0, reference__name=text, compute=H200 | {"device": text}))
    assert "plot_time.png" in [path.name for path in write_report(records, tmp_path)]


def timed(S: int, seconds: float, **changes: Any) -> Any:
    return completed(record("η=0.0", S, 1.0, seconds_sampling=seconds, **{"compute": H200} | changes))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_errors_are_plotted_by_nfe_with_their_order(order: int) -> None:
    changes: dict[str, Any] = {"kind": "trajectory", "reference__name": "AB3 over all 1,000 times"}
    records = [record("Heun", S, float(2 * S - 1) ** -order, nfe=2 * S - 1, **changes) for S in (3, 5, 10)]
    [table] = build_tables(records)
    assert "50,000 images against AB3 over all 1,000 times, from the same x_T" in table.title()
    [axes] = plots.plot(table).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlabel() == "NFE, network evaluations of an image"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"Heun (slope -{order}.0)"]
    [timing] = plots.timings([made | {"kind": "fidelity"} for made in (timed(3, 5.0, nfe=5), timed(5, 9.0, nfe=9))])
    assert timing.exponent == pytest.approx(1.0)
    assert "time ∝ NFE^1.000" in timing.caption()


def test_many_rows_differ_in_colour_or_marker() -> None:
    [table] = build_tables([record(f"rule {k}", 10, 1.0 + k) for k in range(18)])
    lines = [bars.lines[0] for bars in plots.plot(table).axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 18


@pytest.mark.parametrize("power", [1.0, 0.9, 1.25])
def test_fit_recovers_the_exponent(power: float) -> None:
    [timing] = plots.timings([timed(S, 7.2 * S**power, n=1000) for S in (10, 20, 50, 100)])
    assert timing.exponent == pytest.approx(power, abs=1e-9)
    assert timing.fitted(50) == pytest.approx(7.2 * 50**power / 1000 * 50_000 / 3600)
    assert f"S^{power:.3f}, {100 * (power - 1):+.1f} % from linear" in timing.caption()
    assert curves(plots.plot_time(timing))[0] == [(S, hours) for _, S, hours in timing.points]


def test_hours_are_scaled_to_fifty_thousand_images() -> None:
    [timing] = plots.timings([timed(10, 36.0, n=1000), timed(20, 72.0, n=2000)])
    assert [hours for _, _, hours in timing.points] == pytest.approx([0.5, 0.5])  # 0.036 s an image
    assert "scaled from 1,000 and 2,000" in timing.caption()
    assert plots.plot_time(timing).axes[0].get_ylabel() == "hours for 50,000 images, scaled"
    [unscaled] = plots.timings([timed(10, 3600.0), timed(20, 7200.0)])
    assert [hours for _, _, hours in unscaled.points] == pytest.approx([1.0, 2.0])
    assert "scaled" not in unscaled.caption() + plots.plot_time(unscaled).axes[0].get_ylabel()
    assert "NVIDIA H200; processes: 2; images per batch: 250; weights 01234567, float32" in unscaled.caption()
    [fast] = plots.timings([timed(S, 1.0, compute=H200 | {"settings": "tf32+compile"}) for S in (10, 20)])
    assert "weights 01234567, tf32+compile)" in fast.caption()


@pytest.mark.parametrize(
    "change",
    [
        {"compute": {"device": "another"}},
        {"compute": H200 | {"settings": "bf16+compile"}},
        {"bf16": True},
        {"tf32": True},
        {"model__weights_hash": "other"},
    ],
    ids=str,
)
def test_devices_and_models_are_not_mixed(change: dict[str, Any]) -> None:
    records = [timed(S, 10.0 * S) for S in (10, 20)] + [timed(S, 20.0 * S, **change) for S in (10, 20)]
    timings = plots.timings(records)
    assert sorted(points[0][2] for timing in timings if (points := timing.points)) == pytest.approx(
        [100 / 3600, 200 / 3600]
    )
    assert [len(timing.points) for timing in timings] == [2, 2]


def test_times_need_a_device_and_two_values_of_S() -> None:
    older = [timed(S, 1.0, compute=None) for S in (10, 20)]
    encoded = [timed(S, 1.0, kind="reconstruction") for S in (10, 20)]
    assert plots.timings([*older, *encoded, timed(10, 1.0), timed(10, 2.0)]) == []
