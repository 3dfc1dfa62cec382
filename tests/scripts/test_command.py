"""The command `ddim`: what the scripts do, from an installed wheel and in any folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ddim

pytestmark = pytest.mark.integration
Run = Callable[..., Any]
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("[a-z]*.py"))
BUILD = "from setuptools import build_meta; build_meta.build_wheel('.')"
# What pip writes into bin/ for the entry point, and then which package it was.
ENTRY = "from ddim_commands.scripts._command import main; main(); import ddim; print(ddim.__file__)"


def test_its_help_has_a_line_for_each_command(run: Run) -> None:
    done = run("_command", "--help")
    assert (done.code, done.err) == (0, "")
    lines = dict(re.findall(r"^  (\w+) +(\S.+)$", done.out, flags=re.MULTILINE))
    assert sorted(lines) == SCRIPTS
    assert lines["train"] == "Train a network."
    assert run("_command").out == done.out
    assert run("_command", "--version").out == f"ddim {ddim.__version__}\n"


def test_an_unknown_command_is_one_line(run: Run) -> None:
    done = run("_command", "trian", "experiment=digits")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: unknown command trian (did you mean train?); allowed: {', '.join(SCRIPTS)}.\n"


def test_help_and_errors_name_commands_not_files(run: Run) -> None:
    done = run("_command", "train", "--help")
    assert (done.code, done.err) == (0, "")
    assert "\n  ddim train experiment=cifar10\n" in done.out
    assert "scripts/" not in done.out
    done = run("_command", "sample", "checkpoint=no.ckpt")
    assert (done.code, done.out) == (2, "")
    assert re.search(r"no checkpoint no\.ckpt.* ddim train", done.err)


def test_reports_state_the_command_that_was_typed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scripts/evaluate.py", "-m", "name=two words"])
    from _sweep import command

    assert command() == "python scripts/evaluate.py -m 'name=two words'"
    monkeypatch.setenv("DDIM_COMMAND", "evaluate")
    assert command() == "ddim evaluate -m 'name=two words'"


def test_the_command_that_encode_prints_decodes(run: Run, conditional_checkpoint: Path, tmp_path: Path) -> None:
    """With each word once, and paths that have spaces as one word."""
    (tmp_path / "mine").mkdir()
    Image.new("L", (8, 8), 99).save(tmp_path / "mine" / "a.png")
    (tmp_path / "my times.json").write_text('{"T": 50, "tau": [1, 20, 40]}')
    chosen = ["label=3", "guidance.w=2", "guidance.interval=[1,30]", "sampler.spacing=my times.json", "sampler.S=null"]
    common = [f"checkpoint={conditional_checkpoint}", "compute.device=cpu"]
    done = run("encode", *common, "source=mine", "output_dir=out", *chosen)
    assert done.code == 0, done.err
    _, script, *words = shlex.split(done.out.splitlines()[-1].removeprefix("next: "))
    keys = [word.partition("=")[0] for word in words]
    assert (script, len(set(keys))) == ("scripts/sample.py", len(keys))
    assert {*chosen[:4], "sampler.S=3"} <= {*words}
    done = run("sample", *words, "compute.device=cpu", "output_dir=decoded")
    assert (done.code, "less exactly" in done.err) == (0, False)
    assert f"checkpoint={conditional_checkpoint} label=3 guidance.w=2 'guidance.interval=[1,30]'" in done.out


@pytest.mark.slow
def test_a_wheel_samples_in_an_empty_folder(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, site, empty = (tmp_path / name for name in ("source", "site", "empty"))
    for name in ("ddim", "scripts", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert entry.read_text() == "[console_scripts]\nddim = ddim_commands.scripts._command:main\n"

    def files(*folders: Path, pattern: str = "**/*") -> set[str]:
        paths = {path.relative_to(folder) for folder in folders for path in folder.glob(pattern) if path.is_file()}
        return {path.as_posix() for path in paths}

    assert files(site / "ddim") == files(source / "ddim")
    commands = site / "ddim_commands"
    assert files(commands / "scripts") == files(source / "scripts", pattern="*.py")
    assert files(commands / "configs") == files(source / "configs", pattern="**/*.yaml")
    assert {path.name for path in site.iterdir()} == {"ddim", "ddim_commands", entry.parent.name}

    empty.mkdir()
    command = [sys.executable, "-c", ENTRY, "sample", f"checkpoint={checkpoint}", "n=4", "sampler.S=2"]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    more = f"next: ddim figures figure=samples checkpoint={checkpoint}"
    assert done.stdout.splitlines()[1:] == ["outputs/samples/grid.png", more, str(site / "ddim" / "__init__.py")]
    assert (empty / "outputs" / "samples" / "grid.png").is_file()
