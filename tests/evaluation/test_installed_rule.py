"""A rule of another package, registered by an entry point: the example of docs/samplers.md, up to the table."""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ddim import SamplerSpec, initial_noise, linear_schedule, linear_tau, sample
from ddim.diffusion.labels import row_label
from ddim.diffusion.registry import _entry_points
from ddim.diffusion.solvers import DPMSolverPP
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.results.report import write_report
from ddim.testing import check_order

PAGE = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
MODULE = PAGE.split("## Write a rule")[1].split("```python\n")[1].split("```")[0]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put the module of the documents on the path, and a package that registers what is asked for."""

    def write(entry: str) -> None:
        (tmp_path / "my_solvers.py").write_text(MODULE)
        info = tmp_path / "my_solvers-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-solvers\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ddim.samplers]\n{entry}\n")
        monkeypatch.syspath_prepend(tmp_path)
        _entry_points.cache_clear()

    yield write
    sys.modules.pop("my_solvers", None)
    _entry_points.cache_clear()


def test_a_rule_from_outside_gets_its_row(install: Callable[[str], None], spec: EvaluateSpec, tmp_path: Path) -> None:
    entry = re.search(r'`(my_2m = .+?)` below `\[project.entry-points."ddim.samplers"\]`', PAGE)
    assert entry is not None
    install(entry[1].replace('"', ""))
    sampler = SamplerSpec("my_2m", None, S=4)
    rule = sampler.build_rule()
    assert check_order(rule)["mixture"] == pytest.approx(2, abs=0.15)

    x_T, tau = initial_noise(range(3), (1, 2, 2), seed=0).double(), linear_tau(1000, 9)
    arguments = (lambda x, t: torch.tanh(x), linear_schedule(1000), x_T, tau)
    ours = sample(*arguments, DPMSolverPP(2, lower_order_below=0))
    torch.testing.assert_close(sample(*arguments, rule), ours, rtol=0, atol=1e-10)

    record, _ = evaluate(dataclasses.replace(spec, sampler=sampler))
    assert (record["sampler"]["rule"], record["label"], record["nfe"]) == ("my_2m", "my 2M", 4)
    write_report([record], tmp_path / "report")
    assert "my 2M" in (tmp_path / "report" / "table.md").read_text()
    assert "my 2M" in (tmp_path / "report" / "report.html").read_text()


def test_a_rule_without_label_is_named_by_class_and_arguments(install: Callable[[str], None]) -> None:
    install("other = ddim.diffusion.solvers:AdamsBashforth")
    assert row_label(SamplerSpec("other", None, order=3)) == "AdamsBashforth (order=3)"


@pytest.mark.parametrize(
    ("entry", "name", "message"),
    [
        (
            "my_2m = my_solvers:TwoM",
            "my_3m",
            r"'my_3m' is not known; allowed: ddim, .*, multinomial, my_2m, diffusers\.",
        ),
        ("ddim = my_solvers:TwoM", "ddim", "rule=ddim exists already, and my_solvers:TwoM has the same name"),
        ("mine = my_solvers:Three", "mine", "cannot be loaded from my_solvers:Three: .* no attribute 'Three'"),
        ("mine = not_there:TwoM", "mine", "cannot be loaded from not_there:TwoM: No module named 'not_there'"),
        ("mine = math:pi", "mine", "math:pi, which is no subclass of"),
    ],
)
def test_rules_that_cannot_be_used_are_refused(
    install: Callable[[str], None], entry: str, name: str, message: str
) -> None:
    install(entry)
    with pytest.raises(ValueError, match=message):
        SamplerSpec(name, None)
