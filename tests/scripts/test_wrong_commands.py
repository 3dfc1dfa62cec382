"""Command lines with a mistake: one line states what was wrong and what is allowed, and no file is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

Run = Callable[..., Any]


class Mistake(NamedTuple):
    """A command, and what its one line must say; CHECKPOINT stands for a good one."""

    script: str
    arguments: str
    says: tuple[str, ...]


SAMPLE = "checkpoint=CHECKPOINT n=4 output_dir=out compute.device=cpu"
FIGURES = "checkpoint=CHECKPOINT output_dir=out compute.device=cpu"
EVALUATE = f"{SAMPLE} data=digits metric=digits_classifier"
TRAIN = "network=unet_digits trainer.max_steps=2 trainer.accelerator=cpu output_dir=out"
FOLDER = "data=folder data.size=[8,8] data.channels=1"

MISTAKES = {
    "figure": Mistake(
        "figures",
        f"{FIGURES} figure=samlpes",
        ("figure='samlpes'", "did you mean samples?", "allowed: samples, consistency"),
    ),
    "S>T in a figure": Mistake(
        "figures", f"{FIGURES} figure=consistency S=[10,2000]", ("sampler: S=2000", "T=1000", "must lie in 1..1000")
    ),
    "odd number for pairs": Mistake(
        "figures", f"{FIGURES} figure=interpolation indices=[1,2,3]", ("pairs of images, not 3", "an even number")
    ),
    "S=0": Mistake("sample", f"{SAMPLE} sampler.S=0", ("S=0", "at least 1")),
    "S>T": Mistake("evaluate", f"{EVALUATE} sampler.S=2000", ("S=2000", "T=1000", "must lie in 1..1000")),
    "S>T while training": Mistake(
        "train", f"{TRAIN} data=digits grid.sampler.S=2000", ("grid.sampler: S=2000", "T=1000")
    ),
    "eta=-1": Mistake("sample", f"{SAMPLE} sampler.eta=-1", ("eta=-1.0", "must lie in [0, 1]")),
    "eta=abc": Mistake("sample", f"{SAMPLE} sampler.eta=abc", ("sampler.eta='abc'", "must be a number, not text")),
    "etta": Mistake(
        "sample", f"{SAMPLE} sampler.etta=1", ("sampler.etta", "did you mean sampler.eta?", "sampler.clip")
    ),
    "etta at the top": Mistake("evaluate", f"{EVALUATE} etta=1", ("unknown key etta", "did you mean sampler.eta?")),
    "+etta": Mistake(
        "sample", f"{SAMPLE} +sampler.etta=1", ("unknown key sampler.etta", "did you mean eta?", "allowed: ")
    ),
    "etta in a sweep": Mistake(
        "evaluate", f"-m {EVALUATE} sampler.etta=0,1", ("sampler.etta", "did you mean sampler.eta?")
    ),
    "key of another option": Mistake(
        "train", f"{TRAIN} data=folder data.in_memry=false", ("data.in_memry", "did you mean data.in_memory?")
    ),
    "samplr": Mistake(
        "sample", f"{SAMPLE} samplr.eta=1", ("unknown key samplr.eta", "did you mean sampler?", "allowed: ")
    ),
    "no checkpoint": Mistake("sample", "checkpoint=nowhere.ckpt", ("no checkpoint nowhere.ckpt", "scripts/train.py")),
    "no checkpoint in a sweep": Mistake(
        "evaluate", f"-m {EVALUATE} checkpoint=nowhere.ckpt sampler.S=2,3", ("no checkpoint nowhere.ckpt", "(2 times)")
    ),
    "truncated checkpoint": Mistake("sample", f"{SAMPLE} checkpoint=cut.ckpt", ("cut.ckpt", "cut short")),
    "text as checkpoint": Mistake("sample", f"{SAMPLE} checkpoint=file", ("file cannot be read as a checkpoint",)),
    "checkpoint not given": Mistake("evaluate", "data=digits", ("checkpoint is required", "add checkpoint=...")),
    "checkpoint not given in a sweep": Mistake("evaluate", "-m sampler.S=2,3", ("checkpoint is required",)),
    "wrong size": Mistake(
        "evaluate",
        f"{EVALUATE} {FOLDER} data.size=[16,16] data.root=large metric=pixels",
        ("(1, 8, 8)", "(1, 16, 16)", "choose the data the model was trained on"),
    ),
    "wrong size of files": Mistake(
        "evaluate", f"{EVALUATE} {FOLDER} data.root=large", ("0.png is 16 x 16", "data.size=[8, 8]", "data.resize=true")
    ),
    "wrong size while training": Mistake(
        "train", f"{TRAIN} {FOLDER} data.root=large", ("is 16 x 16", "data.resize=true")
    ),
    "empty folder": Mistake("train", f"{TRAIN} {FOLDER} data.root=empty", ("empty holds no images", ".png")),
    "folder that is not there": Mistake("train", f"{TRAIN} {FOLDER} data.root=no", ("no does not exist", "data.root")),
    "text in the folder": Mistake("train", f"{TRAIN} {FOLDER} data.root=text", ("text/notes.txt", "move them away")),
    "folder not given": Mistake("train", f"{TRAIN} {FOLDER}", ("data.root is required", "add data.root=...")),
    "data=cifar11": Mistake(
        "train", f"{TRAIN} data=cifar11", ("data=cifar11", "did you mean cifar10?", "allowed: celeba, cifar10, digits")
    ),
    "data.name=cifar11": Mistake(
        "train",
        f"{TRAIN} data=digits data.name=cifar11",
        ("unknown data set 'cifar11'", "did you mean cifar10?", "lsun"),
    ),
    "experiment": Mistake(
        "train", "experiment=digitz", ("experiment=digitz", "did you mean digits?", "allowed: bedroom")
    ),
    "n=0": Mistake("evaluate", f"{EVALUATE} n=0", ("n=0 must be at least 1",)),
    "n=0 samples": Mistake("sample", f"{SAMPLE} n=0", ("n=0 must be at least 1",)),
    "output below a file": Mistake(
        "sample", f"{SAMPLE} output_dir=file/out", ("cannot write to file/out", "output_dir=")
    ),
    "records below a file": Mistake("evaluate", f"{EVALUATE} output_dir=file/out", ("cannot write to", "output_dir=")),
    "training below a file": Mistake(
        "train", f"{TRAIN} data=digits output_dir=file/out", ("cannot write to", "output_dir=")
    ),
    "channels": Mistake("train", f"{TRAIN} data=digits network.channels=3", ("(3, 8, 8)", "(1, 8, 8)", "to the data")),
    "channels of files": Mistake("train", f"{TRAIN} {FOLDER} data.root=colour", ("in colour", "set data.channels=3")),
    "channels of the reference": Mistake(
        "evaluate",
        f"{EVALUATE} {FOLDER} data.root=colour data.channels=3 metric=pixels",
        ("(1, 8, 8)", "(3, 8, 8)", "choose the data"),
    ),
    "resume from another model": Mistake(
        "train",
        f"{TRAIN} data=digits checkpoint=CHECKPOINT",
        ("another model", "network.ch: 16 and 32", "cannot resume", "choose another name"),
    ),
    "eta for sigma_hat": Mistake(
        "sample", f"{SAMPLE} sampler=sigma_hat sampler.eta=0.5", ("eta=0.5 does not go with rule=sigma_hat", "has none")
    ),
    "seed=abc": Mistake("sample", f"{SAMPLE} seed=abc", ("seed='abc'", "must be an integer, not text")),
    "seed=-1": Mistake("evaluate", f"{EVALUATE} seed=-1", ("seed=-1 must lie in 0 .. 2**64 - 1",)),
    "text for a list": Mistake("evaluate", f"{EVALUATE} metric.metrics=fd", ("metric.metrics='fd' must be a list",)),
    "no such device": Mistake("sample", f"{SAMPLE} compute.device=abacus", ("device=abacus", "cpu always can")),
    "sweep without -m": Mistake("sample", f"{SAMPLE} sampler.S=5,6", ("sampler.S=5,6", "--multirun")),
    "no equals sign": Mistake("sample", f"{SAMPLE} seed", ("the argument 'seed' cannot be read", "write key=value")),
    "ckpt_path": Mistake(
        "train", f"{TRAIN} data=digits ckpt_path=last", ("ckpt_path is called checkpoint now; write",)
    ),
    "source": Mistake("import_checkpoint", "source=PATH", ("source is called checkpoint now; write checkpoint=...",)),
    "out of an import": Mistake("import_checkpoint", "checkpoint=PATH out=x", ("out is called output_dir now",)),
    "out of an export": Mistake("export_checkpoint", "checkpoint=PATH out=x", ("out is called output_dir now",)),
    "digits_sweep": Mistake("evaluate", "-m experiment=digits_sweep", ("experiment=table_digits now",)),
    "open bracket": Mistake("train", f"{TRAIN} data.size=[8", ("the argument 'data.size=[8' cannot be read",)),
}


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """The working folder of a command, with everything that the mistakes above need."""
    for name, mode, side in (("large", "L", 16), ("colour", "RGB", 8)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new(mode, (side, side)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "text" / "0.png")
    (tmp_path / "text" / "notes.txt").write_text("not an image")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    return tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_line(name: str, run: Run, folder: Path, checkpoint: Path) -> None:
    mistake = MISTAKES[name]
    before = {path for path in folder.rglob("*") if path.is_file()}
    outcome = run(mistake.script, *mistake.arguments.replace("CHECKPOINT", str(checkpoint)).split())
    print(f"{name}: {outcome.err}")  # shown by pytest -rP, and when the test fails
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert [part for part in mistake.says if part not in line] == []
    assert "weights_only" not in line  # torch advises to turn the safe loader off
    assert "Traceback" not in outcome.out
    made = {path for path in folder.rglob("*") if path.is_file()} - before
    assert [path for path in made if "hydra" not in path.parts] == []


def test_each_mistake_of_a_sweep_is_one_line(run: Run, folder: Path, checkpoint: Path) -> None:
    arguments = f"-m {EVALUATE} sampler.S=0,2000".replace("CHECKPOINT", str(checkpoint)).split()
    outcome = run("evaluate", *arguments)
    assert outcome.code == 2
    assert [line.split()[:3] for line in outcome.err.splitlines()] == [
        ["error:", "sampler:", "S=0"],
        ["error:", "sampler:", "S=2000"],
    ]


@pytest.mark.integration
def test_a_process_prints_the_same(process: Run, folder: Path, checkpoint: Path) -> None:
    outcome = process("sample", f"checkpoint={checkpoint}", "sampler.S=2000", "output_dir=out", cwd=folder)
    expected = "error: sampler: S=2000 steps cannot be chosen from T=1000 times; S must lie in 1..1000.\n"
    assert outcome == (2, "", expected)
