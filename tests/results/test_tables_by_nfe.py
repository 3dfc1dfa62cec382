"""Tables by the number of network evaluations (NFE), where samplers have another number than steps."""

import csv
import io
import json
from typing import Any

from made_records import FID, RECORDS, record

from ddim.results import text
from ddim.results.report import build_tables
from ddim.results.table import Table


def by_nfe(label: str, S: int, nfe: int, value: float, **changes: Any) -> Any:
    return record(label, S, value, nfe=nfe, **changes)


SOLVERS = [
    by_nfe("η=0.0", 5, 5, 9.0),
    by_nfe("η=0.0", 10, 10, 7.0),
    by_nfe("Heun", 3, 5, 8.0),
    by_nfe("σ̂ (clip x0)", 10, 10, 6.0),
    by_nfe("UniPC-2 B2", 10, 10, 6.0),
    by_nfe("iPNDM-4", 5, 5, 8.5),
    by_nfe("DPM-Solver++ 2M", 10, 10, 6.5),
]


def files(tables: list[Table]) -> list[str]:
    return [write(tables) for write in (text.markdown, text.as_csv, text.as_json, text.latex)]


def test_columns_are_evaluations_where_they_differ_from_steps() -> None:
    [table] = build_tables(SOLVERS)
    assert (table.column, table.columns) == ("NFE", [5, 10])
    assert table.rows == ["η=0.0", "σ̂ (clip x0)", "DPM-Solver++ 2M", "Heun", "iPNDM-4", "UniPC-2 B2"]
    assert [table.value("Heun", nfe) for nfe in table.columns] == [8.0, None]
    [steps] = build_tables([made for made in SOLVERS if made["label"] != "Heun"])
    assert (steps.column, steps.columns) == ("S", [5, 10])
    older = [{key: made[key] for key in made if key != "nfe"} for made in SOLVERS if made["label"] != "Heun"]
    assert files([steps]) == files(build_tables(older))


def test_the_best_of_a_column_is_marked_by_nfe_only() -> None:
    [table] = build_tables(SOLVERS)
    assert [line.split(" | ")[1:] for line in table.markdown().replace(" |\n", "\n").splitlines()[2:]] == [
        ["9.00", "7.00"],
        ["", "**6.00**"],
        ["", "6.50"],
        ["**8.00**", ""],
        ["8.50", ""],
        ["", "**6.00** |"],  # as good
    ]
    assert text.latex([table]).count(r"\textbf{") == 3
    assert "**" not in text.as_csv([table]) + text.as_json([table])
    scores = [made | {"metrics": {"is_50k": made["metrics"][FID]}} for made in SOLVERS]
    [table] = build_tables(scores)
    assert [row for row in table.rows if table.is_best(row, 5)] == ["η=0.0"]  # more is better
    [steps] = build_tables(RECORDS)
    assert "**" not in steps.markdown()
    assert text.latex([steps]).count(r"\textbf{") == 0


def test_samplers_of_one_nfe_that_differ_in_S_have_a_row_each() -> None:
    """As with guidance.interval, where S decides how many times are guided."""
    made = [by_nfe("η=0.0, w=2", S, nfe, value) for S, nfe, value in ((5, 9, 3.0), (10, 17, 2.0), (11, 17, 1.0))]
    [table] = build_tables(made)
    assert {key: table.value(*key) for key in table.entries} == {
        ("η=0.0, w=2", 9): 3.0,
        ("η=0.0, w=2, S=10", 17): 2.0,
        ("η=0.0, w=2, S=11", 17): 1.0,
    }


def test_seeds_of_an_adaptive_rule_share_a_column() -> None:
    """How many evaluations it takes depends on the noise."""
    label = "Dormand-Prince 0.001"
    made = [
        by_nfe(label, nfe, nfe, float(seed), spacing="adaptive", seed=seed)
        for seed, nfe in ((0, 91), (1, 103), (2, 97))
    ]
    made.append(by_nfe("Dormand-Prince 0.1", 49, 49, 9.0, spacing="adaptive"))
    [table] = build_tables(made)
    assert (table.column, table.columns, table.values(label, 97)) == ("S", [49, 97], [0.0, 1.0, 2.0])
    assert "mean ± sample standard deviation over 3 sets of images" in table.title()
    assert sorted(t.columns for t in build_tables([m | {"spacing": "quad"} for m in made])) == [[49, 91, 97, 103]]


def test_files_state_both_steps_and_evaluations() -> None:
    tables = build_tables(SOLVERS)
    rows = list(csv.DictReader(io.StringIO(text.as_csv(tables))))
    assert {(row["sampler"], row["S"], row["nfe"]) for row in rows} == {
        (made["label"], str(made["S"]), str(made["nfe"])) for made in SOLVERS
    }
    [content] = json.loads(text.as_json(tables))
    assert (content["column"], content["columns"]) == ("NFE", [5, 10])
