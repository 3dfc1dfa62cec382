"""--help answers at once, from the configuration alone, and lists what there is to choose."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from composed import SPECS
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "torchvision", "lightning", "torch_fidelity", "matplotlib", "sklearn", "ddim")
PROGRAM = """
import os, runpy, sys
path, *heavy = sys.argv[1:]
sys.argv = [path, "--help"]
sys.path.insert(0, os.path.dirname(path))
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
loaded = [name for name in heavy if name in sys.modules]
print("loaded:", *loaded)
"""

EXPERIMENTS = {
    "train": "bedroom, bedroom_official, celeba, celeba_official, church, church_official, "
    "cifar10, cifar10_conditional, cifar10_iddpm, cifar10_official, cifar10_small, digits, digits_conditional, "
    "digits_multinomial",
    "evaluate": "table1_celeba, table1_cifar10, table1_cifar10_sigma_hat, table3_bedroom, table3_church, "
    "table_cifar10_small, table_digits, table_digits_guidance, table_digits_multinomial, table_solvers_cifar10, "
    "table_solvers_digits",
}

pytestmark = pytest.mark.integration


def compose_any(script: str) -> DictConfig:
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return hydra.compose(script, return_hydra_config=True)


def show_help(script: str) -> str:
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "scripts" / f"{script}.py"), *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "figures"])
def test_help_lists_the_groups_without_loading_torch(script: str) -> None:
    text = show_help(script)
    assert text.splitlines()[-1] == "loaded:"
    groups = {
        "train": ["data", "network", "sampler@grid.sampler", "trainer", "debug"],
        "sample": ["compute", "sampler"],
        "evaluate": ["data", "metric", "sampler"],
        "figures": ["sampler", "data", "metric"],
    }
    for key in groups[script]:
        options = sorted(path.stem for path in (ROOT / "configs" / key.partition("@")[0]).glob("*.yaml"))
        assert f"\n{key}: {', '.join(options)}\n" in text
    assert ("\nnetwork: " in text) == (script == "train")
    assert re.search("\nexperiment: (.*)|$", text)[1] == EXPERIMENTS.get(script)
    assert f"python scripts/{script}.py" in text
    lines = {
        "train": "trainer.keep_last=2 newest checkpoints; if the last is damaged, a run resumes from the one before",
        "sample": "checkpoint=... (required) path of the model",
        "evaluate": "repeats=1 3 measures on three sets of n images that do not overlap: mean and spread",
        "figures": "figure.width=6.5 inches on paper, labels of 8 points; 3.25 for a column",
    }
    assert lines[script] in " ".join(text.split())


def leaves(values: dict[str, Any], outer: str = "") -> Iterator[str]:
    for key, value in sorted(values.items(), key=lambda item: isinstance(item[1], dict)):  # groups last
        if isinstance(value, dict):
            yield from leaves(value, f"{outer}{key}.")
        else:
            yield f"{outer}{key}"


@pytest.mark.parametrize("script", [*SPECS, "import_checkpoint", "export_checkpoint"])
def test_help_says_what_each_key_means(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from _help import help_keys

    config = compose_any(script)
    text = help_keys(script, _root_=config)
    entries = re.split(r"\n  (?=\S)", f"\n{text}")[1:]
    names = [entry.partition("=")[0] for entry in entries]
    values = OmegaConf.to_container(config)
    assert isinstance(values, dict)
    assert names == [*leaves({key: value for key, value in values.items() if key != "hydra"})]
    said = {entry.partition("=")[0]: re.split(r"\s{2,}", entry, maxsplit=1)[1:] for entry in entries}
    assert [name for name, meaning in said.items() if not "".join(meaning).replace("(required)", "").strip()] == []


def test_the_digits_classifier_script_says_what_it_makes() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "tools" / "make_digits_classifier.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ddim/evaluation/assets/digits_classifier.npz" in done.stdout
    assert "--out" in done.stdout


def test_a_script_outside_the_environment_says_what_to_do() -> None:
    command = [sys.executable, "-S", str(ROOT / "scripts" / "train.py")]  # -S: without installed packages
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the package ")
    assert "source .venv/bin/activate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_ends_quietly_when_its_reader_has_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "scripts" / "figures.py"), "--help"]
    outcome = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (outcome.returncode, outcome.stderr) == (141, "")
