"""Several checkpoints share a table, whose rows name their runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_records import record

from ddim.results.records import Record
from ddim.results.report import build_tables, sigma_hat_variants, write_report
from ddim.results.schema import check_evaluation

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
