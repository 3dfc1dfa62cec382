"""Import and export as commands, with sampling and evaluation in between; memory and time of an import."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from made_records import record
from PIL import Image
from small import NETWORK, SPEC, weights

from ddim.checkpoints import load_model
from ddim.networks import UNetSpec
from ddim.training.checkpoints import AtomicCheckpointIO

pytestmark = pytest.mark.integration
Run = Callable[..., Any]
METRIC = ("data=digits", "metric=digits_classifier", "n=20", "grid=0")
EVALUATE = (*METRIC, "sampler.S=2", "compute.device=cpu", "output_dir=out")


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """A flat file of a small network, in the folder that the commands run in."""
    torch.save(weights(SPEC), tmp_path / "flat.ckpt")
    return tmp_path / "flat.ckpt"


def names(folder: Path) -> set[str]:
    """Return all files and folders below one, without what Hydra keeps in the output folder of other scripts."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return {path.as_posix() for path in paths if "hydra" not in path.parts}


def test_import_and_export_write_only_their_output(run: Run, flat: Path, tmp_path: Path) -> None:
    outcome = run("import_checkpoint", "checkpoint=flat.ckpt", "output_dir=.", "name=model", *NETWORK)
    assert outcome.code == 0, outcome.err
    state = weights(SPEC)
    count = sum(value.numel() for value in state.values())
    lines = outcome.out.splitlines()
    assert lines[0].startswith("source: flat.ckpt (layout flat, SHA-256 ")
    assert lines[2] == f"network: the given network, {count:,} parameters, every name and shape checked"
    assert lines[-2:] == [
        "model file: model.safetensors",
        "sample from it: python scripts/sample.py checkpoint=model.safetensors",
    ]
    assert outcome.err == (
        "warning: the file does not state whether its weights are EMA or online, so every result will be labelled "
        "unlabelled; state it with weights=ema or weights=online.\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"flat.ckpt", "model.safetensors"}
    loaded = load_model(tmp_path / "model.safetensors").network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())

    outcome = run("export_checkpoint", "checkpoint=model.safetensors", "output_dir=folder")
    files = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "README.md",
        "model_index.json",
    ]
    *paths, last = outcome.out.splitlines()
    assert (outcome.code, paths, outcome.err) == (0, [f"folder/{name}" for name in files], "")
    assert last.startswith("next: python -c 'from diffusers import DDIMPipeline")
    folders = {"flat.ckpt", "model.safetensors", "folder", "folder/unet", "folder/scheduler"}
    paths = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert paths == folders | {f"folder/{name}" for name in files}


def test_a_foreign_file_becomes_a_model_card_with_results(run: Run, flat: Path, tmp_path: Path) -> None:
    """Import, sample, evaluate, export, and in again: the same images, and the number of the record in the card."""
    assert run("import_checkpoint", "checkpoint=flat.ckpt", "output_dir=.", "name=model", *NETWORK).code == 0
    sample = ("n=4", "sampler.S=2", "compute.device=cpu")
    assert run("sample", "checkpoint=model.safetensors", "output_dir=one", *sample).code == 0
    outcome = run("evaluate", "checkpoint=model.safetensors", *EVALUATE)
    assert (outcome.code, outcome.err) == (0, "")
    [record] = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert record["model"]["weights"] == "unlabelled"
    assert record["model"]["step"] is None
    assert record["model"]["weights_hash"] == load_model("model.safetensors").weights_hash
    value = record["metrics"]["fd_digits_classifier_20"]
    before = names(tmp_path)

    outcome = run("export_checkpoint", "checkpoint=model.safetensors", "output_dir=folder", "records=out/records.jsonl")
    assert (outcome.code, outcome.err) == (0, "")
    card = (tmp_path / "folder" / "README.md").read_text(encoding="utf-8")
    [row] = [line for line in card.splitlines() if line.startswith("| fd_digits_classifier_20 |")]
    assert row.startswith(f"| fd_digits_classifier_20 | η=0.0 S=2 | {value:.4g} | ")
    assert "20 images against" in row
    assert "unlabelled weights" in row
    [index] = yaml.safe_load(card.split("---")[1])["model-index"]
    assert [metric["value"] for result in index["results"] for metric in result["metrics"]] == [value]
    assert {name.split("/")[0] for name in names(tmp_path) - before} == {"folder"}

    before = names(tmp_path)
    assert run("import_checkpoint", "checkpoint=folder", "output_dir=.", "name=again", "weights=ema").code == 0
    assert names(tmp_path) - before == {"again.safetensors"}
    assert run("sample", "checkpoint=again.safetensors", "output_dir=two", *sample).code == 0
    assert (tmp_path / "one" / "grid.png").read_bytes() == (tmp_path / "two" / "grid.png").read_bytes()


def test_a_model_card_names_what_the_columns_are(run: Run, tmp_path: Path) -> None:
    made = [record("η=0.0", 5, 9.0), record("Heun", 3, 8.0, nfe=5)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    from export_checkpoint import results  # type: ignore[import-not-found]

    stated = results("records.jsonl", made[0]["model"]["weights_hash"])
    assert [result.sampler for result in stated] == ["η=0.0 NFE=5", "Heun NFE=5"]


@pytest.mark.parametrize("label", ["ema", "online"])
def test_the_stated_label_is_in_every_record(run: Run, flat: Path, tmp_path: Path, label: str) -> None:
    outcome = run("import_checkpoint", "checkpoint=flat.ckpt", *NETWORK, f"weights={label}")
    assert (outcome.code, outcome.err) == (0, "")
    made = "outputs/imported/flat.safetensors"
    [line] = [line for line in outcome.out.splitlines() if line.startswith("sample from it: ")]
    command = line.removeprefix("sample from it: python scripts/sample.py ").split()
    assert command == [f"checkpoint={made}", *(["weights=online"] if label == "online" else [])]
    # The line that is printed is a command that works.
    assert run("sample", *command, "n=2", "sampler.S=1", "compute.device=cpu", "output_dir=pictures").code == 0
    assert (tmp_path / "pictures" / "grid.png").is_file()
    assert run("evaluate", *command, *EVALUATE).code == 0
    [record] = [json.loads(text) for text in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert record["model"]["weights"] == {"ema": "ema", "online": "raw"}[label]  # the old word, in old records too


def test_the_printed_commands_work_for_any_path_and_label(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint)
    ema = content["callbacks"]["EMA"]
    content |= {"callbacks": {"EMA": ema | {"others": {"0.9": ema["shadow"]}}}}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    for label in ("ema", "ema_0.9", "online"):
        arguments = ("checkpoint=a.ckpt", "output_dir=my models", f"name=my {label}", f"weights={label}")
        outcome = run("import_checkpoint", *arguments)
        assert (outcome.code, outcome.err) == (0, "")
        [line] = [line for line in outcome.out.splitlines() if line.startswith("sample from it: ")]
        python, script, *words = shlex.split(line.removeprefix("sample from it: "))
        assert (python, script) == ("python", "scripts/sample.py")
        assert words == [f"checkpoint=my models/my {label}.safetensors", *[f"weights={label}"] * (label != "ema")]
        done = run("sample", *words, "n=2", "sampler.S=1", "compute.device=cpu", f"output_dir={label}")
        assert (done.code, done.err) == (0, "")


def test_a_file_of_an_export_is_no_model_file(run: Run, checkpoint: Path) -> None:
    """Before, the message listed the names of hundreds of parameters."""
    assert run("export_checkpoint", f"checkpoint={checkpoint}", "output_dir=folder").code == 0
    unet = Path("folder/unet")
    outcome = run("sample", f"checkpoint={unet / 'diffusion_pytorch_model.safetensors'}", "n=2", "output_dir=x")
    assert (outcome.code, outcome.err) == (
        2,
        f"error: the parameters in {unet / 'diffusion_pytorch_model.safetensors'} have diffusers' names; make a model "
        "file of it with scripts/import_checkpoint.py checkpoint=folder, and give that.\n",
    )


def test_a_configured_schedule_is_stored_in_the_model(run: Run, flat: Path) -> None:
    options = ("schedule=cosine", "schedule.T=30", "prediction=v", "trained_on=cats")
    outcome = run("import_checkpoint", "checkpoint=flat.ckpt", "output_dir=.", "name=m", *NETWORK, *options)
    assert "schedule: cosine, T=30; prediction: v" in outcome.out.splitlines()
    spec = load_model("m.safetensors").spec
    assert (spec.schedule.name, spec.schedule.T, spec.prediction, spec.data) == ("cosine", 30, "v", "cats")


def test_flat_export_warns_about_what_it_does_not_store(run: Run, flat: Path, tmp_path: Path) -> None:
    arguments = ("checkpoint=flat.ckpt", "output_dir=.", "name=m", "weights=online")
    assert run("import_checkpoint", *arguments, *NETWORK).code == 0
    outcome = run("export_checkpoint", "checkpoint=m.safetensors", "output_dir=back", "layout=flat", "weights=online")
    assert (outcome.code, outcome.out) == (0, "back/model.pt\n")
    [line] = outcome.err.splitlines()
    assert line.startswith("warning: a flat state dict does not store weights=online, the network, ")
    back = torch.load(tmp_path / "back" / "model.pt", weights_only=True)
    state = weights(SPEC)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())


def test_our_training_checkpoint_is_imported_and_exported(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("import_checkpoint", f"checkpoint={checkpoint}", "output_dir=.", "name=m")
    assert (outcome.code, outcome.err) == (0, "")
    assert "weights: ema at step 4, hash " in outcome.out
    assert load_model("m.safetensors").weights_hash == load_model(checkpoint).weights_hash
    assert run("export_checkpoint", f"checkpoint={checkpoint}", "output_dir=folder").code == 0
    assert run("import_checkpoint", "checkpoint=folder", "output_dir=.", "name=n").code == 0
    assert load_model("n.safetensors").weights_hash == load_model(checkpoint).weights_hash
    assert load_model("n.safetensors").step == 4


# At the published size.

CIFAR10 = UNetSpec((32, 32), ch_mult=(1, 2, 2, 2), dropout=0.1)
MEASURE = """
import resource, sys, time
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint

before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
import_checkpoint(ImportSpec(".", "d", checkpoint=sys.argv[1], name="model"))
seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, (after - before) * (1 if sys.platform == "darwin" else 1024))
"""


def write_full(path: Path, layout: str) -> int:
    """Write a file with CIFAR-10's network; return the bytes of one set of its weights."""
    state = weights(CIFAR10)
    if layout == "official":
        moments = {i: {"step": 1, "exp_avg": v, "exp_avg_sq": v + 1} for i, v in enumerate(state.values())}
        wrapped = {f"module.{name}": value + 1 for name, value in state.items()}
        torch.save([wrapped, {"state": moments, "param_groups": []}, 1, 2, state], path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=layout == "flat")
    return sum(value.numel() for value in state.values()) * 4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["flat", "legacy", "official"])
def test_import_takes_seconds_and_little_memory(tmp_path: Path, layout: str) -> None:
    size = write_full(tmp_path / "x.ckpt", layout)
    assert size == 4 * 35_746_307
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, "x.ckpt"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seconds, growth = map(float, done.stdout.split())
    for path in tmp_path.iterdir():
        path.unlink()
    assert growth < 2.5 * size
    assert seconds < 5  # of this process, whatever else runs on the machine


@pytest.mark.slow
def test_one_command_evaluates_an_imported_file_for_table_1(run: Run, tmp_path: Path) -> None:
    write_full(tmp_path / "flat.ckpt", "flat")
    outcome = run("import_checkpoint", "checkpoint=flat.ckpt", "output_dir=.", "name=m", "weights=ema")
    assert outcome.code == 0, outcome.err
    (tmp_path / "flat.ckpt").unlink()
    [line] = [line for line in outcome.out.splitlines() if line.startswith("evaluate it: ")]
    prefix, command = re.split(r"scripts/evaluate\.py ", line)
    assert re.fullmatch(r"evaluate it: +python ", prefix)
    assert command.split() == ["-m", "experiment=table1_cifar10", "checkpoint=m.safetensors"]
    (tmp_path / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for i in range(4):
        pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    # Two images on two step counts, measured against four pictures, without Inception and without CIFAR-10.
    small = "data=folder data.root=pictures data.size=[32,32] n=2 sampler.S=1,2 grid=0 compute.device=cpu output_dir=t"
    metric = "metric=pixels metric.metrics=[kd] metric.kid_subset_size=2 metric.kid_subsets=1"
    outcome = run("evaluate", *command.split(), *small.split(), *metric.split())
    (tmp_path / "m.safetensors").unlink()
    assert (outcome.code, outcome.err) == (0, "")
    rows = [line.split("|") for line in (tmp_path / "t" / "table.md").read_text().splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows] == ["S", "---", "η=0.0", "η=0.2", "η=0.5", "η=1.0", "σ̂ (clip x0_and_eps)"]
    assert [entry.strip() for entry in rows[0][2:4]] == ["1", "2"]
    assert all(math.isfinite(float(entry)) for row in rows[2:] for entry in row[2:4])  # kd of two images: any sign
    records = [json.loads(text) for text in (tmp_path / "t" / "records.jsonl").read_text().splitlines()]
    assert len(records) == 10
    assert {record["model"]["weights"] for record in records} == {"ema"}
    assert {record["spacing"] for record in records} == {"quad"}
