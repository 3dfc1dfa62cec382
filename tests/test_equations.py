"""docs/equations.md names functions and tests that exist; and the equations that no other test transcribes."""

import ast
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim import DDIM, linear_schedule, step
from ddim.diffusion.prediction import eps_from_x0, x0_from_eps

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "equations.md"
HEADER = ["Equation", "Formula", "Function", "Test"]
COVERED = (
    *("4", "5", "7", "9", "10", "12", "13", "14", "16", "67", "C.1", "D.2, linear", "D.2, quadratic", "D.3"),
    *("5.4, encoding", "5.4, reconstruction", "DDPM's posterior", "`uniform`", "`quad`", "`ddpm_noisy`"),
    *("EMA", "Time shift", "Pixel range", "Schedule"),
)
SCHEDULE = linear_schedule(1000)
STEPS = [(1000, 900), (500, 499), (21, 1), (1, 0)]


def rows(text: str) -> list[list[str]]:
    """Return every row of the tables that have HEADER, split into columns."""
    result: list[list[str]] = []
    inside = False
    for line in text.splitlines():
        columns = [text.strip() for text in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if columns == HEADER:
            inside = True
        elif not columns:
            inside = False
        elif inside and not set("".join(columns)) <= {"-"}:
            result.append(columns)
    return result


def problems(row: list[str]) -> list[str]:
    """Return what is wrong with a row: no function or test, or one that does not exist."""
    if len(row) != len(HEADER):
        return [f"{row[0]}: {len(row)} columns instead of {len(HEADER)}"]
    equation, _, functions, tests = row
    wrong = []
    for name in (names := re.findall(r"`([^`]+)`", functions)):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            wrong.append(f"{equation}: there is no {name}")
    for test in (paths := re.findall(r"`([^`]+)`", tests)):
        file, _, function = test.partition("::")
        tree = ast.parse((ROOT / file).read_text()) if (ROOT / file).is_file() else ast.Module([], [])
        if function not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            wrong.append(f"{equation}: there is no {test}")
    return wrong + [f"{equation}: no {what} is named" for what, n in (("function", names), ("test", paths)) if not n]


def test_every_function_and_test_of_the_document_exists() -> None:
    assert [problem for row in rows(DOCUMENT.read_text()) for problem in problems(row)] == []


@pytest.mark.parametrize("equation", COVERED)
def test_the_document_covers(equation: str) -> None:
    assert any(re.match(re.escape(equation) + r"(\W|$)", row[0]) for row in rows(DOCUMENT.read_text()))


def test_a_wrong_row_is_found() -> None:
    good = "`tests/test_equations.py::test_a_wrong_row_is_found`"
    assert problems(["1", "x", "`ddim.diffusion.rules.DDIM.coefficients` and `ddim.sample`", good]) == []
    assert problems(["1", "x", "`ddim.diffusion.rules.DDIM.coefficient`", good])
    assert problems(["1", "x", "`ddim.diffusion.samplings`", good])
    assert problems(["1", "x", "", good])
    assert problems(["1", "x", "`ddim.sample`", "`tests/test_equations.py::test_nothing`"])
    assert problems(["1", "x", "`ddim.sample`", "`tests/test_nothing.py::test_a_wrong_row_is_found`"])
    assert problems(["1", "x", "`ddim.sample`", "none"])
    assert problems(["1", "a norm | with a bar", "`ddim.sample`", good, "too many"])


# ---------------------------------------------------------------- transcriptions


def alpha_bar() -> np.ndarray:
    """Return the paper's alpha_0 .. alpha_1000, computed independently of ddim."""
    return np.concatenate([[1.0], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))])


def draw(*counts: int) -> torch.Tensor:
    return torch.randn(*counts, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("t", "s"), STEPS)
def test_equation_7_is_the_step_from_the_true_x0(t: int, s: int, eta: float) -> None:
    x_t, x_0, z = draw(3, 2)
    a = alpha_bar()
    std = eta * np.sqrt((1 - a[s]) / (1 - a[t])) * np.sqrt(1 - a[t] / a[s])
    mean = np.sqrt(a[s]) * x_0 + np.sqrt(1 - a[s] - std**2) * (x_t - np.sqrt(a[t]) * x_0) / np.sqrt(1 - a[t])
    eps = eps_from_x0(x_0, x_t, SCHEDULE[t])
    assert torch.allclose(step(DDIM(eta), x_0, eps, SCHEDULE[t], SCHEDULE[s], z), mean + std * z, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("t", "s"), STEPS)
def test_lemma_1_marginals_do_not_depend_on_eta(t: int, s: int, eta: float) -> None:
    """From x_t ~ N(sqrt(a_t) x_0, 1 - a_t) a step leads to x_s ~ N(sqrt(a_s) x_0, 1 - a_s)."""
    a = alpha_bar()
    eps, z = draw(2, 20_000)
    x_0 = torch.tensor(0.7, dtype=torch.float64)
    x_t = np.sqrt(a[t]) * x_0 + np.sqrt(1 - a[t]) * eps
    x_s = step(DDIM(eta), x_0, eps_from_x0(x_0, x_t, SCHEDULE[t]), SCHEDULE[t], SCHEDULE[s], z)
    assert float(x_s.mean()) == pytest.approx(np.sqrt(a[s]) * 0.7, abs=5 / np.sqrt(x_s.numel()))
    assert float(x_s.var()) == pytest.approx(1 - a[s], rel=0.02, abs=1e-12)


@pytest.mark.parametrize(("t", "s"), [*STEPS, (1, 30), (900, 1000)])
def test_equation_13_is_the_deterministic_step(t: int, s: int) -> None:
    """Upwards as well; in x / sqrt(a) and sqrt((1 - a) / a) it is Euler's step for Eq. 14."""
    x_t, eps = draw(2, 2)
    a = alpha_bar()
    expected = np.sqrt(a[s]) * (x_t / np.sqrt(a[t]) + (np.sqrt((1 - a[s]) / a[s]) - np.sqrt((1 - a[t]) / a[t])) * eps)
    x_0 = x0_from_eps(eps, x_t, SCHEDULE[t])
    assert torch.allclose(step(DDIM(0.0), x_0, eps, SCHEDULE[t], SCHEDULE[s]), expected, atol=1e-10)
