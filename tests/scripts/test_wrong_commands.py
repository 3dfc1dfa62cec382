"""Wrong commands end with one line that states what was wrong and what is allowed, and write no file."""

import dataclasses
import errno
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small import NETWORK, SPEC, weights

from ddim import linear_schedule, zero_terminal_snr
from ddim.checkpoints import ModelSpec, StoredModel, save_model
from ddim.networks import build_network
from ddim.networks.categorical import CategoricalUNetSpec

pytestmark = pytest.mark.integration
Run = Callable[..., Any]

OPTIONS = "checkpoint=tiny.ckpt n=4 output_dir=out compute.device=cpu"
# Written in capitals below. The model of the checkpoint has T=50, that of training T=1000.
SHORT = {
    "EVALUATE": f"evaluate {OPTIONS} data=digits metric=digits_classifier",
    "SWEEP": f"evaluate -m {OPTIONS} data=digits metric=digits_classifier",
    "SAMPLE": f"sample {OPTIONS}",
    "VARIANCE": "estimate_variance checkpoint=tiny.ckpt data=digits output_dir=out compute.device=cpu",
    "ENCODE": "encode source=small output_dir=out compute.device=cpu",
    "RECONSTRUCT": f"reconstruct {OPTIONS} data=digits",
    "LIKELIHOOD": f"likelihood {OPTIONS} data=digits",
    "SOLVER_ERROR": f"solver_error {OPTIONS}",
    "SEARCH_TAU": f"search_tau {OPTIONS}",
    "FIGURES": "figures checkpoint=tiny.ckpt output_dir=out compute.device=cpu",
    "TRAIN": "train network=unet_digits trainer.max_steps=2 trainer.accelerator=cpu output_dir=out",
    "FOLDER": "data=folder data.size=[8,8] data.channels=1",
    "METRICS": "metrics data=digits metric=digits_classifier device=cpu",
    "IMPORT": f"import_checkpoint checkpoint=flat.ckpt {' '.join(NETWORK)}",
    "EXPORT": "export_checkpoint checkpoint=m.safetensors output_dir=x",
}

# Each line: a command -> what its one line states | and states.
MISTAKES = Path(__file__).with_name("wrong_commands.txt").read_text(encoding="utf-8")
ROWS = [row.split(" -> ") for row in re.sub(r"\\\n\s*", "", MISTAKES).replace("OS.", f"{os.name}.").splitlines() if row]


def words(command: str) -> list[str]:
    """Return script and arguments of a command."""
    return " ".join(SHORT.get(word, word) for word in command.split()).split()


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Path:
    """A folder with everything that the mistakes need."""
    folder = tmp_path_factory.mktemp("template")
    for name in ("large", "colour", "mixed", "empty", "dir.safetensors"):
        (folder / name).mkdir()
    for name, mode, side in (("large", "L", 16), ("colour", "RGB", 8), ("mixed", "L", 8)):
        for i in range(3):
            Image.new(mode, (side, side)).save(folder / name / f"{i}.png")
    (folder / "mixed" / "notes.txt").write_text("not an image")
    (folder / "text").write_text("no checkpoint\n")
    for name in ("none.jsonl", "model.pt"):
        (folder / name).touch()
    make_checkpoint(folder / "conditional.ckpt", classes=("cat", "dog", "frog"))
    content = make_checkpoint(folder / "tiny.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(content[: len(content) // 2])
    torch.save(weights(SPEC), folder / "flat.ckpt")
    model = StoredModel(ModelSpec("unet", SPEC, linear_schedule()), weights(SPEC), "ema", None)
    save_model(model, folder / "m.safetensors")
    zero_snr = ModelSpec("unet", SPEC, zero_terminal_snr(linear_schedule()))
    save_model(StoredModel(zero_snr, weights(SPEC), "ema", None), folder / "zero_snr.safetensors")
    network = CategoricalUNetSpec(**dataclasses.asdict(SPEC), categories=3)
    categorical = ModelSpec("categorical_unet", network, linear_schedule(), "x0")
    state = build_network("categorical_unet", network).state_dict()
    save_model(StoredModel(categorical, state, "ema", None), folder / "categorical.safetensors")
    torch.save({"a": Evil()}, folder / "evil.ckpt")
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """The working folder of a command."""
    return shutil.copytree(template, tmp_path, dirs_exist_ok=True)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file, and None for a folder; without those that Hydra makes, and without a lock."""
    left_out = {one for path in folder.rglob("hydra") for one in (path, *path.parents, *path.rglob("*"))}
    left_out |= {*folder.rglob(".lock")}
    return {str(path): path.read_bytes() if path.is_file() else None for path in {*folder.rglob("*")} - left_out}


@pytest.mark.parametrize(("command", "expected"), ROWS, ids=[command for command, _ in ROWS])
def test_a_mistake_is_one_clear_line(command: str, expected: str, run: Run, folder: Path) -> None:
    before = tree(folder)
    outcome = run(*words(command))
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert [phrase for phrase in expected.split(" | ") if phrase not in line] == []
    assert "weights_only" not in line  # torch advises to turn the safe loader off
    assert "Traceback" not in outcome.out
    assert outcome.out == "" or "_checkpoint" not in command
    after = tree(folder)
    if command.startswith("TRAIN"):
        after.pop(str(folder / "out" / "checkpoints"), None)  # an empty folder, to see whether it can be written to
    assert after == before


def test_each_mistake_of_a_sweep_is_one_line(run: Run, folder: Path) -> None:
    outcome = run(*words("SWEEP sampler.S=0,2000"))
    assert outcome.code == 2
    assert [line.split()[:3] for line in outcome.err.splitlines()] == [
        ["error:", "sampler:", "S=0"],
        ["error:", "sampler:", "S=2000"],
    ]


NAMED = ("train experiment=digits", "evaluate checkpoint=x", "figures figure=all checkpoint=x", "import_checkpoint")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *((command, "../../x") for command in NAMED),
        *((NAMED[0], name) for name in ("", "..", "../${checkpoint}", "a,../x")),
    ],
)
def test_a_name_is_no_path(command: str, name: str, run: Run, tmp_path: Path) -> None:
    outcome = run(*command.split(), *["-m"] * ("," in name), f"name={name}")
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert "must be a file name without a folder; choose that by output_dir=..." in line
    assert list(tmp_path.iterdir()) == []  # not even Hydra's folder


# The text of an experiment -> what the one line states.
EXPERIMENTS = {
    "name: x": "configs/experiment/mine.yaml: its first line must be '# @package _global_'",
    "# mine\n# @package _global_\nname: x": "its first line must be '# @package _global_'",
    "# @package _global_\ndefaults:\n  - override /schedul: linear": "does not have (did you mean schedule?)",
    "# @package _global_\ndefaults:\n  - override /data: [digits, folder]": "data is null or a list in the experiment",
    "# @package _global_\ndefaults:\n  - override /data: digit": "unknown option data=digit (did you mean digits?)",
    "# @package _global_\nhydra: {swepeer: 1}": "Key 'swepeer' not in 'HydraConf'",
    "# @package _global_\nhydra: {sweeper: {params: {seed: 'range(1,0)'}}}": "there is no value to sweep over",
    "# @package _global_\nnull: 3": "cannot be composed",
    "# @package _global_\nname: [x": "not valid YAML",
    "# @package _global_\nname: a/b": "name='a/b' must be a file name",
    "# @package _global_\ntrianer: {max_steps: 1}": "unknown key trianer (did you mean trainer?)",
}


@pytest.mark.parametrize("text", EXPERIMENTS)
def test_a_wrong_experiment_is_one_clear_line(text: str, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(Path(__file__).parents[2] / "configs", configs)
    for module in ("_cli", "_jobs", "_messages", "_overrides"):
        monkeypatch.setattr(f"{module}.CONFIGS", configs)
    (configs / "experiment" / "mine.yaml").write_text(text)
    outcome = run("train", "experiment=mine")
    assert outcome.code == 2
    [line] = outcome.err.splitlines()
    assert line.startswith("error: ")
    assert EXPERIMENTS[text] in line


def test_a_full_disk_is_named_before_the_first_job(run: Run, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hydra.core.utils._save_config", full)
    outcome = run("train", "experiment=digits")
    assert (outcome.code, outcome.err) == (
        2,
        "error: cannot write to the folder of the run (No space left on device); make room.\n",
    )


def test_the_home_folder_is_known_in_every_path(run: Run, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    shutil.copytree(folder / "large", folder / "home" / "images")
    (folder / "tiny.ckpt").rename(folder / "home" / "tiny.ckpt")
    outcome = run(*words("SAMPLE checkpoint=~/tiny.ckpt output_dir='~/out' sampler.S=2"))
    assert (outcome.code, outcome.err) == (0, "")
    assert (folder / "home" / "out" / "grid.png").exists()
    assert not (folder / "~").exists()
    assert (folder / "home" / "out" / "hydra").exists()


def test_a_process_prints_one_line_and_leaves_no_file(process: Run, folder: Path) -> None:
    (folder / "newer.ckpt").write_bytes(pickle.dumps({"a": Evil()}, 4))
    before = tree(folder)
    outcome = process("sample", "checkpoint=tiny.ckpt", "sampler.S=2000", "output_dir=out", cwd=folder)
    expected = "error: sampler: S=2000 steps cannot be chosen from T=50 times; S must lie in 1..50.\n"
    assert outcome == (2, "", expected)
    outcome = process("import_checkpoint", "checkpoint=newer.ckpt", cwd=folder)
    assert (outcome.code, outcome.out) == (2, "")
    [line] = outcome.err.splitlines()
    assert line.startswith("error: newer.ckpt")
    assert tree(folder) == before
