"""The text of --help: the groups of a script, and a line for each key, from the configuration and the docstrings.

The specs are read as text, not imported: help answers at once.
"""

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from _messages import CONFIGS, own_groups, own_options
from omegaconf import DictConfig, OmegaConf

PACKAGE = Path(next(iter(find_spec("ddim").submodule_search_locations)))  # type: ignore[union-attr,arg-type]
COLUMN = 34  # where meanings begin


class Spec(NamedTuple):
    """What the source of a spec says of its fields."""

    bases: list[str]
    hints: dict[str, str]
    meanings: dict[str, str]


def help_groups(config_name: str) -> str:
    """Return a line for each group of a script, with its options; used in configs/hydra/default.yaml."""
    groups = own_groups(config_name)
    return "\n".join(f"{key}: {', '.join(own_options(key.partition('@')[0], config_name))}" for key in sorted(groups))


def help_keys(config_name: str, *, _root_: DictConfig) -> str:
    """Return a line for each key of a script: its value, and what it means; used in configs/hydra/default.yaml."""
    config: Any = OmegaConf.to_container(_root_)
    choices: Any = OmegaConf.to_container(_root_.hydra.runtime.choices)
    comments = read_comments(CONFIGS / f"{config_name}.yaml")
    for key in own_groups(config_name):
        group, _, package = key.partition("@")
        if isinstance(option := choices.get(key), str):
            inner = read_comments(CONFIGS / group / f"{option}.yaml")
            comments |= {f"{package or group}.{name}": comment for name, comment in inner.items()}
    named = re.search(r"\w+Spec", (CONFIGS / f"{config_name}.yaml").read_text(encoding="utf-8"))
    meanings = _meanings(config, named[0] if named else "", read_specs(), comments)
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    return "\n".join(_line(setting, meaning, width) for setting, meaning in meanings).replace("$", "$$")


def read_comments(path: Path) -> dict[str, str]:
    """Return the comment behind each key of a configuration file, and of those that it starts from."""
    text = path.read_text(encoding="utf-8")
    comments: dict[str, str] = {}
    for base in re.findall(r"^defaults: \[(\w+)\]", text, re.MULTILINE):  # of an option of a group
        comments |= read_comments(path.with_name(f"{base}.yaml"))
    outer: list[str] = []
    for indent, key, comment in re.findall(r"^( *)(\w+):(?:[^#\n]*#+ (.*))?", text, re.MULTILINE):
        outer = [*outer[: len(indent) // 2], key]
        if comment:
            comments[".".join(outer)] = comment
    return comments


def read_specs() -> dict[str, Spec]:
    """Return what the package says of each spec, by its name."""
    specs = {}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body if re.search(r"^class \w+Spec\b", text, re.MULTILINE) else ():
            if isinstance(node, ast.ClassDef) and node.name.endswith("Spec"):
                fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
                hints = {f.target.id: ast.unparse(f.annotation) for f in fields}  # type: ignore[union-attr]
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                specs[node.name] = Spec(bases, hints, read_attributes(ast.get_docstring(node) or ""))
    return specs


def read_attributes(docstring: str) -> dict[str, str]:
    """Return the meaning of each attribute in a docstring of Google's style."""
    section = re.search(r"^(?:Attributes|Args):\n((?: +.*\n?)+)", inspect.cleandoc(docstring), re.MULTILINE)
    meanings: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE):
        meanings |= dict.fromkeys(names.split(", "), " ".join(text.split()).rstrip("."))
    return meanings


def _meanings(
    config: dict[str, Any], spec_name: str, specs: dict[str, Spec], comments: dict[str, str], outer: str = ""
) -> Iterator[tuple[str, str]]:
    """Yield (KEY=VALUE, meaning) of each key in a mapping that is made into a spec."""
    hints, said = _fields(spec_name, specs)
    for key, value in sorted(config.items(), key=lambda item: isinstance(item[1], dict)):  # groups last
        path, inner = f"{outer}{key}", [name for name in re.findall(r"\w+", hints.get(key, "")) if name in specs]
        if path == "hydra":
            continue
        if isinstance(value, dict):
            like = f"{value.get('name')}spec"  # of a network, whose spec its registry knows
            nested = inner[0] if inner else next((name for name in specs if name.lower() == like), "")
            yield from _meanings(value, nested, specs, comments, f"{path}.")
            continue
        comment, meaning = comments.get(path, ""), said.get(key, "")
        parts = [meaning, comment] if comment.startswith(("one of", "any of")) else [comment or meaning]
        yield f"{path}={_shown(value)}", "; ".join(filter(None, parts))


def _fields(spec_name: str, specs: dict[str, Spec]) -> tuple[dict[str, str], dict[str, str]]:
    """Return type and meaning of each field of a spec, also of those that it inherits."""
    hints: dict[str, str] = {}
    meanings: dict[str, str] = {}
    if spec := specs.get(spec_name):
        for base in spec.bases:
            inherited = _fields(base, specs)
            hints, meanings = hints | inherited[0], meanings | inherited[1]
        hints, meanings = hints | spec.hints, meanings | spec.meanings
    return hints, meanings


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return "...  (required)" if value == "???" else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000).partition("\n")[0].replace(" ", "")


def _line(setting: str, meaning: str, width: int) -> str:
    first, hang = f"  {setting}".ljust(COLUMN), " " * COLUMN
    if len(first.rstrip()) > COLUMN - 2 and meaning:
        first = f"{first.rstrip()}\n{hang}"
    lines = textwrap.wrap(meaning, width - COLUMN - 1, break_long_words=False, break_on_hyphens=False)
    return (first + f"\n{hang}".join(lines)).rstrip()
