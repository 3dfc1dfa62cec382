"""--help answers at once, from the configuration alone, and lists what there is to choose."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    "cifar10, cifar10_official, cifar10_small, digits",
    "evaluate": "table1_celeba, table1_cifar10, table1_cifar10_sigma_hat, table3_bedroom, table3_church, table_digits, "
    "table_solvers_cifar10, table_solvers_digits",
}

pytestmark = pytest.mark.integration


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
        "figures": ["sampler"],
    }
    for key in groups[script]:
        options = sorted(path.stem for path in (ROOT / "configs" / key.partition("@")[0]).glob("*.yaml"))
        assert f"\n{key}: {', '.join(options)}\n" in text
    assert ("\nnetwork: unet" in text) == (script == "train")
    assert re.search("\nexperiment: (.*)|$", text)[1] == EXPERIMENTS.get(script)
    assert f"python scripts/{script}.py" in text
    keys = {
        "train": ["checkpoint", "max_steps"],
        "sample": ["format", "eta"],
        "evaluate": ["weights", "eta"],
        "figures": ["figure", "eta"],
    }
    for key in keys[script]:
        assert f"{key}: " in text


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
