"""scripts/benchmark/precision.py on the small trained network, and the arithmetic of its table."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
FOLDER = Path(__file__).parents[2] / "scripts" / "benchmark"


@pytest.fixture(autouse=True)
def scripts_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


def test_a_run_compares_the_same_images(run, checkpoint, tmp_path, compiler):
    out = tmp_path / "precision.jsonl"
    words = "--extractor pixels --n 70 --steps 2 --batch 35"
    done = run("benchmark/precision", str(checkpoint), *words.split(), "--out", str(out))
    assert done.code == 0, done.err
    exact, *others = (json.loads(line) for line in out.read_text().splitlines())
    assert [exact["precision"], *(r["precision"] for r in others)] == ["float32", "bf16", "winograd"]
    assert (exact["largest"], exact["mean"]) == (0, 0)
    assert exact["to_fresh"] > 100 * abs(exact["to_float32"])
    by_name = {r["precision"]: r for r in others}
    assert by_name["winograd"]["mean"] <= by_name["bf16"]["mean"]
    assert 0 < by_name["bf16"]["mean"] < 20


def test_the_table_compares_the_effect_with_seed_noise():
    from tables import precision_tables

    common = {"n": 5, "S": 2, "eta": 0.0, "extractor": "pixels", "weights_hash": "0" * 9, "device": "cpu"}
    common |= {"run": "r", "revision": "abc", "seconds": 1.0, "largest": 3, "mean": 0.5, "to_float32": 1e-3}
    lines = [{**common, "precision": "float32", "to_fresh": 2.0}, {**common, "precision": "bf16", "to_fresh": 1.9}]
    assert "| bf16 | 1.0 | 3 | 0.5000 | 1.00e-03 | 1.9000 | 5.00% |" in precision_tables(lines)


def test_a_checkpoint_is_required(run):
    done = run("benchmark/precision")
    assert done.code != 0
    assert "checkpoint" in done.err
