"""The README's library example runs, and the paths that the documents name exist. Commands: test_commands.py."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim import linear_schedule, quadratic_tau
from ddim.checkpoints import ModelSpec
from ddim.networks import UNetSpec, build_network

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/equations.md",
    "docs/performance.md",
    "outputs/README.md",
]
FOLDERS = ("ddim", "scripts", "configs", "tests", "docs")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def library_example() -> str:
    """Return the first python block of the README."""
    if not (found := blocks(README.read_text(), "python")):
        pytest.skip("README.md shows no python block yet")
    return found[0]


def run(code: str) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]:
    """Run the example with a made-up network; return x_0 and what was shown."""
    shown: list[tuple[int, torch.Tensor]] = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (len(x),)
        assert 1 <= int(t.min()) <= int(t.max()) <= 1000
        return 0.9 * torch.tanh(x) + 0.1 * x.flip(-1)

    names: dict[str, Any] = {"model": model, "show": lambda t, image: shown.append((t, image))}
    exec(code, names)
    assert names["schedule"].alpha_bar.shape == (1001,)
    assert names["schedule"].alpha_bar.dtype == torch.float64
    return names["x_0"], shown


def test_the_library_example_runs_and_is_deterministic() -> None:
    code = library_example()
    assert len(code.strip().splitlines()) <= 10
    x_0, shown = run(code)
    again, shown_again = run(code)
    assert x_0.shape == (16, 3, 32, 32)
    assert bool(torch.isfinite(x_0).all())
    assert torch.equal(x_0, again)
    assert len(shown) == 50
    assert [t for t, _ in shown] == [*reversed(quadratic_tau(1000, 50)[:-1]), 0]
    assert all(image.shape == x_0.shape for _, image in shown)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(shown, shown_again, strict=True))
    assert not torch.allclose(shown[-1][1], x_0, atol=0.1)  # eta=1 is another sample than eta=0


def test_the_checkpoint_example_runs(tmp_path: Path) -> None:
    """On a checkpoint of a small untrained network, in the place of the quickstart's."""
    first, second = blocks(README.read_text(), "python")
    network_spec = UNetSpec((8, 8), 1, ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=2)
    spec = ModelSpec("unet", network_spec, linear_schedule(1000))
    weights = build_network("unet", network_spec).state_dict()
    content = {
        "global_step": 0,
        "state_dict": {f"network.{name}": value for name, value in weights.items()},
        "callbacks": {"EMA": {"shadow": weights}},
        "ddim": spec.to_dict(),
    }
    torch.save(content, tmp_path / "last.ckpt")
    path = re.search(r'load_model\("([^"]+)"\)', second)
    assert path is not None
    setup = "\n".join(line for line in first.splitlines() if line.startswith("from"))
    names: dict[str, Any] = {}
    exec(f"{setup}\n{second.replace(path[1], str(tmp_path / 'last.ckpt'))}", names)
    assert names["x_0"].shape == (16, 1, 8, 8)
    assert bool(torch.isfinite(names["x_0"]).all())


def missing_paths(text: str, folder: Path, root: Path) -> list[str]:
    """Return what a document in `folder` names and what does not exist.

    That is: targets of links; in back-ticks and bash blocks, paths into FOLDERS, and the names of our kinds of files.
    A name in capitals within a path stands for any name.
    """
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", link)]
    missing = [link for link in links if not (folder / link).exists()]
    files = {path.name for top in FOLDERS for path in (root / top).rglob("*")} | {path.name for path in root.iterdir()}
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose) + blocks(text, "bash"):
        for word in re.split(r"[\s'\"=,;()\[\]]+|::", code):
            if word.startswith(tuple(f"{top}/" for top in FOLDERS)):
                pattern = re.sub(r"\b[A-Z]{2,}\b", "*", word.removeprefix("./"))
                exists = any(root.glob(pattern))
            elif re.fullmatch(r"[A-Z]{4,}\.md|[\w-]+\.(py|sh|toml|yml|yaml)", word):
                exists = word in files
            else:
                continue
            if not exists:
                missing.append(word)
    return missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_of_the_documents_exists(name: str) -> None:
    file = ROOT / name
    assert missing_paths(file.read_text(), file.parent, ROOT) == []


def test_every_experiment_that_the_readme_names_exists() -> None:
    named = re.findall(r"\bexperiment=(\w+)|configs/experiment/(\w+)\.yaml", README.read_text())
    names = {group or path for group, path in named} - {"NAME"}
    assert names <= {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")}


def test_missing_paths_are_noticed(tmp_path: Path) -> None:
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    for file in ("docs/a.md", "ddim/sampling.py", "README.md", "pyproject.toml"):
        (tmp_path / file).touch()
    good = (
        "[a](docs/a.md#b) [w](https://a.b/c) [h](#here) `docs/*.md` `outputs/train/NAME/csv/` `docs/NAME.md`, "
        "`README.md` `sampling.py` `table.md` `n/m` a/b.py `docs/` `pyproject.toml`\n"
        "```bash\npython ddim/sampling.py x=docs/a.md\n```\n"
    )
    assert missing_paths(good, tmp_path, tmp_path) == []
    for bad in ("[a](docs/b.md)", "`docs/b.md`", "`docs/*.png`", "`READMY.md`", "`tests/NAME.py`", "(see `docs/c/`)"):
        assert len(missing_paths(f"{good} {bad}", tmp_path, tmp_path)) == 1, bad
    assert missing_paths("```bash\npython docs/x.py a=b   # so\n```\n", tmp_path, tmp_path) == ["docs/x.py"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("linear_schedule", "linear_schedules"),
        ("(1000, 50)", "(1000, 49)"),
        ("eta=1.0", "eta=0.0"),
        ("seed=0", "sead=0"),
    ],
)
def test_a_wrong_example_is_noticed(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = library_example()
    assert right in code
    monkeypatch.setitem(globals(), "library_example", lambda: code.replace(right, wrong))
    with pytest.raises((ImportError, TypeError, AssertionError)):
        test_the_library_example_runs_and_is_deterministic()
