"""The files that say what to install agree with each other, and with what the code imports."""

import ast
import re
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ddim

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for group in (PROJECT["dependencies"], *EXTRAS.values()) for line in group]
RANGES = {canonicalize_name(r.name): r.specifier for r in REQUIREMENTS}
PINS = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.strip() and not line.startswith("#")
]
# Modules that are called otherwise than the package they come from.
PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "hydra": "hydra-core", "yaml": "pyyaml"}


def test_every_constraint_is_one_exact_version() -> None:
    assert [pin for pin in PINS if not re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", pin)] == []
    names = [pin.split("==")[0] for pin in PINS]
    assert len(set(names)) == len(names)


def test_constraints_pin_every_requirement_within_its_range() -> None:
    pins = dict(pin.split("==") for pin in PINS)
    assert sorted(set(RANGES) - set(pins)) == []
    outside = {name: pins[name] for name, allowed in RANGES.items() if not allowed.contains(pins[name])}
    assert outside == {}


@pytest.mark.parametrize(
    ("package", "version", "allowed"),
    [
        ("lightning", "2.6.1", False),
        ("lightning", "2.6.2", False),
        ("lightning", "2.6.3", False),
        ("lightning", "2.6.4", True),
        ("torch", "2.12.1", True),
        ("torch", "2.13.0", False),
        ("torch", "2.13.1", False),
        ("torch", "2.15.0", True),
        ("torch-fidelity", "0.4.1", True),
        ("torch-fidelity", "0.5.0", False),
    ],
)
def test_versions_that_must_not_be_installed(package: str, version: str, allowed: bool) -> None:
    assert RANGES[canonicalize_name(package)].contains(version) is allowed


def test_conda_environment_installs_what_pyproject_says() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1])
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip[0] == "-c constraints.txt"
    assert pip[-1] == "-e ."
    assert len(set(pip)) == len(pip)
    assert set(pip[1:-1]) == {*PROJECT["dependencies"], *(line for group in EXTRAS.values() for line in group)}


def third_party_imports(folder: str) -> set[str]:
    """Return the packages, by their registry names, that the files of a folder import."""
    imported = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    own = {"ddim", *(path.stem for folder in ("scripts", "tests") for path in (ROOT / folder).rglob("*.py"))}
    return {canonicalize_name(PACKAGE_OF.get(name, name)) for name in imported - own - sys.stdlib_module_names}


def test_every_import_is_declared() -> None:
    names = {extra: {canonicalize_name(Requirement(line).name) for line in lines} for extra, lines in EXTRAS.items()}
    declared = set(RANGES) - names["dev"]
    assert sorted(third_party_imports("ddim") - declared) == []
    # a code base that the benchmark times where it is installed, and its own helper
    baselines = {"denoising-diffusion-pytorch", "ema-pytorch"}
    assert sorted(third_party_imports("scripts") - declared - baselines) == []
    # pip's own companion, which pytest brings
    assert sorted(third_party_imports("tests") - set(RANGES) - {"packaging"}) == []


def test_every_runtime_requirement_is_used() -> None:
    used = third_party_imports("ddim") | third_party_imports("scripts")
    through_lightning = {"wandb", "tensorboard"}
    runtime = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert sorted(runtime - used - through_lightning) == []


def test_files_beside_the_code_are_package_data() -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["ddim"]
    package = ROOT / "ddim"
    files = [p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assets = [name for name in files if not name.endswith(".py")]
    assert {"py.typed", "evaluation/assets/digits_classifier.npz"} <= set(assets)
    assert [name for name in assets if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "ddim").rglob("*.py")}
    assert sorted(str(folder) for folder in folders if not (folder / "__init__.py").is_file()) == []


def test_versions_agree() -> None:
    entries = re.findall(r"^## \[(\d[^\]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert ddim.__version__ == PROJECT["version"] == entries[0][0]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entries[0][1])
    assert entries == sorted(entries, key=lambda entry: Version(entry[0]), reverse=True)


def test_license_and_readme_exist() -> None:
    for name in (PROJECT["readme"], *PROJECT["license-files"]):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("recipe", ["Dockerfile", "ddim.def"])
def test_containers_install_what_exists(recipe: str) -> None:
    text = (ROOT / recipe).read_text()
    assert "Not run" in text
    (version,) = re.findall(r"^(?:FROM|From:) python:(\S+)$", text, flags=re.MULTILINE)
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(version)
    (command,) = re.findall(r"pip install .*", text)
    assert "-c constraints.txt" in command
    (extras,) = re.findall(r"\.\[(.*)\]", command)
    assert set(extras.split(",")) <= EXTRAS.keys()
    copied = re.findall(r"^    (\S+) /opt/ddim/(\S+)$", text, flags=re.MULTILINE)
    if recipe == "ddim.def":
        needed = {"pyproject.toml", "setup.py", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
        needed |= {"ddim", "configs", "scripts"}
        assert {source for source, _ in copied} >= needed
    for source, target in copied:
        assert source == target
        assert (ROOT / source).exists()


def test_hooks_run_the_tools_of_the_environment() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert {hook["entry"].split()[0] for hook in hooks} <= {Requirement(line).name for line in EXTRAS["dev"]}
