"""Several checkpoints share a table, whose rows name their runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_records import FID, record

from ddim.results.plot_spec import PlotSpec
from ddim.results.records import Record
from ddim.results.report import build_tables, sigma_hat_variants, write_report
from ddim.results.schema import check_evaluation
from ddim.results.table import row_order
from ddim.results.training_plots import checkpoint_curves, plot_checkpoints

OLD = {"run", "recipe"}  # fields that older records lack


def trained(run: str, lr: float, value: float, label: str = "η=0.0", **changes: Any) -> Record:
    """Return the record of an evaluation of the run's last checkpoint."""
    step = changes.get("model__step")
    hashed = {"model__weights_hash": f"{lr:.6f}{step}"}
    one = record(label, 10, value, run=run, recipe={"optim.lr": lr, "seed": 0}, **hashed, **changes)
    one["config"] = {"checkpoint": f"outputs/{run}/{step}.ckpt"}
    return one | {"key": f"{run}{lr}{label}{value}"}


def rows(records: list[Record]) -> dict[str, float | None]:
    [table] = build_tables(records)
    return {row: table.value(row, 10) for row in table.rows}


def test_rows_name_the_runs_of_several_checkpoints(tmp_path: Path) -> None:
    records = [trained("slow", 0.001, 3.0), trained("fast", 0.1, 2.0), trained("fast", 0.1, 4.0, "η=1.0")]
    assert rows(records) == rows(records[::-1]) == {"η=0.0, fast": 2.0, "η=0.0, slow": 3.0, "η=1.0, fast": 4.0}
    [table] = build_tables(records)
    assert "ema weights of 2 checkpoints at step 800,000, tau quad" in table.title()
    items = dict(table.describe_protocol(full=False))
    assert items["settings"] == "fast: optim.lr 0.1; slow: optim.lr 0.001"
    assert items["weights"].startswith("fast: ema, hash 0.100000None, step 800,000, trained on cifar10; slow: ema, ")
    assert items["schedule"] == "linear, T=1000, prediction eps"
    paths = {path.name: path for path in write_report(records, tmp_path)}
    assert "slow" in paths["timing.csv"].read_text()
    [content] = json.loads(paths["table.json"].read_text())
    assert content["protocol"]["model"]["checkpoints"]["slow"]["settings"] == {"optim.lr": 0.001}
    for one in records:
        check_evaluation(one)


def test_checkpoints_are_sorted_by_their_step() -> None:
    steps = [f"η={eta}, run step {step:,}" for eta in ("0.0", "1.0") for step in (250, 500, 1000, 2000, 17500)]
    assert sorted(sorted(steps), key=row_order) == steps


def test_one_checkpoint_has_the_table_of_before() -> None:
    one, two = (trained("run", 0.1, value, label) for label, value in (("η=0.0", 1.0), ("η=1.0", 2.0)))
    [table], [old] = build_tables([one, two]), build_tables([{k: r[k] for k in r if k not in OLD} for r in (one, two)])
    assert table.rows == old.rows == ["η=0.0", "η=1.0"]
    assert (table.title(), table.markdown(), table.protocol) == (old.title(), old.markdown(), old.protocol)
    online = one | {"model": one["model"] | {"weights": "raw", "weights_hash": "f" * 16}, "key": "online"}
    assert len(build_tables([one, online])) == 2  # two weights of one checkpoint


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (trained("a", 0.1, 2.0, model__step=5), ["a step 5", "a step 7"]),
        (trained("a", 0.2, 2.0, model__step=7), ["a 0.100000", "a 0.200000"]),
        (trained("b", 0.2, 2.0, model__step=5), ["a", "b"]),
    ],
)
def test_runs_of_one_name_are_told_apart(other: Record, names: list[str]) -> None:
    one = trained("a", 0.1, 1.0, model__step=7)
    other["config"] = {"checkpoint": "elsewhere"}
    assert sorted(rows([one, other])) == [f"η=0.0, {name}" for name in names]


def test_older_records_are_named_by_their_hash() -> None:
    records = [{k: r[k] for k in r if k not in OLD} for r in (trained("a", 0.1, 1.0), trained("b", 0.2, 2.0))]
    assert rows(records) == {"η=0.0, weights 0.100000": 1.0, "η=0.0, weights 0.200000": 2.0}
    assert "settings" not in dict(build_tables(records)[0].describe_protocol(full=True))


def test_each_run_is_compared_with_the_paper() -> None:
    records = [trained(run, lr, 14.0, paper="table1_cifar10") for run, lr in (("a", 0.1), ("b", 0.2))]
    [table] = build_tables(records)
    assert [table.paper_value(row, 10) for row in table.rows] == [13.36, 13.36]
    assert sigma_hat_variants([r | {"label": "σ̂"} for r in records]) == []


def test_a_metric_is_drawn_against_the_step() -> None:
    records = [
        trained("a", 0.1, value, label, model__step=step) | {"S": S, "nfe": S}
        for label, S, step, value in (
            ("η=0.0", 10, 7, 3.0),
            ("η=0.0", 10, 500, 1.0),
            ("η=0.0", 10, 50, 2.0),
            ("η=1.0", 20, 50, 4.0),
        )
    ]
    [table] = build_tables(records)
    curves = checkpoint_curves(table)
    assert curves == (
        "optimiser step",
        {"η=0.0, S=10": [(7, 3.0, None), (50, 2.0, None), (500, 1.0, None)], "η=1.0, S=20": [(50, 4.0, None)]},
    )
    [axes] = plot_checkpoints(table, curves).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[7, 50, 500], [50]]
    assert (axes.get_xlabel(), axes.get_yscale()) == ("optimiser step", "log")


def test_rows_that_name_their_steps_are_drawn() -> None:
    """As with guidance in an interval, where two numbers of steps may ask for as many evaluations."""
    records = [
        trained("a", 0.1, S + step, "η=0.0", model__step=step) | {"S": S, "nfe": 9} for S in (5, 6) for step in (7, 50)
    ]
    [table] = build_tables(records)
    curves = checkpoint_curves(table)
    assert curves is not None
    lines = {f"η=0.0, S={S}, {table.column}=9": [(7, S + 7, None), (50, S + 50, None)] for S in (5, 6)}
    assert curves.lines == lines


def test_post_hoc_averages_are_drawn_against_their_length() -> None:
    records = [
        trained("a", length, value, model__step=step, model__weights=f"posthoc_{length}")
        for length, step, value in ((0.2, 7, 2.0), (0.05, 7, 3.0), (0.1, 50, 4.0))
    ]
    records.append(trained("a", 0.3, 9.0, model__step=7, model__weights="raw"))
    [table] = build_tables(records)
    lines = {"η=0.0, S=10, step 7": [(0.05, 3.0, None), (0.2, 2.0, None)], "η=0.0, S=10, step 50": [(0.1, 4.0, None)]}
    assert checkpoint_curves(table) == ("EMA length σ_rel", lines)


def test_averages_of_two_trainings_have_a_line_each() -> None:
    records = [
        trained(f"{run}_step_7_length_{x}", seed + x, seed + x, model__step=7, model__weights=f"posthoc_{x}")
        for seed, run in enumerate("ab")
        for x in (0.1, 0.2)
    ]
    [table] = build_tables(records)
    lines = {f"η=0.0, S=10, {run}": [(x, seed + x, None) for x in (0.1, 0.2)] for seed, run in enumerate("ab")}
    assert checkpoint_curves(table) == ("EMA length σ_rel", lines)


def test_other_tables_have_no_such_curve(tmp_path: Path) -> None:
    of_runs = [trained("slow", 0.001, 3.0), trained("fast", 0.1, 2.0)]
    of_steps = [trained("run", 0.1, float(step), model__step=step) for step in (5, 7)]
    apart = [trained(run, lr, 3.0, model__step=step) for run, lr, step in (("a", 0.1, 5), ("b", 0.2, 7))]
    assert checkpoint_curves(build_tables(apart)[0]) is None  # two trainings, one checkpoint of each
    for records, expected in ((of_runs, []), (of_runs[:1], []), (of_steps, [f"plot_checkpoints_{FID}.png"])):
        [table] = build_tables(records)
        assert (checkpoint_curves(table) is not None) == bool(expected)
        paths = write_report(records, tmp_path / str(len(expected)), figure=PlotSpec(format="png"))
        assert [path.name for path in paths if "checkpoints" in path.name] == expected
