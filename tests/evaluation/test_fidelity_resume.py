"""A cell that another run began, or finished meanwhile."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_cells import forbid

from ddim.evaluation import fidelity, job
from ddim.evaluation.fidelity import EvaluateSpec, evaluate_cell
from ddim.results.records import RECORDS, RecordFile


def test_a_record_that_another_run_wrote_meanwhile_is_taken(
    spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run had no record yet when this one looked, and has ended when this one may begin."""
    first, _ = evaluate_cell(spec)
    find, looks = job.Cell.find, iter([True])
    monkeypatch.setattr(job.Cell, "find", lambda cell: None if next(looks, False) else find(cell))
    forbid(monkeypatch)
    assert evaluate_cell(spec) == (json.loads(json.dumps(first)), False)
    assert len(RecordFile(Path(spec.output_dir) / RECORDS).read()) == 1
    assert [*(Path(spec.output_dir) / job.UNFINISHED).glob("*/*")] == []


@pytest.mark.parametrize(("before", "after"), [(0, 13), (4, 13), (20, 5), (13, 0)])
def test_a_cell_that_goes_on_with_another_grid_shows_that_one(
    spec: EvaluateSpec, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And pictures are of all images, where only those of the second run are asked for."""
    undisturbed = dataclasses.replace(spec, grid=after, save_images=True, output_dir=f"{spec.output_dir}_other")
    expected, _ = evaluate_cell(undisturbed)
    with monkeypatch.context() as patch:
        real, calls = fidelity.generate_batch, iter(range(2))

        def interrupted(*arguments: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(fidelity, "generate_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_cell(dataclasses.replace(spec, grid=before))
    assert len([*Path(spec.output_dir).glob("unfinished/*/*.safetensors")]) == 2
    record, _ = evaluate_cell(dataclasses.replace(spec, grid=after, save_images=True))
    assert record["metrics"] == expected["metrics"]
    assert record.get("grid") == expected.get("grid")
    files = [
        {path.name: path.read_bytes() for path in Path(folder).rglob("*.png")}
        for folder in (spec.output_dir, undisturbed.output_dir)
    ]
    assert len(files[0]) == 20 + (after > 0)
    assert files[0] == files[1]


def test_another_range_of_images_is_another_cell(spec: EvaluateSpec) -> None:
    repeated = dataclasses.replace(spec, first=7, repeats=3)
    found = [single.prepare() for single in repeated.single]
    assert [cell.indices for cell in found] == [range(7, 27), range(27, 47), range(47, 67)]
    assert len({cell.key for cell in found}) == 3
    numbers = [evaluate_cell(single)[0]["metrics"]["fd_digits_classifier_20"] for single in repeated.single]
    assert len(set(numbers)) == 3
