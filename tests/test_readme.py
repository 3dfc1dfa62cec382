"""The documents' Python examples run, and the paths, keys, experiments, commands and functions they name exist."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from test_commands import SPECS, commands, problems

from ddim import quadratic_tau
from ddim.networks import NETWORKS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "outputs/README.md")), *DOCS]
REFERENCES = ("equations", "performance")  # not guides
FOLDERS = ("ddim", "scripts", "configs", "tests", "docs")
of_documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def code_in(text: str) -> list[str]:
    """Return what a document shows as code within its lines, in back-ticks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def test_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 130
    assert max(map(len, lines)) <= 140


# ---------------------------------------------------------------- examples in Python


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network made up for the examples."""
    assert t.shape == (len(x),)
    assert 1 <= int(t.min()) <= int(t.max()) <= 1000
    return 0.9 * torch.tanh(x) + 0.1 * x.flip(-1)


def run(code: str) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """Run the README's example; return x_0 and what was shown."""
    shown: list[tuple[int, torch.Tensor]] = []
    names: dict[str, Any] = {"model": model, "show": lambda t, image: shown.append((t, image))}
    exec(code, names)
    assert names["schedule"].alpha_bar.shape == (1001,)
    assert names["schedule"].alpha_bar.dtype == torch.float64
    return names["x_0"], shown


def check_library_example(code: str) -> None:
    """Fail unless the example samples as its comments state."""
    x_0, shown = run(code)
    again, shown_again = run(code)
    assert x_0.shape == (16, 3, 32, 32)
    assert bool(torch.isfinite(x_0).all())
    assert torch.equal(x_0, again)
    assert [t for t, _ in shown] == [*reversed(quadratic_tau(1000, 50)[:-1]), 0]
    assert all(image.shape == x_0.shape for _, image in shown)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(shown, shown_again, strict=True))
    assert not torch.allclose(shown[-1][1], x_0, atol=0.1)  # eta=1 is another sample than eta=0


def test_library_example_runs_and_is_deterministic() -> None:
    (code,) = blocks(README.read_text(), "python")
    assert len(code.strip().splitlines()) <= 10
    check_library_example(code)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("linear_schedule", "linear_schedules"),
        ("(1000, 50)", "(1000, 49)"),
        ("eta=1.0", "eta=0.0"),
        ("seed=0", "sead=0"),
    ],
)
def test_wrong_library_examples_fail(right: str, wrong: str) -> None:
    (code,) = blocks(README.read_text(), "python")
    assert right in code
    with pytest.raises((ImportError, TypeError, AssertionError)):
        check_library_example(code.replace(right, wrong))


def test_checkpoint_example_runs(checkpoint: Path) -> None:
    """On a small untrained checkpoint instead of the quickstart's."""
    (code,) = blocks((ROOT / "docs" / "checkpoints.md").read_text(), "python")
    path = re.search(r'load_model\("([^"]+)"\)', code)
    assert path is not None
    names: dict[str, Any] = {}
    exec(code.replace(path[1], str(checkpoint)), names)
    assert names["x_0"].shape == (16, *names["model"].spec.image_shape)
    assert bool(torch.isfinite(names["x_0"]).all())


@pytest.mark.parametrize("number", [0, -1])  # test_installed_rule.py runs the one between
def test_sampler_example_runs(number: int) -> None:
    code = blocks((ROOT / "docs" / "samplers.md").read_text(), "python")[number]
    names: dict[str, Any] = {"model": model, "sigma_bars": [0.1, 1.0, 9.0], "score_network": lambda x, levels: -x}
    exec(code, names)
    assert names["x_0"].shape == (4, 3, 32, 32)
    assert bool(torch.isfinite(names["x_0"]).all())


# ---------------------------------------------------------------- paths


def missing_paths(text: str, folder: Path, root: Path) -> list[str]:
    """Return what a document in `folder` names that does not exist.

    That is: targets of links and pictures; in code, paths into FOLDERS, and names of files of the project's kinds. A
    name in capitals within a path stands for any name. In a table of old and new names the old ones are not read.
    """
    text = "".join(re.sub(r"^\|[^|]*", "", line) if old else line for line, old in _with_old(text))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    files = [link.partition("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    missing = [link for link in files if not (folder / link).exists()]
    known = {path.name for top in FOLDERS for path in (root / top).rglob("*")} | {path.name for path in root.iterdir()}
    pieces = code_in(text) + [re.sub(r"\s#.*", "", block) for block in blocks(text, "bash")]
    for word in (word for piece in pieces for word in re.split(r"[\s'\"=,;()\[\]]+|::", piece)):
        if word.startswith(tuple(f"{top}/" for top in FOLDERS)):
            exists = any(root.glob(re.sub(r"\b[A-Z]{2,}\b", "*", word)))
        elif re.fullmatch(r"[A-Z]{4,}\.(md|cff)|[\w-]+\.(py|sh|toml|yml|yaml)", word):
            exists = word in known
        else:
            continue
        if not exists:
            missing.append(word)
    return missing


def _with_old(text: str) -> list[tuple[str, bool]]:
    """Return the lines, and whether each is a row of a table of old and new names."""
    lines, old = [], False
    for line in text.splitlines(keepends=True):
        old = line.startswith("|") and (old or line.startswith("| old |"))
        lines.append((line, old))
    return lines


@of_documents
def test_every_path_exists(path: Path) -> None:
    assert missing_paths(path.read_text(), path.parent, ROOT) == []


def test_missing_paths_are_found(tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    for file in ("docs/a.md", "docs/a.png", "ddim/sampling.py", "README.md", "pyproject.toml"):
        (tmp_path / file).touch()
    good = (
        "[a](docs/a.md#b) [w](https://a.b/c) [h](#here) `docs/*.md` `outputs/train/NAME/csv/` `docs/NAME.md`, "
        "`README.md` `sampling.py` `table.md` `n/m` a/b.py `docs/` `pyproject.toml`\n"
        '<img src="docs/a.png" width="8">\n'
        "```bash\npython ddim/sampling.py x=docs/a.md\n```\n"
        "| old | new |\n|---|---|\n| `docs/z.md` | `docs/a.md` |\n\n"
    )
    assert missing_paths(good, tmp_path, tmp_path) == []
    for bad in (
        "[a](docs/b.md)",
        '<img src="docs/b.png">',
        "`docs/b.md`",
        "`docs/*.gif`",
        "`READMY.md`",
        "`tests/NAME.py`",
        "(see `docs/c/`)",
        "\n| old | new |\n|---|---|\n| `docs/a.md` | `docs/z.md` |\n",
        "\n| to do | where |\n|---|---|\n| `docs/z.md` | `docs/a.md` |\n",
    ):
        assert len(missing_paths(f"{good}{bad}", tmp_path, tmp_path)) == 1, bad
    assert missing_paths("```bash\npython docs/x.py a=b   # so\n```\n", tmp_path, tmp_path) == ["docs/x.py"]


def test_every_anchor_is_a_heading() -> None:
    """Links to a heading, such as docs/training.md#sweeps."""
    missing = []
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s:]*#[^)\s]+)\)", path.read_text()):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            if anchor not in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}:
                missing.append(f"{path.name}: {link}")
    assert missing == []


def test_layout_is_that_of_the_checkout() -> None:
    (tree,) = blocks(README.read_text(), "text")
    folders = re.findall(r"^( *)(\w+)/", tree, flags=re.MULTILINE)
    shown = {f"ddim/{name}" if indent else name for indent, name in folders}
    rooms = {f"ddim/{path.parent.name}" for path in (ROOT / "ddim").glob("*/__init__.py")}
    assert shown == rooms | {"ddim", *(top for top in FOLDERS)}


# ---------------------------------------------------------------- keys, experiments, commands, functions


def keys_of(spec: type) -> set[str]:
    """Return the keys of a spec, those of the specs in it with their prefix."""
    keys = set()
    for name, hint in get_type_hints(spec).items():
        inner = [kind for kind in (hint, *get_args(hint)) if dataclasses.is_dataclass(kind)]
        keys |= {name, *(f"{name}.{key}" for kind in inner for key in keys_of(kind))}  # type: ignore[arg-type]
    return keys


def unknown_keys(text: str) -> list[str]:
    """Return the keys, as in `key=value` or `group.key`, that no command has; Hydra's are not checked."""
    known = {
        "experiment",
        "debug",
        "hparams_search",
        "like",
        "plugins",
        "network",
        "schedule",
        *(f"network.{name}" for spec, _ in NETWORKS.values() for name in get_type_hints(spec)),
    }
    known |= {key for spec in SPECS.values() for key in keys_of(spec)}
    groups = {key.partition(".")[0] for key in known if "." in key}
    known |= {key.rpartition(".")[2] for key in known}  # `winograd=true` stands for that of compute and of trainer
    unknown = []
    for word in re.split(r"[\s'\";()]+", " ".join(code_in(text))):
        key, equals, _ = word.partition("=")
        named = re.fullmatch(r"[a-z]\w*(\.\w+)*", key) and not re.search(r"\.(py|md|yaml|json|png|gif|csv|tex)$", key)
        grouped = "." in key and key.partition(".")[0] in groups
        if named and (equals or grouped) and not key.startswith("hydra.") and key not in known:
            unknown.append(key)
    return unknown


@of_documents
def test_every_key_exists(path: Path) -> None:
    text = path.read_text()
    if path.name == "CHANGELOG.md":
        text = "".join(line for line, old in _with_old(text) if not old)
    python = {"weights_only"}  # arguments of functions
    assert set(unknown_keys(text)) <= python


def test_unknown_keys_are_found() -> None:
    good = "`sampler.S=5,10`, `trainer.keep_last`, `winograd=true 'network.ch=3'`, `hydra.sweep.dir=F`, `DDIM_X=1`"
    assert unknown_keys(good) == []
    for bad in ("sampler.steps=5", "trainer.keep", "colour=3"):
        assert unknown_keys(f"{good} `{bad}`") == [bad.partition("=")[0]]


def test_every_experiment_exists() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS if path.name != "CHANGELOG.md")
    named = re.findall(r"\bexperiment=(\w+)|configs/experiment/(\w+)\.yaml", text)
    names = {group or path for group, path in named} - {"NAME"}
    assert names <= {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")}


@pytest.mark.integration
@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_every_command_of_the_docs_is_right(path: Path) -> None:
    assert [problem for command in commands(path.read_text()) for problem in problems(command)] == []


@pytest.mark.parametrize("path", [path for path in DOCS if path.stem not in REFERENCES], ids=lambda path: path.stem)
def test_pages_start_with_a_task_and_a_command(path: Path) -> None:
    parts = re.split(r"^(#+ .+)$\n+", path.read_text(), flags=re.MULTILINE)
    assert parts[1].startswith("# ")
    assert parts[2].strip() == ""  # the first section follows the title
    assert parts[3].startswith("## ")
    assert blocks(parts[4], "bash")


def test_routes_name_existing_functions() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\|[^|]+\| `(ddim/[^`]+\.py)` \| `([\w.]+)` \|$", text, flags=re.MULTILINE)
    assert len(rows) >= 10
    assert [row for row in rows if row[1] not in functions(ROOT / row[0])] == []


def functions(path: Path) -> set[str]:
    """Return the functions of a file, and its methods with their classes."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = {f"{c.name}.{m.name}" for c in classes for m in c.body if isinstance(m, ast.FunctionDef)}
    return methods | {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
