"""The last words of a command: the exact command to type next."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _start import typed


def shell_command(script: str, *words: str, typed_words: Sequence[str] = ()) -> str:
    """Return a command of a script for the shell; it imports the plugins that this command was told to import.

    Args:
        script: its name.
        words: key=value, quoted here where Hydra could not read the value.
        typed_words: words that were typed for Hydra, which stay as they are; they come first.
    """
    plugins = [word for word in sys.argv[1:] if word.startswith("plugins=") and word not in typed_words]
    return typed(shlex.join(["python", f"scripts/{script}.py", *typed_words, *map(_for_hydra, words), *plugins]))


def _for_hydra(word: str) -> str:
    """Return key=value with the value in quotes, unless Hydra reads it as it is; lists and mappings stay."""
    key, _, value = word.partition("=")
    of_values = value[:1] + value[-1:] in ("[]", "{}")  # a list or a mapping, not a path that begins like one
    if of_values or (re.fullmatch(r"[\w./:+@%*?|$ -]*", value, re.ASCII) and value == value.strip()):
        return word
    return f"{key}={quoted(value)}"


def quoted(value: str) -> str:
    """Return a value in the quotes in which Hydra reads any text."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value) + "'"


def command_line(script: str, *words: str, typed_words: Sequence[str] = ()) -> str:
    """Return a line with a command of a script; for the words see `shell_command`."""
    return f"next: {shell_command(script, *words, typed_words=typed_words)}"


def same_command(*words: str) -> str:
    """Return a line with the command that is running, where these words take the place of others of the same keys."""
    keys = {word.partition("=")[0] for word in words}
    kept = [word for word in sys.argv[1:] if word.partition("=")[0] not in keys]
    return f"next: {shell_command(Path(sys.argv[0]).stem, *words, typed_words=kept)}"


def of_checkpoint(spec: Any) -> list[str]:
    """Return the words for the checkpoint of a specification, and for its weights."""
    return [f"checkpoint={spec.checkpoint}", *([] if spec.weights == "ema" else [f"weights={spec.weights}"])]


def of_model(spec: Any) -> list[str]:
    """Return the words for the model of a specification, and for the label that it asks for."""
    words = of_checkpoint(spec)
    if (label := getattr(spec, "label", None)) is None:
        return words
    words += [f"label={label}", *([f"guidance.w={spec.guidance.w:g}"] if spec.guidance.w else [])]
    interval = spec.guidance.interval
    return words if interval is None else [*words, f"guidance.interval=[{interval[0]},{interval[1]}]"]
