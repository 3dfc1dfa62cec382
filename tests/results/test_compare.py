"""A comparison shows what trainings did: what differs, the best first, and nothing of a call that was refused."""

import csv
import io
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_records import record
from PIL import Image

from ddim.errors import UserError
from ddim.results.compare import Run, compare, last_loss, read_run
from ddim.results.compare_report import plot_settings, plot_steps, write_comparison
from ddim.results.compare_text import as_csv, latex, markdown
from ddim.results.runs import read_training
from ddim.results.schema import evaluation_records

FD = "fd_pixels_1k"
CONFIG = {"name": "lr${optim.lr}", "output_dir": "x", "trainer": {"batch_size": 100, "log_every": 10, "max_steps": 20}}
COLUMNS = "epoch,step,train/images_per_second,train/loss,val/loss\n"


def write_config(folder: Path, time: str, changes: dict[str, Any], seconds: float) -> None:
    path = folder / "hydra" / time / ".hydra" / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(CONFIG | changes))
    os.utime(path, (seconds, seconds))


def write_run(folder: Path, values: dict[int, float] | None = None, weights: str = "ema", **changes: Any) -> Path:
    """Write the folder of a run; values: step -> metric."""
    write_config(folder, "2026-01-01_10-00-00/0", changes, 1000)
    log = folder / "csv" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text(f"{COLUMNS}0,9,2.0,0.5,\n0,9,,,0.3\n0,19,1.0,0.25,\n")
    os.utime(log, (2000, 2000))
    add_records(folder, values or {}, weights)
    return folder


def add_records(folder: Path, values: dict[int, float], weights: str, **changes: Any) -> None:
    for step, value in values.items():
        changes |= {"metrics": {FD: value, "val_loss": 1 / value}, "model__step": step, "model__weights": weights}
        evaluation_records(folder / "records.jsonl").append(record("η=0.0", 20, value, **changes))


def runs(*folders: Path) -> list[Run]:
    read = [read_run(folder) for folder in folders]
    return [run for run in read if run is not None]


@pytest.fixture
def grid(tmp_path: Path) -> list[Run]:
    """A grid of two settings; the value of a run is lr times EMA rate, ten times as much at step 10."""
    pairs = [(lr, decay) for lr in (1.0, 2.0) for decay in (3, 5)]
    return runs(
        *(
            write_run(
                tmp_path / f"lr{lr}_ema{decay}",
                {10: 10 * lr * decay, 20: lr * decay},
                optim={"lr": lr},
                ema={"decay": decay},
            )
            for lr, decay in pairs
        )
    )


def test_rows_are_sorted_and_show_what_differs(grid: list[Run]) -> None:
    comparison = compare(grid)
    assert (comparison.metric, comparison.keys, comparison.steps) == (FD, ["ema.decay", "optim.lr"], [10, 20])
    assert [(row.settings["optim.lr"], row.settings["ema.decay"], row.best) for row in comparison.rows] == [
        (1.0, 3, (20, 3.0)),
        (1.0, 5, (20, 5.0)),
        (2.0, 3, (20, 6.0)),
        (2.0, 5, (20, 10.0)),
    ]
    assert comparison.rows[0].points == {10: 30.0, 20: 3.0}
    assert [row.name for row in compare(grid, "val_loss").rows] == [row.name for row in comparison.rows[::-1]]
    with pytest.raises(
        UserError, match=rf"no training has it \(did you mean {FD}\?\).* allowed: {FD}, val_loss, train_"
    ):
        compare(grid, "fd_pixel_1k")


def test_more_is_better_for_scores(grid: list[Run]) -> None:
    scores = [Run(run.folder, run.settings, {"is_1k": run.metrics[FD]}, {}, 0.0, None) for run in grid]
    best, *_, worst = compare(scores).rows
    assert (best.best, worst.best) == ((10, 100.0), (10, 30.0))


def test_without_evaluations_the_last_loss_decides(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    (one / "csv/version_0/metrics.csv").write_text(f"{COLUMNS}0,9,2.0,0.5,\n0,19,1.0,0.25,\n")
    (two / "csv/version_0/metrics.csv").write_text(f"{COLUMNS}0,9,2.0,0.1,\n0,19,1.0,0.2,\n")
    comparison = compare(runs(one, two))
    assert [(row.name, row.best, row.loss) for row in comparison.rows] == [
        ("two", (20, 0.2), 0.2),
        ("one", (20, 0.25), 0.25),
    ]
    assert "at step" not in markdown(comparison)
    assert last_loss(one) == 0.25
    assert last_loss(tmp_path) is None


def test_without_samples_the_held_out_loss_decides(tmp_path: Path) -> None:
    """Of eval.n=0, as experiment=cifar10 has it: the best value, which also chooses best.ckpt."""
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    logged = f"{COLUMNS}0,9,2.0,0.1,\n0,9,,,0.2\n0,19,2.0,0.1,\n0,19,,,0.4\n0,2"
    (two / "csv/version_0/metrics.csv").write_text(logged)
    comparison = compare(runs(one, two))
    assert (comparison.metric, comparison.keys) == ("val_loss", [])
    assert [(row.label, row.best, row.points) for row in comparison.rows] == [
        ("two", (10, 0.2), {10: 0.2, 20: 0.4}),
        ("one", (10, 0.3), {10: 0.3}),
    ]
    assert [row.name for row in compare(runs(one, two), "train_loss").rows] == ["two", "one"]
    samples = write_run(tmp_path / "samples", {10: 5.0})
    assert compare(runs(one, samples)).metric == FD
    assert [row.best for row in compare(runs(one, samples), "val_loss").rows] == [(10, 0.2), (10, 0.3)]


@pytest.mark.parametrize(
    ("changes", "first"),
    [({}, "ema"), ({"ema": None}, "online"), ({"eval": {"weights": ["ema_0.9", "online"]}}, "ema_0.9")],
)
def test_held_out_losses_are_of_each_set_of_weights(tmp_path: Path, changes: dict[str, Any], first: str) -> None:
    folder = write_run(tmp_path / "run", **changes)
    columns = "epoch,step,val/loss,val/loss_quarter_1,val/loss_ema_0.99,val/loss_quarter_1_ema_0.99\n"
    (folder / "csv/version_0/metrics.csv").write_text(f"{columns}0,9,0.4,1.0,0.3,2.0\n")
    comparison = compare(runs(folder), "val_loss")
    assert comparison.keys == ["weights"]
    assert [(row.label, row.best) for row in comparison.rows] == [
        ("run, ema_0.99", (10, 0.3)),
        (f"run, {first}", (10, 0.4)),
    ]


def test_a_run_without_results_is_a_row_at_the_end(tmp_path: Path) -> None:
    write_config(tmp_path / "failed", "2026-01-01_10-00-00", {"optim": {"lr": -1}}, 1000)
    good = write_run(tmp_path / "good", {20: 4.0}, optim={"lr": 1})
    comparison = compare(runs(tmp_path / "failed", good))
    assert [(row.name, row.best, row.run.step, row.run.checkpoint) for row in comparison.rows] == [
        ("good", (20, 4.0), 20, None),
        ("failed", None, 0, None),
    ]
    (tmp_path / "other").mkdir()
    assert runs(tmp_path / "other", tmp_path) == []


def test_hours_and_losses_are_of_all_calls(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (again := folder / "csv" / "version_10").mkdir()
    (again / "metrics.csv").write_text(f"{COLUMNS}0,19,10.0,0.2,\n0,29,10.0,0.1,\n0,3")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    [run] = runs(folder)
    assert run.losses == {10: 0.5, 20: 0.2, 30: 0.1}
    assert run.hours * 3600 == pytest.approx(10 * 100 / 2 + 10 * 100 / 1 + 2 * 10 * 100 / 10)
    assert run.checkpoint == folder / "checkpoints" / "last.ckpt"


def test_settings_are_those_of_the_call_that_trained(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", optim={"lr": 1})
    write_config(folder, "2026-01-01_11-00-00", {"optim": {"lr": 2}}, 1500)  # resumed
    write_config(folder, "2026-01-01_12-00-00", {"optim": {"lr": 3}}, 2500)  # refused: nothing was written afterwards
    [run] = runs(folder)
    assert run.settings["optim.lr"] == 2
    path = folder / "hydra" / "2026-01-01_11-00-00" / ".hydra" / "config.yaml"
    path.write_text("a: [")
    os.utime(path, (1500, 1500))
    with pytest.raises(UserError, match="damaged"):
        read_run(folder)


def test_each_set_of_weights_has_a_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {10: 3.0})
    add_records(folder, {10: 2.0}, "raw")
    comparison = compare(runs(folder))
    assert [(row.label, row.best) for row in comparison.rows] == [("run, online", (10, 2.0)), ("run, ema", (10, 3.0))]
    assert comparison.keys == ["weights"]


@pytest.mark.parametrize(
    ("changes", "key", "named"),
    [
        ({"spacing": "uniform"}, "spacing", "uniform"),
        ({"seed": 7}, "samples.seed", "samples.seed=7"),
        ({"reference__name": "cifar10-test"}, "reference", "cifar10-test (fedcba987654)"),
        ({"first": 50_000}, "samples.first", "samples.first=50000"),
        ({"bf16": True}, "samples.precision", "bfloat16"),
    ],
)
def test_numbers_of_other_settings_have_a_row_of_their_own(
    tmp_path: Path, changes: dict[str, Any], key: str, named: str
) -> None:
    """As of a run that was resumed with other settings of its evaluation."""
    folder = write_run(tmp_path / "run", {10: 9.0, 20: 8.0})
    add_records(folder, {20: 21.0, 30: 20.0}, "ema", **changes)
    comparison = compare(runs(folder))
    assert [(row.best, row.points) for row in comparison.rows] == [
        ((20, 8.0), {10: 9.0, 20: 8.0}),
        ((30, 20.0), {20: 21.0, 30: 20.0}),
    ]
    assert comparison.keys == [key]
    assert comparison.rows[1].label == f"run, {named}"


def test_records_of_other_kinds_are_compared_too(tmp_path: Path) -> None:
    """Of scripts/metrics.py, which has no model, and of scripts/reconstruct.py, which has no seed."""
    folder = write_run(tmp_path / "run", {10: 9.0})
    images = {"kind": "images", "images": {"name": "x", "images": 50_000, "fingerprint": "0" * 16}}
    other = {key: value for key, value in record("x", 20, 1.0).items() if key not in ("model", "sampler", "S", "seed")}
    reconstruction = record("η=0.0", 20, 8.0, kind="reconstruction", metrics={FD: 8.0}, model__step=20)
    del reconstruction["seed"]
    for added in (other | images, reconstruction):
        evaluation_records(folder / "records.jsonl").append(added)
    assert {row.best for row in compare(runs(folder)).rows} == {(10, 9.0), (20, 8.0)}
    curves, _ = read_training(folder)
    assert {points for name, points in curves.items() if name.startswith(FD)} == {((10, 9.0),), ((20, 8.0),)}


def test_a_training_that_diverged_is_last(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name) for name in ("diverged", "fine"))
    (one / "csv/version_0/metrics.csv").write_text(f"{COLUMNS}0,9,2.0,0.01,\n0,19,1.0,nan,\n")
    comparison = compare(runs(one, two), "train_loss")
    assert [(row.name, row.best) for row in comparison.rows] == [("fine", (20, 0.25)), ("diverged", None)]


def test_runs_of_one_name_are_named_by_path(tmp_path: Path) -> None:
    comparison = compare(runs(*(write_run(tmp_path / where / "digits") for where in ("a", "b"))))
    assert [row.name for row in comparison.rows] == ["a/digits", "b/digits"]


def test_texts_agree_with_the_comparison(grid: list[Run]) -> None:
    comparison = compare(grid)
    title, _, header, rule, *lines = markdown(comparison).splitlines()
    assert title == f"**{FD} (less is better) of 4 trainings, the best first**"
    assert len({len(line) for line in (header, rule, *lines)}) == 1
    names = [text.strip() for text in header.split("|")[1:-1]]
    expected = ["run", "ema.decay", "optim.lr", "step 10", "step 20", "best", "at step", "loss", "hours", "steps"]
    assert names == [*expected, "checkpoint"]
    first = dict(zip(names, (text.strip() for text in lines[0].split("|")[1:-1]), strict=True))
    shown = {"run": "lr1.0_ema3", "step 10": "30.00", "best": "3.00", "at step": "20", "loss": "0.25", "steps": "20"}
    assert first.items() >= shown.items()
    rows = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    assert [(float(row["best"]), float(row["step 10"])) for row in rows] == [(3, 30), (5, 50), (6, 60), (10, 100)]
    tex = latex(comparison)
    assert r"lr1.0\_ema3 & 3 & 1 & 30.00 & 3.00 & 3.00 & 20 & 0.25" in tex
    assert "checkpoint" not in tex


def test_tables_show_few_steps_and_the_csv_all(tmp_path: Path) -> None:
    comparison = compare(runs(write_run(tmp_path / "run", dict.fromkeys(range(1, 12), 1.0))))
    header = markdown(comparison).splitlines()[2]
    assert [text.strip() for text in header.split("|") if "step " in text and "at" not in text] == [
        "step 2",
        "step 5",
        "step 8",
        "step 11",
    ]
    assert as_csv(comparison).count(",step ") == 11


@pytest.mark.integration
def test_plots_show_the_values(grid: list[Run], tmp_path: Path) -> None:
    comparison = compare(grid)
    [axes] = plot_steps(comparison).axes
    lines = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in axes.lines}
    assert lines["lr2.0_ema5"] == [(10, 100.0), (20, 10.0)]
    axes, _ = plot_settings(comparison).axes
    [image] = axes.images
    assert image.get_array().tolist() == [[3.0, 5.0], [6.0, 10.0]]  # rows: lr, columns: EMA rate
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ema.decay", "optim.lr")
    assert sorted(text.get_text() for text in axes.texts) == ["10.00", "3.00", "5.00", "6.00"]
    axes, _ = plot_settings(compare([grid[0], grid[3]])).axes  # a diagonal of a grid is still half of it
    assert len(axes.texts) == 2
    paths = write_comparison(comparison, tmp_path / "out")
    names = ["table.md", "table.csv", "table.tex", f"plot_{FD}.png", f"plot_{FD}.pdf", "heat_map.png", "heat_map.pdf"]
    assert [path.name for path in paths] == names
    with Image.open(paths[5]) as picture:
        assert picture.size == (1200, 800)


@pytest.mark.integration
def test_pairs_that_are_no_grid_are_points(tmp_path: Path) -> None:
    pairs = [(0.001 * 3**i, i) for i in range(4)]
    searched = (write_run(tmp_path / f"{i}", {20: 1.0 + i}, optim={"lr": lr}, ema={"decay": i}) for lr, i in pairs)
    axes, _ = plot_settings(compare(runs(*searched))).axes
    [points] = axes.collections
    assert points.get_offsets().tolist() == [[i, lr] for lr, i in reversed(pairs)]
    assert points.get_array().tolist() == [4.0, 3.0, 2.0, 1.0]
    assert axes.get_yscale() == "log"


def test_metrics_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """So that a comparison of many leaves one out, and does not end."""
    folder = write_run(tmp_path / "a")
    with (folder / "csv" / "version_0" / "metrics.csv").open("ab") as file:
        file.write(b"\xff\xfe")
    with pytest.raises(UserError, match=r"metrics\.csv is not understood; .* \(UnicodeDecodeError: 'utf-8' codec"):
        read_run(folder)


def test_a_pipe_in_place_of_the_metrics_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {10: 5.0})
    for path in folder.glob("csv/*/metrics.csv"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"metrics\.csv is a fifo, not a regular file"):
        read_run(folder)
