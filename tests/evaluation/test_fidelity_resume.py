"""An evaluation that another run began, or finished meanwhile."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_fidelity import forbid

from ddim.evaluation import job
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.session import Session
from ddim.inference import generate
from ddim.results.records import RECORDS, RecordFile

pytestmark = pytest.mark.integration


def test_a_record_written_meanwhile_is_used(
    spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other run had no record yet when this one looked, and has ended when this one may begin."""
    first, _ = evaluate(spec)
    find, looks = job.Job.find_record, iter([True])
    monkeypatch.setattr(job.Job, "find_record", lambda job: None if next(looks, False) else find(job))
    forbid(monkeypatch)
    assert evaluate(spec) == (json.loads(json.dumps(first)), False)
    assert not caplog.messages
    assert evaluate(dataclasses.replace(spec, save_images=True)) == (json.loads(json.dumps(first)), False)
    assert "its images were not kept; output_dir=OTHER makes them" in caplog.text
    assert len(RecordFile(Path(spec.output_dir) / RECORDS).read()) == 1
    assert [*(Path(spec.output_dir) / job.UNFINISHED).glob("*/*")] == []


@pytest.mark.parametrize(("before", "after"), [(0, 13), (4, 13), (20, 5), (13, 0)])
def test_a_continued_evaluation_shows_the_new_grid(
    spec: EvaluateSpec, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And pictures are of all images, where only those of the second run are asked for."""
    undisturbed = dataclasses.replace(spec, grid=after, save_images=True, output_dir=f"{spec.output_dir}_other")
    expected, _ = evaluate(undisturbed)
    with monkeypatch.context() as patch:
        real, calls = generate.generate_batch, iter(range(2))

        def interrupted(*arguments: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(generate, "generate_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(dataclasses.replace(spec, grid=before))
    assert len([*Path(spec.output_dir).glob("unfinished/*/*.safetensors")]) == 2
    record, _ = evaluate(dataclasses.replace(spec, grid=after, save_images=True))
    assert record["metrics"] == expected["metrics"]
    assert record.get("grid") == expected.get("grid")
    files = [
        {path.name: path.read_bytes() for path in Path(folder).rglob("*.png")}
        for folder in (spec.output_dir, undisturbed.output_dir)
    ]
    assert len(files[0]) == 20 + (after > 0)
    assert files[0] == files[1]


def test_ranges_of_images_have_different_keys(spec: EvaluateSpec) -> None:
    repeated = dataclasses.replace(spec, first=7, repeats=3)
    jobs = [spec.prepare(Session()) for spec in repeated.repetitions]
    assert [job.indices for job in jobs] == [range(7, 27), range(27, 47), range(47, 67)]
    assert len({job.key for job in jobs}) == 3
    numbers = [evaluate(spec)[0]["metrics"]["fd_digits_classifier_20"] for spec in repeated.repetitions]
    assert len(set(numbers)) == 3
