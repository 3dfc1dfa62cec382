"""The commands that are printed to be typed next can be typed."""

import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(
    "path",
    [
        "outputs/train/a/checkpoints/last.ckpt",
        "outputs/My Drive (1)/last.ckpt",
        "outputs/é/last.ckpt",
        "it's, well/äöü={x}.ckpt",
        "back\\slash'.ckpt",
        "ends\\",
        "[2026] run/last.ckpt",
        "{a} run/last.ckpt",
        " between blanks ",
    ],
)
def test_a_printed_path_is_read_as_it_was(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    from _last_words import command_line

    line = command_line("sample", f"checkpoint={path}", "sampler.S=null", "x=[1,2]")
    python, script, *words = shlex.split(line.removeprefix("next: "))
    assert (python, script) == ("python", "scripts/sample.py")
    values = [override.value() for override in OverridesParser.create().parse_overrides(words)]
    assert [str(values[0]), *values[1:]] == [path, None, [1, 2]]


def test_words_that_were_typed_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, "argv", ["scripts/train.py", "-m", "optim.lr=0.1,0.2", "name='lr(${optim.lr})'", "n=1"])
    from _last_words import same_command

    words = shlex.split(same_command("n=2"))
    assert words[1:] == ["python", "scripts/train.py", "-m", "optim.lr=0.1,0.2", "name='lr(${optim.lr})'", "n=2"]
