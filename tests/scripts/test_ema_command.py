"""Averages of several lengths of one training, evaluated into one table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]

pytestmark = pytest.mark.integration


def test_lengths_of_one_training_share_a_table(run: Run, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    last = tmp_path / "mine" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    content = torch.load(make_checkpoint(last), weights_only=True)
    shadow = content["callbacks"]["EMA"]["shadow"]
    other = {name: 1.01 * value for name, value in shadow.items()}
    content["posthoc_ema"] = {"start": 0, "averages": {"0.05": shadow, "0.15": other}}
    torch.save(content, last)
    made = run("ema", "checkpoint=mine/checkpoints/last.ckpt", "length=[0.05,0.15]")
    assert (made.code, made.err) == (0, "")
    paths = [f"outputs/ema/mine_step_4_length_{length}.safetensors" for length in ("0.05", "0.15")]
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

    imported = run("import_checkpoint", f"checkpoint={paths[0]}")
    assert (imported.code, imported.err) == (0, "")
    assert "weights: posthoc_0.05 at step 4" in imported.out

    far = run("ema", "checkpoint=mine/checkpoints/last.ckpt", "length=0.25")
    assert far.code == 0
    assert far.err.startswith("warning: length 0.25: the nearest profile that can be made of the snapshots differs by ")
    again = run("ema", "checkpoint=mine/checkpoints/last.ckpt", "length=0.05")
    assert again.code == 2
    assert again.err.startswith(f"error: {paths[0]} exists already")
