"""The documents' numbers come from records, and the records show what the documents say of them."""

import runpy
import statistics
from pathlib import Path

import pytest

from ddim.results.records import RecordFile
from ddim.results.report import build_tables

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "update_results.py"))


def test_the_tables_are_those_of_the_records():
    texts = [path.read_text() for path in SCRIPT["DOCUMENTS"]]
    names = [block[2] for text in texts for block in SCRIPT["BLOCK"].finditer(text)]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "docs" / "results").glob("*.jsonl"))
    for text in texts:
        assert SCRIPT["fill"](text) == text
    typed = (("| η=0.0 | 7", "| η=0.0 | 1"), ("| 1.0", "| 0.5"), ("| ours | default | ", "| ours | default | 9"))
    for text, change in zip(texts, typed, strict=True):
        changed = text.replace(*change)
        assert changed != text
        assert SCRIPT["fill"](changed) == text  # a typed number does not survive


def speed(variant):
    """Return the records of one variant of the benchmark of the training."""
    records = RecordFile(ROOT / "docs" / "results" / "training_speed.jsonl").read()
    return [record for record in records if record["variant"] == variant]


def test_a_step_through_lightning_takes_what_it_takes_in_a_plain_loop():
    for record in speed("Lightning"):
        assert record["base"] == "plain loop"
        pairs = list(zip(record["seconds"], record["base_seconds"], strict=True))
        assert statistics.median(a / b for a, b in pairs) <= 1.03
        assert f"| {statistics.median(a / b for a, b in pairs):.3f} |" in SCRIPT["speed_table"]([record])
    assert speed("Lightning")


def test_the_digits_show_the_papers_pattern():
    (table,) = build_tables(RecordFile(ROOT / "docs" / "results" / "digits.jsonl").read())
    assert table.columns == [5, 10, 20, 50]
    value = {(row, S): table.value(row, S) for row in table.rows for S in table.columns}
    for row in table.rows:
        distances = [value[row, S] for S in table.columns]
        assert distances == sorted(distances, reverse=True)
    for S in (5, 10, 20):
        assert value["σ̂", S] > 2 * max(value[row, S] for row in table.rows if row != "σ̂")
    for S in (5, 10):
        assert value["η=0.0", S] < value["η=1.0", S]


def test_records_name_no_place_of_the_machine_they_were_made_on():
    for path in (ROOT / "docs" / "results").glob("*.jsonl"):
        for record in RecordFile(path).read():
            assert not record["revision"].endswith("+changes")
            config = record.get("config", {"data": {}})
            places = [config.get("checkpoint"), config.get("output_dir"), config["data"].get("root")]
            for place in filter(None, [*places, record.get("checkpoint")]):
                assert not Path(place).is_absolute()


def test_records_of_a_sweep_that_is_not_there_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["update_results.py", f"digits={tmp_path}"])
    with pytest.raises(SystemExit, match=r"error: there are no records .*records\.jsonl"):
        SCRIPT["main"]()


def test_a_table_without_records_is_refused(monkeypatch):
    with pytest.raises(SystemExit, match=r"error: there are no records docs/results/nothing\.jsonl"):
        SCRIPT["render"]("nothing")
