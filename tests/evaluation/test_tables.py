"""Tables show the records they were made of: every number in its place, and no two protocols in one table."""

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddim.evaluation.records import Record
from ddim.evaluation.tables import Table, build_tables, write_report

FID = "fid_50k"


def record(label: str, S: int, value: float, spacing: str = "quad", **changes: Any) -> Record:
    """A record as evaluation writes it; a change named a__b replaces entry b of entry a."""
    made: Record = {
        "model": {"weights": "ema", "weights_hash": "0123456789abcdef", "step": 800_000, "T": 1000},
        "sampler": {"rule": "ddim", "tau": list(range(S)), "last_time": 0},
        "n": 50_000,
        "seed": 0,
        "bf16": False,
        "pixels": "uint8, rounded half up",
        "reference": {"name": "cifar10-train", "images": 50_000, "fingerprint": "f"},
        "metric": {"extractor": "inception", "weights_hash": "w"},
        "metrics": {FID: value},
        "label": label,
        "S": S,
        "spacing": spacing,
        "distinct_evaluations": S,
        "seconds_sampling": 1.5,
        "key": f"{label}{S}{spacing}",
    }
    made = copy.deepcopy(made)
    for path, value in changes.items():
        outer, _, inner = path.partition("__")
        if inner:
            made[outer][inner] = value
        else:
            made[outer] = value
    return made


# Out of order, and with holes, as a sweep that was interrupted leaves them.
RECORDS = [
    record("σ̂", 10, 367.43),
    record("η=1.0", 10, 41.07),
    record("η=0.0", 100, 4.16),
    record("η=0.0", 10, 13.36),
    record("η=0.2", 20, 7.11),
    record("η=0.0 (clip x0)", 20, 0.0123),
    record("σ̂", 1000, 3.17, "full"),
]
ROWS = ["η=0.0", "η=0.0 (clip x0)", "η=0.2", "η=1.0", "σ̂"]
COLUMNS = [10, 20, 100, 1000]
VALUES = {
    "η=0.0": [13.36, None, 4.16, None],
    "η=0.0 (clip x0)": [None, 0.0123, None, None],
    "η=0.2": [None, 7.11, None, None],
    "η=1.0": [41.07, None, None, None],
    "σ̂": [367.43, None, None, 3.17],
}


def values(table: Table) -> dict[str, list[float | None]]:
    return {row: [table.value(row, S) for S in table.columns] for row in table.rows}


def test_rows_columns_and_blanks() -> None:
    [table] = build_tables(RECORDS)
    assert (table.metric, table.rows, table.columns) == (FID, ROWS, COLUMNS)
    assert values(table) == VALUES


def test_the_order_of_the_records_does_not_matter() -> None:
    [table], [other] = build_tables(RECORDS), build_tables(RECORDS[::-1])
    assert table.markdown() == other.markdown()
    assert table.title() == other.title()


def test_markdown_reads_back() -> None:
    [table] = build_tables(RECORDS)
    header, rule, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.markdown().splitlines()]
    assert header == ["S", "10", "20", "100", "1000"]
    assert rule == ["---"] * 5
    assert [line[0] for line in lines] == ROWS
    for name, *texts in lines:
        for text, value in zip(texts, VALUES[name], strict=True):
            assert (None if text == "" else float(text)) == value


def test_the_title_says_what_was_measured() -> None:
    [table] = build_tables(RECORDS)
    assert table.title() == (
        "fid_50k: 50,000 images against 50,000 of cifar10-train, ema weights 01234567 at step 800,000, tau quad, seed 0"
    )
    [unusual] = build_tables([record("η=0.0", 10, 1.0, bf16=True, sampler__last_time=1)])
    assert unusual.title().endswith("seed 0, bfloat16, ends at alpha_bar[1]")


@pytest.mark.parametrize(
    "change",
    [
        {"n": 1000},
        {"seed": 1},
        {"bf16": True},
        {"pixels": "float"},
        {"model__weights": "raw"},
        {"model__weights_hash": "other"},
        {"model__step": 1},
        {"reference__name": "cifar10-test"},
        {"reference__fingerprint": "other"},
        {"metric__extractor": "pixels"},
        {"metric__weights_hash": "other"},
        {"sampler__last_time": 1},
        {"spacing": "linear"},
        {"spacing": "explicit 1,500"},
    ],
    ids=str,
)
def test_protocols_are_never_mixed(change: dict[str, Any]) -> None:
    tables = build_tables([record("η=0.0", 10, 1.0), record("η=0.0", 10, 2.0, **change)])
    assert sorted(table.value("η=0.0", 10) for table in tables) == [1.0, 2.0]
    assert [len(table.cells) for table in tables] == [1, 1]


def test_the_full_chain_joins_every_spacing_of_its_protocol() -> None:
    full = record("η=0.0", 1000, 4.04, "full")
    tables = build_tables(
        [
            record("η=0.0", 10, 13.36),
            full,
            record("η=0.0", 10, 17.33, "linear"),
            record("η=0.0", 10, 5.0, "linear", seed=1),
        ]
    )
    found = {(table.protocol["seed"], table.protocol["spacing"]): values(table) for table in tables}
    assert found == {
        (0, "quad"): {"η=0.0": [13.36, 4.04]},
        (0, "linear"): {"η=0.0": [17.33, 4.04]},
        (1, "linear"): {"η=0.0": [5.0]},
    }
    [alone] = build_tables([full])
    assert (alone.protocol["spacing"], values(alone)) == ("full", {"η=0.0": [4.04]})


def test_the_last_of_two_records_of_a_cell_stays() -> None:
    [table] = build_tables([record("η=0.0", 10, 1.0), record("η=0.0", 10, 2.0)])
    assert values(table) == {"η=0.0": [2.0]}


def test_there_is_a_table_for_each_metric() -> None:
    both = record("η=0.0", 10, 0.0, metrics={FID: 4.0, "kid_50k": 0.001})
    assert {table.metric: values(table) for table in build_tables([both])} == {
        FID: {"η=0.0": [4.0]},
        "kid_50k": {"η=0.0": [0.001]},
    }
    assert build_tables([]) == []


def test_the_files_of_a_report_hold_the_numbers(tmp_path: Path) -> None:
    records = [*RECORDS, record("η=0.0", 10, 5.5, "linear")]
    paths = write_report(records, tmp_path / "new")
    names = ["table.md", "table.csv", "table.json", "plot_fid_50k.png", "plot_fid_50k_1.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(names)

    tables = build_tables(records)
    text = paths[0].read_text()
    for table in tables:
        assert f"**{table.title()}**\n\n{table.markdown()}\n" in text

    rows = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    for number, table in enumerate(tables):
        cells = {(r["sampler"], int(r["S"])): float(r["value"]) for r in rows if r["table"] == str(number)}
        assert cells == {key: r["metrics"][FID] for key, r in table.cells.items()}
    assert len(rows) == len(RECORDS) + 2  # the full chain is in both tables
    assert {r["metric"] for r in rows} == {FID}
    assert {r["key"] for r in rows} == {r["key"] for r in records}

    content = json.loads(paths[2].read_text())
    assert [(t["metric"], t["columns"], t["rows"]) for t in content] == [
        (table.metric, table.columns, values(table)) for table in tables
    ]
    assert content[0]["protocol"] == tables[0].protocol


@pytest.mark.parametrize("numbers", [[13.36, 4.16], [-0.001, 0.002], [-1.0, -2.0]])
def test_the_plot_is_a_png_of_its_size(tmp_path: Path, numbers: list[float]) -> None:
    records = [record("σ̂", S, value) for S, value in zip((10, 100), numbers, strict=True)]
    path = write_report(records, tmp_path)[-1]
    with Image.open(path) as plot:
        assert (plot.format, plot.size) == ("PNG", (900, 600))  # 6 x 4 inches at 150 dots per inch
        assert len(plot.convert("RGB").getcolors(1 << 20) or []) > 10
