"""Import and export with a mistake: one line says what was wrong, and nothing was made."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small import NETWORK, SPEC, weights

from ddim import linear_schedule
from ddim.checkpoints import ModelSpec, StoredModel, save_model

Run = Callable[..., Any]


class Mistake(NamedTuple):
    """A command, and what its one line must say."""

    script: str
    arguments: str
    says: tuple[str, ...]


FLAT = f"checkpoint=flat.ckpt {' '.join(NETWORK)}"
MISTAKES = {
    "neither": Mistake("import_checkpoint", "", ("give either checkpoint=PATH or download=NAME", "ema_cifar10")),
    "both": Mistake(
        "import_checkpoint",
        "checkpoint=flat.ckpt download=ema_cifar10",
        ("give either checkpoint=PATH or download=NAME",),
    ),
    "preset": Mistake(
        "import_checkpoint",
        "checkpoint=flat.ckpt preset=cifar",
        ("unknown preset 'cifar'", "did you mean cifar10?", "allowed: cifar10, celeba, lsun"),
    ),
    "preset and network": Mistake("import_checkpoint", f"{FLAT} preset=lsun", ("either preset or network",)),
    "download": Mistake(
        "import_checkpoint", "download=ema_cifar", ("unknown download 'ema_cifar'", "did you mean ema_cifar10?")
    ),
    "no such source": Mistake("import_checkpoint", "checkpoint=nowhere.ckpt", ("nowhere.ckpt",)),
    "no such layout": Mistake(
        "import_checkpoint", f"{FLAT} layout=offical", ("layout='offical'", "did you mean official?")
    ),
    "another layout": Mistake("import_checkpoint", f"{FLAT} layout=official", ("the layout flat, not official",)),
    "no such weights": Mistake("import_checkpoint", f"{FLAT} weights=mean", ("weights='mean'", "auto, ema, online")),
    "no such key": Mistake(
        "import_checkpoint", "chekpoint=flat.ckpt", ("unknown key chekpoint", "did you mean checkpoint?")
    ),
    "no such network": Mistake(
        "import_checkpoint",
        "checkpoint=flat.ckpt network=unet_digit",
        ("network=unet_digit", "did you mean unet_digits?"),
    ),
    "network without a size": Mistake(
        "import_checkpoint", "checkpoint=flat.ckpt network=unet_digits", ("network.image_size",)
    ),
    "no such key of the network": Mistake(
        "import_checkpoint", f"{FLAT} network.chh=3", ("unknown key network.chh", "did you mean network.ch?")
    ),
    "number as text": Mistake("import_checkpoint", f"{FLAT} network.ch=wide", ("network.ch='wide'", "an integer")),
    "not the network": Mistake(
        "import_checkpoint",
        f"{FLAT} network.ch=32",
        ("flat.ckpt do not fit the given network", "of the wrong shape", "instead of (32,"),
    ),
    "no preset fits": Mistake(
        "import_checkpoint", "checkpoint=flat.ckpt", ("do not fit the nearest, preset ", "missing")
    ),
    "betas": Mistake("import_checkpoint", f"{FLAT} schedule=custom", ("schedule.betas is required",)),
    "text": Mistake("import_checkpoint", "checkpoint=text", ("text cannot be read as a checkpoint",)),
    "code": Mistake("import_checkpoint", "checkpoint=evil.ckpt", (f"it needs code to load ({os.name}.system)",)),
    "empty folder": Mistake(
        "import_checkpoint", "checkpoint=empty", ("empty holds nothing", "diffusion_pytorch_model")
    ),
    "there already": Mistake(
        "import_checkpoint", f"{FLAT} output_dir=. name=m", ("m.safetensors exists already", "overwrite=true")
    ),
    "below a file": Mistake("import_checkpoint", f"{FLAT} output_dir=text", ("text",)),
    "a folder in its place": Mistake(
        "import_checkpoint", f"{FLAT} output_dir=. name=dir overwrite=true", ("dir.safetensors",)
    ),
    "nothing to export": Mistake("export_checkpoint", "output_dir=x", ("checkpoint is required",)),
    "nowhere to export to": Mistake("export_checkpoint", "checkpoint=m.safetensors", ("output_dir is required",)),
    "no such checkpoint": Mistake(
        "export_checkpoint", "checkpoint=nowhere.ckpt output_dir=x", ("there is no checkpoint nowhere.ckpt",)
    ),
    "foreign checkpoint": Mistake(
        "export_checkpoint",
        "checkpoint=flat.ckpt output_dir=x",
        ("flat.ckpt is not a checkpoint", "import_checkpoint.py"),
    ),
    "export layout": Mistake(
        "export_checkpoint",
        "checkpoint=m.safetensors output_dir=x layout=flatt",
        ("layout='flatt'", "did you mean flat?"),
    ),
    "records of a flat file": Mistake(
        "export_checkpoint",
        "checkpoint=m.safetensors output_dir=x layout=flat records=text",
        ("layout=flat has no model card",),
    ),
    "no records": Mistake(
        "export_checkpoint",
        "checkpoint=m.safetensors output_dir=x records=nowhere.jsonl",
        ("there is no records file nowhere.jsonl",),
    ),
    "no records of these": Mistake(
        "export_checkpoint",
        "checkpoint=m.safetensors output_dir=x records=none.jsonl",
        ("none.jsonl has no record of these weights", "evaluate them first"),
    ),
    "damaged records": Mistake(
        "export_checkpoint", "checkpoint=m.safetensors output_dir=x records=text", ("text, line 1, is damaged",)
    ),
    "weights that are not there": Mistake(
        "export_checkpoint", "checkpoint=m.safetensors output_dir=x weights=online", ("holds ema weights only",)
    ),
    "export over a file": Mistake(
        "export_checkpoint",
        "checkpoint=m.safetensors output_dir=. layout=flat",
        ("model.pt exists already", "overwrite=true"),
    ),
    "export below a file": Mistake("export_checkpoint", "checkpoint=m.safetensors output_dir=text", ("text",)),
}


class Evil:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.victim}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working folder of a command, with what the mistakes above need."""
    torch.save(weights(SPEC), tmp_path / "flat.ckpt")
    model = StoredModel(ModelSpec("unet", SPEC, linear_schedule()), weights(SPEC), "ema", None)
    save_model(model, tmp_path / "m.safetensors")
    (tmp_path / "text").write_text("no checkpoint\n")
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "model.pt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "dir.safetensors").mkdir()
    torch.save({"a": Evil(tmp_path / "executed")}, tmp_path / "evil.ckpt")
    return tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name: str, run: Run, folder: Path) -> None:
    mistake = MISTAKES[name]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    outcome = run(mistake.script, *mistake.arguments.split())
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert [part for part in mistake.says if part not in line] == []
    assert "weights_only" not in line  # torch advises to turn the safe loader off
    assert outcome.out == ""
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"empty", "dir.safetensors"}


@pytest.mark.integration
@pytest.mark.parametrize("name", ["no such source", "code of a newer protocol"])
def test_a_process_prints_one_line_and_leaves_no_file(name: str, process: Run, tmp_path: Path) -> None:
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"a": Evil(tmp_path / "executed")}, 4))
    source = "nowhere.ckpt" if name == "no such source" else "evil.ckpt"
    outcome = process("import_checkpoint", f"checkpoint={source}", cwd=tmp_path)
    assert (outcome.code, outcome.out) == (2, "")
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert source in line
    assert [path.name for path in tmp_path.iterdir()] == ["evil.ckpt"]
