"""Search times, sample with the printed command, evaluate with the file."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

pytestmark = pytest.mark.integration


@pytest.fixture
def tiny(make_checkpoint: Callable[..., Path], tmp_path: Path) -> str:
    return f"checkpoint={make_checkpoint(tmp_path / 'tiny.ckpt')}"


def test_a_searched_tau_is_used_by_the_printed_command(run: Run, tiny: str, tmp_path: Path) -> None:
    cpu = ("compute.device=cpu", "compute.batch_size=4")
    search = (tiny, "sampler=unipc", "sampler.S=2", "+sampler.kwargs.variant=B1", "n=1", "candidates=6", *cpu)
    found = run("search_tau", *search)
    assert (found.code, found.err) == (0, "")
    file = json.loads((tmp_path / "outputs" / "tau" / "unipc_S2.json").read_text())
    assert f"tau: {', '.join(map(str, file['tau']))}\n" in found.out
    table = [line.split() for line in found.out.splitlines()]
    for name, error in file["errors"].items():
        assert [name, f"{error['search']:.4g}", f"{error['held_out']:.4g}"] in table
    *_, script, used = found.out.splitlines()[-1].partition("python scripts/sample.py ")
    assert script
    sampled = run("sample", *shlex.split(used), "n=2", *cpu)
    assert (sampled.code, sampled.err) == (0, "")

    again = run("search_tau", *search)
    assert again.code == 2
    assert again.err.startswith("error: outputs/tau/unipc_S2.json exists already")

    times = ("sampler.spacing=outputs/tau/unipc_S2.json", "sampler=unipc")
    data = (tiny, "data=digits", "metric=digits_classifier", "n=2", "grid=0", "output_dir=out", *cpu)
    evaluated = run("evaluate", *data, *times, "sampler.S=null")
    assert (evaluated.code, evaluated.err) == (0, "")
    [record] = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert (record["spacing"], record["S"], record["sampler"]["tau"]) == ("unipc_S2", 2, file["tau"])
    assert "tau unipc_S2" in (tmp_path / "out" / "table.md").read_text()
