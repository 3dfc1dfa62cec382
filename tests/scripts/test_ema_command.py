"""Averages of several lengths of one training, evaluated into one table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

pytestmark = pytest.mark.integration


def test_lengths_of_one_training_share_a_table(run: Run, tmp_path: Path) -> None:
    small = ("network.ch=16", "network.num_groups=4", "trainer.max_steps=3", "trainer.batch_size=4", "trainer.log_every=1")
    trained = run("train", "experiment=digits", *small, "ema.posthoc=true", "eval.every=0", "grid.every=0", "output_dir=mine")
    assert (trained.code, trained.err) == (0, "")
    made = run("ema", "checkpoint=mine/checkpoints/last.ckpt", "length=[0.05,0.15]")
    assert (made.code, made.err) == (0, "")
    paths = [f"outputs/ema/mine_step_3_length_{length}.safetensors" for length in ("0.05", "0.15")]
    lines = made.out.splitlines()
    assert lines[0].startswith(f"{paths[0]}: length 0.05, relative error of its profile ")
    assert lines[2] == f"next: python scripts/sample.py checkpoint={paths[0]}"
    assert (tmp_path / paths[1]).exists()

    options = ("data=digits", "metric=digits_classifier", "n=2", "grid=0", "sampler.S=2", "output_dir=out")
    evaluated = run("evaluate", "-m", f"checkpoint={','.join(paths)}", *options, "compute.device=cpu")
    assert (evaluated.code, evaluated.err) == (0, "")
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert sorted(record["model"]["weights"] for record in records) == ["posthoc_0.05", "posthoc_0.15"]
    [*rows] = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("| η")]
    assert [row.split(" | ")[0] for row in rows] == [f"| η=0.0, {Path(path).stem}" for path in paths]

    far = run("ema", "checkpoint=mine/checkpoints/last.ckpt", "length=0.25")
    assert far.code == 0
    assert far.err.startswith("warning: length 0.25: the nearest profile that can be made of the snapshots differs by ")
    again = run("ema", "checkpoint=mine/checkpoints/last.ckpt", "length=0.05")
    assert again.code == 2
    assert again.err.startswith(f"error: {paths[0]} exists already")
