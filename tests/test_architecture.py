"""Which package may import which (import-linter), and what no source file may do (read with ast)."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "ddim").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Methods whose contract is written at the class that they come from.
INHERITED = {
    "forward",
    "compute",
    "get_provided_features_list",
    "get_default_feature_layer_for_metric",
    "can_be_compiled",
}


def dotted(node: ast.AST) -> str:
    """Return a.b.c for such an expression, "" for another."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def global_effects(tree: ast.AST) -> list[str]:
    """Return prints, seeds and draws of global generators; a seed may be set inside torch.random.fork_rng only."""
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items)
        for inner in ast.walk(node)
    }
    violations = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        draws = re.fullmatch(r"torch\.(rand\w*|normal|bernoulli|multinomial)|(np|numpy)\.random\..*|random\.\w+", name)
        seeds = re.fullmatch(r"(torch\.(\w+\.)?)?(manual_seed\w*|set_rng_state\w*)|(.*\.)?seed_everything", name)
        if name == "print" or draws or (seeds and id(node) not in forked):
            violations.append(f"{node.lineno}: calls {name}")
    return violations


def device_names(tree: ast.AST) -> list[str]:
    """Return strings that name a device, but for comparisons with `.type` and where a file's tensors are loaded to."""
    fine = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and dotted(node.left).endswith(".type"):
            fine |= {id(side) for side in node.comparators}
        if isinstance(node, ast.keyword) and node.arg == "map_location":
            fine.add(id(node.value))
    return [
        f"{node.lineno}: names the device {node.value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"(cuda|cpu|mps|xpu|tpu)(:\d+)?", node.value)
        and id(node) not in fine
    ] + [
        f"{node.lineno}: calls .cuda()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"
    ]


def swallowed_exceptions(tree: ast.AST) -> list[str]:
    """Return handlers that catch everything and neither raise nor use what they caught, and those that do nothing."""
    violations = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func).endswith("suppress"):
            violations.append(f"{node.lineno}: suppresses exceptions")
        if not isinstance(node, ast.ExceptHandler):
            continue
        everything = node.type is None or dotted(node.type) in ("Exception", "BaseException")
        inside = [inner for statement in node.body for inner in ast.walk(statement)]
        reports = any(
            isinstance(i, ast.Raise) or (isinstance(i, ast.Name) and node.name and i.id == node.name) for i in inside
        )
        idle = all(isinstance(statement, ast.Pass | ast.Continue | ast.Expr) for statement in node.body)
        calls = any(isinstance(i, ast.Call) for i in inside)
        if (everything and not reports) or (idle and not calls):
            violations.append(f"{node.lineno}: swallows an exception")
    return violations


def ambiguous_names(tree: ast.AST) -> list[str]:
    """Return names that are bound to exactly alpha or sigma, or hold the word prev or next."""
    bound: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            bound.append((node.lineno, node.attr))
        elif isinstance(node, ast.arg):
            bound.append((node.lineno, node.arg))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.append((node.lineno, node.name))
        elif isinstance(node, ast.alias) and node.asname:
            bound.append((node.lineno, node.asname))
    return [
        f"{line}: the name {name}"
        for line, name in bound
        if name in ("alpha", "alphas", "sigma", "sigmas") or {"prev", "next"} & set(name.lower().split("_"))
    ]


def missing_docstrings(tree: ast.Module) -> list[str]:
    """Return public modules, classes, functions and methods that say nothing."""

    def walk(node: ast.Module | ast.ClassDef) -> Iterator[str]:
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if child.name.startswith("_"):
                continue
            inherited = isinstance(node, ast.ClassDef) and node.bases and child.name in INHERITED
            if not ast.get_docstring(child) and not inherited:
                yield f"{child.lineno}: {child.name} has no docstring"
            if isinstance(child, ast.ClassDef):
                yield from walk(child)

    return ([] if ast.get_docstring(tree) else ["1: the module has no docstring"]) + list(walk(tree))


def long_functions(tree: ast.AST) -> list[str]:
    """Return functions of more than 60 lines."""
    return [
        f"{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]


def long_test_names(tree: ast.AST) -> list[str]:
    """Return names of tests that have 60 characters or more."""
    names = [(n.lineno, n.name) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"]
    return [f"{line}: {name} has {len(name)} characters" for line, name in names if len(name) >= 60]


def unnamed_encodings(tree: ast.AST) -> list[str]:
    """Return calls that read or write text without naming its encoding, which then depends on the machine."""
    violations = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or {"encoding", None} & {keyword.arg for keyword in node.keywords}:
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else dotted(node.func)
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [str(value.value) for value in given if isinstance(value, ast.Constant)]
        default_mode = not modes and (not node.args or dotted(node.func) == "open")  # of path.open(), open(path)
        opens = name == "open" and (default_mode or any(re.fullmatch(r"[rwax]t?\+?", mode) for mode in modes))
        if opens or name in ("read_text", "write_text") or "text" in {keyword.arg for keyword in node.keywords}:
            violations.append(f"{node.lineno}: {name} names no encoding")
    return violations


def wandb_imports(tree: ast.Module) -> list[str]:
    """Return imports of W&B outside functions, for which a GPU machine without it could not collect the tests."""
    names = [(node.lineno, ast.unparse(node)) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [f"{line}: {name}" for line, name in names if re.match(r"(import|from) wandb\b", name)]


RULES: dict[Callable[[ast.Module], list[str]], list[Path]] = {
    global_effects: PACKAGE,
    device_names: PACKAGE,
    swallowed_exceptions: PACKAGE + SCRIPTS,
    ambiguous_names: PACKAGE + SCRIPTS,
    missing_docstrings: PACKAGE + SCRIPTS,
    long_functions: PACKAGE + SCRIPTS,
    unnamed_encodings: PACKAGE + SCRIPTS,
    long_test_names: TESTS,
    wandb_imports: TESTS,
}
NOT_ALLOWED = {
    "print(1)": global_effects,
    "def f():\n    torch.manual_seed(0)": global_effects,
    "x = torch.randn(3)": global_effects,
    "np.random.seed(0)": global_effects,
    "lightning.seed_everything(0)": global_effects,
    "x.to('cuda')": device_names,
    "f(device='cpu')": device_names,
    "x.cuda()": device_names,
    "try:\n    f()\nexcept Exception:\n    x = 1": swallowed_exceptions,
    "try:\n    f()\nexcept ValueError:\n    pass": swallowed_exceptions,
    "try:\n    f()\nexcept:\n    f()": swallowed_exceptions,
    "with contextlib.suppress(OSError):\n    f()": swallowed_exceptions,
    "for sigma in x:\n    f(sigma)": ambiguous_names,
    "def f(alpha):\n    pass": ambiguous_names,
    "a_prev = 1": ambiguous_names,
    "'''Text.'''\ndef f():\n    pass": missing_docstrings,
    "'''Text.'''\nclass A:\n    '''Text.'''\n    def f(self):\n        pass": missing_docstrings,
    "x = 1": missing_docstrings,
    "def f():\n" + "    x = 1\n" * 60: long_functions,
    "path.read_text()": unnamed_encodings,
    "path.open('w')": unnamed_encodings,
    "path.open()": unnamed_encodings,
    "open(path)": unnamed_encodings,
    "subprocess.run(command, text=True)": unnamed_encodings,
    f"def test_{55 * 'x'}():\n    pass": long_test_names,
    "from wandb.sdk import x": wandb_imports,
}
ALLOWED = {
    "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)": global_effects,
    "if x.device.type == 'cuda':\n    f()": device_names,
    "torch.load(path, map_location='cpu')": device_names,
    "torch.Generator().manual_seed(0)": global_effects,
    "try:\n    f()\nexcept Exception as error:\n    raise E from error": swallowed_exceptions,
    "try:\n    f()\nexcept OSError:\n    x = 1": swallowed_exceptions,
    "axes.grid(alpha=0.3)\nalpha_bar = sigma_hat = next(x)": ambiguous_names,
    "def f():\n" + "    x = 1\n" * 59: long_functions,
    "path.read_text(encoding='utf-8')\nopen(path, 'rb')\nImage.open('x.png')": unnamed_encodings,
    f"def test_{54 * 'x'}():\n    pass": long_test_names,
    "from wandb_files import x\ndef f():\n    import wandb": wandb_imports,
}


def lint_imports(folder: Path) -> tuple[bool, str]:
    """Check the contracts of pyproject.toml on the package in `folder`; return whether they hold, and the report."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode == 0, done.stdout


def test_imports_point_downwards() -> None:
    kept, report = lint_imports(ROOT)
    assert kept, report


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("evaluation/metrics.py", "from ddim.training.ema import EMA", "imports point downwards"),
        ("figures/layout.py", "import ddim.training.ema", "imports point downwards"),
        ("evaluation/job.py", "from ddim.figures import panels", "imports point downwards"),
        ("inference/compute.py", "from ddim.evaluation.job import Job", "imports point downwards"),
        ("data/images.py", "from ddim.networks import UNet", "imports point downwards"),
        ("networks/unet.py", "def f():\n    from ddim.checkpoints import load_model", "imports point downwards"),
        ("errors.py", "if TYPE_CHECKING:\n    from ddim.config import build", "imports point downwards"),
        ("training/spec.py", "if TYPE_CHECKING:\n    from ddim.training.run import train", "no circles"),
        ("diffusion/noise.py", "import numpy", "the method needs torch"),
        ("diffusion/spec.py", "from ddim.config import build", "the method needs torch"),
        ("checkpoints/model.py", "def f():\n    import torchvision.datasets", "heavy packages"),
        ("results/table.py", "import torch", "results need no torch"),
        ("evaluation/job.py", "from omegaconf import OmegaConf", "configuration stops at the scripts"),
    ],
)
def test_a_wrong_import_breaks_a_contract(tmp_path: Path, file: str, line: str, contract: str) -> None:
    shutil.copytree(ROOT / "ddim", tmp_path / "ddim", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "ddim" / file).open("a") as source:
        source.write(f"\n\n{line}\n")
    kept, report = lint_imports(tmp_path)
    assert not kept
    assert re.search(rf"{contract}.* BROKEN", report)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_follows(rule: Callable[[ast.Module], list[str]]) -> None:
    assert [f"{path.relative_to(ROOT)}:{w}" for path in RULES[rule] for w in rule(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize("source", NOT_ALLOWED)
def test_each_rule_catches_its_violation(source: str) -> None:
    assert NOT_ALLOWED[source](ast.parse(source))


@pytest.mark.parametrize("source", ALLOWED)
def test_each_rule_allows_correct_code(source: str) -> None:
    assert ALLOWED[source](ast.parse(source)) == []


def test_files_stay_readable() -> None:
    files = [*PACKAGE, *SCRIPTS, *TESTS]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > 350} == {}


def code_lines(node: ast.AST) -> int:
    """Lines of code without docstrings, comments and blanks; takes the docstrings out of `node`."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner):
            inner.body = inner.body[1:] or [ast.Pass()]
    return len(ast.unparse(node).splitlines())


BESIDE_THE_METHOD = {
    "score": 80,
    "variational_bound": 60,
    "inversion": 100,
    "gaussians": 30,
    "guidance": 110,
    "importance": 60,
    "learned_variance": 60,
    "likelihood": 140,
    "multinomial": 100,
}


def test_scripts_use_no_private_module_of_hydra() -> None:
    assert [path.name for path in SCRIPTS if "hydra._internal" in path.read_text()] == []


def test_the_method_stays_small() -> None:
    """A core that is read in an hour; other views of the method stand beside it."""
    files = (ROOT / "ddim" / "diffusion").glob("*.py")
    lines = {path.stem: code_lines(ast.parse(path.read_text())) for path in files}
    beside = {name: lines.pop(name) for name in BESIDE_THE_METHOD}
    assert 100 < sum(lines.values()) < 1340
    assert {name: n for name, n in beside.items() if n > BESIDE_THE_METHOD[name]} == {}


def test_every_sampling_rule_is_short() -> None:
    for name in ("rules", "solvers"):
        tree = ast.parse((ROOT / "ddim" / "diffusion" / f"{name}.py").read_text())
        rules = {node.name: code_lines(node) for node in tree.body if isinstance(node, ast.ClassDef)}
        assert len(rules) >= 5
        assert {rule: lines for rule, lines in rules.items() if lines > 40} == {}
