"""Train, evaluate, evaluate again, sample: what a person types, and the files that are there afterwards."""

import csv
import importlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddim.checkpoints import load_model
from ddim.diffusion.spec import SamplerSpec
from ddim.image_io import grid
from ddim.inference import generate
from ddim.inference.compute import ComputeSpec

Run = Callable[..., Any]
METRIC = "fd_digits_classifier_120"
SWEEP = ("-m", "data=digits", "metric=digits_classifier", "n=20", "compute.device=cpu", "output_dir=out")

pytestmark = pytest.mark.integration


def test_training_writes_a_checkpoint_that_describes_itself(training: tuple[Any, Path]) -> None:
    outcome, folder = training
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert outcome.out.splitlines()[-5:] == [
        "checkpoint: training/checkpoints/last.ckpt",
        "samples: training/samples/step_00000004.png",
        "metrics: training/csv/version_0/metrics.csv",
        "next: python scripts/sample.py checkpoint=training/checkpoints/last.ckpt output_dir=outputs/samples/digits",
        "next: python scripts/evaluate.py -m experiment=table_digits checkpoint=training/checkpoints/last.ckpt",
    ]
    assert "step 4 of 4" in outcome.out
    model = load_model(folder / "checkpoints" / "last.ckpt")
    assert (model.step, model.spec.image_shape, model.spec.network_spec.ch) == (4, (1, 8, 8), 16)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step_00000002.png", "step_00000004.png"]
    rows = list(csv.DictReader((folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines()))
    assert {row["step"] for row in rows if row["train/loss"]} == {"1", "3"}


def test_commands_after_a_conditional_training_ask_for_labels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    train = importlib.import_module("train")
    data = SimpleNamespace(labels="classes")
    spec: Any = SimpleNamespace(name="mine", folder=tmp_path, checkpoint_dir=Path("c"), data=data)
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1", "plugins=[my_network]"])
    for data, evaluation in (
        ("digits", "-m experiment=table_digits_guidance checkpoint=c/last.ckpt label=all"),
        # As Hydra got it, and gets it again.
        ("folder", """data=folder 'data.root='"'"'~/x'"'"'' checkpoint=c/last.ckpt label=all dry_run=true"""),
    ):
        runtime, overrides = SimpleNamespace(choices={"data": data}), SimpleNamespace(task=["data.root='~/x'"])
        hydra = SimpleNamespace(runtime=runtime, overrides=overrides)
        monkeypatch.setattr(train.HydraConfig, "get", lambda hydra=hydra: hydra)
        assert train.last_words(spec) == [
            "next: python scripts/sample.py checkpoint=c/last.ckpt label=all output_dir=outputs/samples/mine "
            "'plugins=[my_network]'",
            f"next: python scripts/evaluate.py {evaluation} 'plugins=[my_network]'",
        ]


def test_a_sweep_writes_its_tables_plots_and_grids(sweep: tuple[Any, Path]) -> None:
    outcome, folder = sweep
    assert (outcome.code, outcome.err) == (0, "")
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    names = [(r["label"], r["S"]) for r in records]
    assert names == [("η=0.0", 4), ("η=0.0", 10), ("η=1.0", 4), ("η=1.0", 10)]
    for record in records:
        assert (folder / record["grid"]).is_file()
        line = f"{record['label']} S={record['S']} linear: {METRIC} "
        assert f"{line}{record['metrics'][METRIC]:.4g} (" in outcome.out
    [table] = json.loads((folder / "table.json").read_text())
    values = [float(f"{r['metrics'][METRIC]:.6g}") for r in records]
    assert (table["columns"], table["rows"]) == ([4, 10], {"η=0.0": values[:2], "η=1.0": values[2:]})
    assert len((folder / "table.csv").read_text().splitlines()) == 5
    assert (folder / "table.md").read_text() in outcome.out
    for name in ("table.md", "table.csv", "table.json", "table.tex", f"plot_{METRIC}.png", "report.html"):
        assert (folder / name).is_file()
        assert f"sweep/{name}" in outcome.out
    assert "HYDRA" not in outcome.out
    assert "Launching" not in outcome.out


def no_images(*_: Any, **__: Any) -> None:
    raise AssertionError("images were generated")


def test_a_second_run_computes_only_what_is_missing(
    sweep: tuple[Any, Path], run: Run, sweep_arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(sweep[1], tmp_path / "sweep")
    before = (folder / "records.jsonl").read_bytes()
    table, calls = (folder / "table.md").read_text(), list((folder / "hydra").iterdir())
    monkeypatch.setattr(generate, "generate_batch", no_images)
    outcome = run("evaluate", *sweep_arguments, "output_dir=sweep")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.count("(already in the records)") == 4
    assert table in outcome.out
    assert (folder / "records.jsonl").read_bytes() == before
    assert list((folder / "hydra").iterdir()) == calls  # Hydra starts no jobs for nothing


def test_a_failed_evaluation_does_not_stop_the_others(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("evaluate", *SWEEP, f"checkpoint={checkpoint}", "sampler=ddim,ddpm", "sampler.S=2000,2")
    assert outcome.code == 2
    reason = "sampler: S=2000 steps cannot be chosen from T=1000 times; S must lie in 1..1000."
    assert outcome.err == f"error: {reason} (2 times)\n"
    assert outcome.out.count("S=2000 linear: failed") == 2
    [table] = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["columns"] == [2]
    assert all(values != [None] for values in table["rows"].values())
    assert len(table["rows"]) == 2


def test_a_defect_keeps_its_traceback(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(generate, "generate_batch", no_images)
    outcome = run("evaluate", *SWEEP, f"checkpoint={checkpoint}", "sampler.S=2,3")
    assert outcome.code == 1
    assert outcome.err.count("Traceback (most recent call last)") == 2
    assert outcome.err.count("AssertionError: images were generated") == 2
    assert outcome.err.splitlines()[-1] == "error: unexpected AssertionError, see the traceback above (2 times)"
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_a_traceback_can_be_asked_for(run: Run) -> None:
    outcome = run("sample", "checkpoint=nowhere.ckpt", full_error="1")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: there is no checkpoint nowhere.ckpt")


def test_damaged_records_are_an_error_and_not_a_warning(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records.jsonl").write_text("nonsense\n")
    outcome = run("evaluate", *SWEEP[1:], f"checkpoint={checkpoint}", "sampler.S=2")
    assert outcome.code == 2
    assert outcome.err.startswith("error: out/records.jsonl, line 1, is damaged")
    assert len(outcome.err.splitlines()) == 1


def test_sampling_writes_the_images_of_the_library(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("n=4", "seed=3", "sampler=ddpm", "sampler.S=5", "compute.device=cpu", "output_dir=pictures")
    outcome = run("sample", f"checkpoint={checkpoint}", *arguments)
    assert (outcome.code, outcome.out.splitlines()[-2], outcome.err) == (0, "pictures/grid.png", "")
    model = load_model(checkpoint)
    images = grid(generate.generate(model, SamplerSpec(eta=1.0, S=5), range(4), 3, ComputeSpec("cpu")))
    with Image.open(tmp_path / "pictures" / "grid.png") as picture:
        assert np.abs(np.array(picture).astype(int) - images[0].numpy()).max() <= 1


def test_the_estimated_variance_is_a_file_to_sample_with(run: Run, checkpoint: Path) -> None:
    arguments = (f"checkpoint={checkpoint}", "compute.device=cpu", "output_dir=out")
    outcome = run("estimate_variance", *arguments, "data=digits", "n=3", "sampler=ddim", "sampler.S=4")
    assert (outcome.code, outcome.err) == (0, "")
    *_, path, following = outcome.out.splitlines()
    assert path == "out/digits.json"
    assert following.startswith(
        f"next: python scripts/sample.py checkpoint={checkpoint} sampler=analytic sampler.S=4 sampler.kwargs."
    )
    options = ("sampler=analytic", "sampler.kwargs.file=out/digits.json", "sampler.S=4")
    outcome = run("sample", *arguments, "n=2", *options)
    following = f"next: python scripts/figures.py figure=samples checkpoint={checkpoint}"
    assert (outcome.code, outcome.out.splitlines()[-2:], outcome.err) == (0, ["out/grid.png", following], "")
    outcome = run("sample", *arguments, "n=2", *options, "sampler.S=5", "overwrite=true")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert outcome.err.startswith("error: sampler: the variance at alpha_bar=")


def test_the_variance_of_the_times_of_nfe_is_used_at_them(run: Run, checkpoint: Path) -> None:
    """A rule of two evaluations a step makes fewer steps of nfe than `analytic` would."""
    arguments = (f"checkpoint={checkpoint}", "compute.device=cpu", "data=digits", "n=2", "output_dir=out")
    outcome = run("estimate_variance", *arguments, "sampler=heun", "sampler.S=null", "sampler.nfe=5")
    assert (outcome.code, outcome.err) == (0, "")
    _, script, *words = shlex.split(outcome.out.splitlines()[-1].removeprefix("next: "))
    assert script == "scripts/sample.py"
    assert "sampler.S=3" in words
    assert run("sample", *words, "compute.device=cpu", "n=2").code == 0


def test_the_variance_of_all_times_is_for_any_sampler(run: Run, checkpoint: Path) -> None:
    outcome = run("estimate_variance", f"checkpoint={checkpoint}", "compute.device=cpu", "data=digits", "n=2")
    assert (outcome.code, outcome.err) == (0, "")
    *_, path, following = outcome.out.splitlines()
    words = f"checkpoint={checkpoint} sampler=analytic sampler.kwargs.file={path}"
    assert following == f"next: python scripts/sample.py {words}"


def test_device_auto_is_one_that_works(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("sample", f"checkpoint={checkpoint}", "n=2", "sampler.S=2", "compute.device=auto", "format=png")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(list((tmp_path / "outputs" / "samples").glob("*.png"))) == 2


@pytest.mark.parametrize(("there", "device"), [("xpu", "xpu"), ("mps", "cpu"), (None, "cpu")])
def test_device_auto_is_an_accelerator_with_float64(
    run: Run, monkeypatch: pytest.MonkeyPatch, there: str | None, device: str
) -> None:
    from _cli import pick_device  # on the path by the fixture

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device(there or "cpu"))
    compute: dict[str, Any] = {"device": "auto", "n": 1}
    pick_device(compute, "device")
    assert compute == {"device": device, "n": 1}
    compute["device"] = "auto"
    pick_device(compute, "device", without_float64=True)  # for the network alone
    assert compute["device"] == (there or "cpu")
    for untouched in ({}, None, {"device": "cuda:1"}):
        values = dict(untouched) if untouched is not None else None
        pick_device(values, "device")
        assert values == untouched


def test_nearest_training_images_are_one_command(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = (f"checkpoint={checkpoint}", "compute.device=cpu", "compute=exact", "sampler.S=2", "n=2", "k=1")
    outcome = run("figures", "figure=nearest", "data=digits", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    picture, tensors, _, samples, others, following = outcome.out.splitlines()
    assert [picture, tensors] == [f"outputs/figures/model/nearest.{kind}" for kind in ("png", "safetensors")]
    assert (tmp_path / picture).is_file()
    assert samples.startswith("pixels, 2 samples: ")
    assert others.startswith("pixels, 1,000 training images: ")
    assert following.startswith("next: python scripts/figures.py figure=nearest ")


def test_figures_are_one_command(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    arguments = (f"checkpoint={checkpoint}", "compute.device=cpu", "sampler.S=3", "S=[2,3]", "n=4", "points=3")
    outcome = run("figures", "figure=all", "name=mine", *arguments)
    assert (outcome.code, outcome.err) == (0, "")
    chosen, *written, following = outcome.out.splitlines()
    assert "chosen: float32" in chosen
    assert following.endswith("n=4 points=3 output_dir=outputs/figures/mine_column figure.width=3.25 figure.format=pdf")
    assert written[:2] == [f"outputs/figures/mine/samples.{kind}" for kind in ("png", "safetensors")]
    assert len(written) == 2 * 6
    assert all((tmp_path / path).is_file() for path in written)
    outcome = run("figures", "figure=x0_strip", "name=mine", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "outputs/figures/mine/x0_strip.png exists already" in outcome.err
    outcome = run(
        *shlex.split(following.partition("scripts/")[2].replace(".py", "").replace("figure=all", "figure=x0_strip"))
    )
    assert (outcome.code, outcome.err) == (0, "")
    made = [f"outputs/figures/mine_column/x0_strip.{kind}" for kind in ("pdf", "safetensors")]
    assert outcome.out.splitlines()[1:] == made
