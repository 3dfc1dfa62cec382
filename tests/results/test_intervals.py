"""Tables show 95 % intervals and paired differences where they are asked for, and are as before where not."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_records import FID, compared, record

from ddim.errors import UserError
from ddim.results import text
from ddim.results.interval import INFLUENCE, interval, load_influence, save_influences
from ddim.results.records import RECORDS, Record
from ddim.results.report import build_tables, show_intervals, write_report
from ddim.results.schema import evaluation_records
from ddim.results.table import TableSpec

NOISE = np.random.default_rng(0).normal(size=(3, 400))


def measured(folder: Path, label: str, value: float, influence: np.ndarray, **changes: Any) -> Record:
    """Return a record with its interval, whose influences are in the folder."""
    made = record(label, 10, value, intervals={FID: list(interval(value, influence))}, **changes)
    save_influences(folder, made["key"], {FID: influence})
    return made


def rows(folder: Path, *records: Record) -> list[str]:
    """Return the lines of the table with intervals, below its header."""
    tables = build_tables(records)
    show_intervals(tables, folder)
    return [line for line in text.markdown(tables).splitlines() if line.startswith("|")][2:]


def test_an_interval_is_1_96_standard_errors_wide() -> None:
    low, high = interval(5.0, NOISE[0])
    assert high - 5 == pytest.approx(5 - low)
    assert high - 5 == pytest.approx(1.96 * NOISE[0].std(ddof=1) / 20, rel=1e-4)


def test_tables_show_intervals_where_they_are_asked_for(tmp_path: Path) -> None:
    made = measured(tmp_path, "η=0.0", 5.0, 10 * NOISE[0])
    low, high = made["intervals"][FID]
    assert rows(tmp_path, made) == [f"| η=0.0 | 5.00 [{low:.2f}, {high:.2f}] |"]
    assert rows(tmp_path, record("η=0.0", 10, 5.0)) == ["| η=0.0 | 5.00 |"]  # of an earlier version


def test_a_paired_difference_is_to_the_best_from_the_same_x_T(tmp_path: Path) -> None:
    shared = 10 * NOISE[0]
    best, near = measured(tmp_path, "η=0.0", 5.0, shared), measured(tmp_path, "η=0.2", 5.5, shared + NOISE[1])
    half = 1.96 * NOISE[1].std(ddof=1) / 20
    [path, *_] = write_report([best, near], tmp_path, shown=TableSpec(interval=True))
    assert "- intervals: of 95 %" in path.read_text()
    texts = [line for line in path.read_text().splitlines() if line.startswith("|")][2:]
    assert texts[2] == f"| η=0.2, to the best | +0.50 [{0.5 - half:.2f}, {0.5 + half:.2f}] |"
    assert len(texts) == 3
    assert 'class="paired"' in (tmp_path / "report.html").read_text()
    [line] = [
        line for line in csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())) if line["sampler"] == "η=0.2"
    ]
    ends = near["intervals"][FID]
    assert [float(line[key]) for key in ("low", "high", "to_best")] == pytest.approx([*ends, 0.5], rel=1e-5)
    assert float(line["to_best_high"]) == pytest.approx(0.5 + half, rel=1e-4)
    [content] = json.loads((tmp_path / "table.json").read_text())
    assert content["interval"]["η=0.2"] == [pytest.approx(ends, rel=1e-5)]
    assert content["to_best"]["η=0.0"] == [None]
    assert content["to_best"]["η=0.2"][0][0] == 0.5


@pytest.mark.parametrize("change", [{"seed": 1}, {"first": 50_000}], ids=str)
def test_rows_from_other_noise_are_not_paired(tmp_path: Path, change: dict[str, int]) -> None:
    records = measured(tmp_path, "η=0.0", 5.0, NOISE[0]), measured(tmp_path, "η=0.2", 5.5, NOISE[0], **change)
    assert [line.count("to the best") for line in rows(tmp_path, *records)] == [0, 0]


def test_the_interval_of_a_mean_is_narrower_by_the_root(tmp_path: Path) -> None:
    records = [measured(tmp_path, "η=0.0", value, NOISE[0], first=i * 50_000) for i, value in enumerate((4.0, 5, 6, 5))]
    [table] = build_tables(records)
    low, high = table.interval("η=0.0", 10) or (0, 0)
    one = records[0]["intervals"][FID]
    assert (low + high) / 2 == pytest.approx(5)
    assert high - low == pytest.approx((one[1] - one[0]) / 2)
    table.with_intervals = True
    assert "5.00 ± 0.82 [" in table.markdown()


def test_seeds_of_a_likelihood_are_of_the_same_images(tmp_path: Path) -> None:
    """So their mean varies over sets of images as one of them does, and a difference too."""
    records = [
        measured(tmp_path, label, 5.0 + i, NOISE[i], kind="likelihood", seed=seed, n=100, first=0)
        | {"key": f"{label}{seed}"}
        for seed in range(4)
        for i, label in enumerate(("Euler", "Heun"))
    ]
    for made in records:
        save_influences(tmp_path, made["key"], {FID: NOISE[int(made["label"] == "Heun")]})
    [table] = build_tables(records)
    table.with_intervals = True
    assert dict(table.describe_protocol(full=True))["intervals"] == "of 95 %, over sets of n images"
    low, high = table.interval("Euler", 10) or (0, 0)
    assert high - low == pytest.approx(np.diff(records[0]["intervals"][FID]).item())
    show_intervals([table], tmp_path)
    difference, ends = table.differences["Heun", 10]
    assert difference == 1
    assert ends == pytest.approx(interval(1.0, NOISE[0] - NOISE[1]), rel=1e-5)
    assert table.title().endswith("4 seeds, mean ± sample standard deviation over 4 seeds")


def test_other_tables_keep_their_bytes() -> None:
    records = compared(("η=0.0", 10, 13.4), ("η=0.0", 20, 6.84), ("σ̂", 10, 300.0))
    with_ends = [made | {"intervals": {FID: [1.0, 2.0]}} for made in records]
    for write in (text.markdown, text.as_csv, text.as_json, text.latex):
        assert write(build_tables(with_ends)) == write(build_tables(records))


@pytest.mark.parametrize("ends", [[1.0], 5, [1.0, "x"], None])
def test_an_interval_that_is_none_is_refused(tmp_path: Path, ends: Any) -> None:
    (tmp_path / RECORDS).write_text(json.dumps(record("η=0.0", 10, 5.0, intervals={FID: ends})) + "\n")
    with pytest.raises(UserError, match=f"the interval of {FID}"):
        evaluation_records(tmp_path / RECORDS).read()


def test_damaged_influences_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / INFLUENCE).mkdir()
    (tmp_path / INFLUENCE / "k.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"k\.npz is not understood"):
        load_influence(tmp_path, "k", FID)
    assert load_influence(tmp_path, "other", FID) is None
