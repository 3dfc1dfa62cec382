"""A damaged manifest is refused, what could not start is not in it, and leftovers of killed runs are removed."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.shards import Shards
from ddim.evaluation.sweep import MANIFEST, NOT_STARTED, Manifest, remove_leftovers
from ddim.results.records import RECORDS, RecordFile


def with_steps(spec: EvaluateSpec, *steps: int) -> list[EvaluateSpec]:
    return [dataclasses.replace(spec, sampler=dataclasses.replace(spec.sampler, S=S)) for S in steps]


def states(folder: Path) -> list[tuple[str, str]]:
    content = json.loads((folder / MANIFEST).read_text())
    return [(job["title"], job["state"]) for job in content["cells"].values()]


def test_a_job_that_could_not_start_is_no_result(spec: EvaluateSpec, tmp_path: Path) -> None:
    two, three, four = with_steps(spec, 2, 3, 4)
    manifest = Manifest(tmp_path)
    manifest.plan("command", [two, three])
    manifest.note(three, "done")
    for one in (two, three, four):  # four was not planned, as a single evaluation is not
        manifest.note(one, NOT_STARTED, "no such file")
    assert manifest.failures() == []
    assert manifest.take_not_started() == [(two.title, "no such file")]
    assert manifest.take_not_started() == []
    assert states(tmp_path) == [(three.title, "done")]
    manifest.plan("command", [two])
    manifest.note(two, NOT_STARTED, "no such file")
    manifest.plan("command", [four])  # after a kill
    assert states(tmp_path) == [(three.title, "done"), (four.title, "planned")]


def test_an_impossible_job_of_a_sweep_is_skipped(spec: EvaluateSpec, tmp_path: Path) -> None:
    two, three = with_steps(spec, 2, 3)
    manifest = Manifest(tmp_path)
    assert not manifest.skip(two, "odd only")  # a single evaluation, which fails
    assert [*tmp_path.iterdir()] == []
    manifest.plan("command", [two])
    assert manifest.skip(two, "odd only")
    assert not manifest.skip(two, "odd only")  # a single one, after the sweep
    assert not manifest.skip(three, "odd only")
    assert (manifest.impossible(), manifest.failures()) == ([(two.title, "odd only")], [])
    assert manifest.take_not_started() == []


JOBS = b'{"command": null, "cells": {"a": %s}}'
NO_MANIFESTS = [
    *(b"", b"[]", b"{}", b"5", b"null", bytes(20), b'{"command": null, "cells": {"a": {"ti', b"\xff", b"[" * 100_000),
    *(b'{"command": 5, "cells": {}}', b'{"cells": []}'),
    *(JOBS % job for job in (b"5", b"[]", b"{}", b'{"title": 1, "state": "failed"}', b'{"title": "x", "state": []}')),
    JOBS % b'{"title": "x", "state": "failed", "reason": {}}',
]


@pytest.mark.parametrize("content", NO_MANIFESTS, ids=lambda content: repr(content[-40:]))
def test_damaged_manifests_are_refused(spec: EvaluateSpec, tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    manifest = Manifest(tmp_path)
    uses: list[Callable[[], object]] = [
        *(manifest.read, manifest.failures, manifest.take_not_started),
        *(lambda: manifest.plan("command", [spec]), lambda: manifest.note(spec, "done")),
    ]
    for use in uses:
        with pytest.raises(UserError, match=r"manifest\.json is damaged .*; delete it: "):
            use()
    assert (tmp_path / MANIFEST).read_bytes() == content


def test_a_huge_or_endless_manifest_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(UserError, match="it has more than"):
        Manifest(tmp_path).read()
    (tmp_path / MANIFEST).unlink()
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(UserError, match="is a fifo"):
        Manifest(tmp_path).read()


def test_any_text_can_be_noted(spec: EvaluateSpec, tmp_path: Path) -> None:
    """Also names of files in another encoding."""
    manifest, command = Manifest(tmp_path), "evaluate.py checkpoint=caf\udce9 η"
    manifest.plan(command, [spec])
    manifest.note(spec, "failed", "caf\udce9")
    assert (manifest.read()["command"], manifest.failures()) == (command, [(spec.title, "caf\udce9")])


def test_leftovers_of_killed_runs_are_removed(spec: EvaluateSpec, tmp_path: Path) -> None:
    records = RecordFile(tmp_path / RECORDS)
    records.append({"key": "finished"})
    records.append({"key": "locked"})
    kept = ["unfinished/begun/a", "unfinished/locked/a", "table.md", ".hidden", "grids/S0002_x.png", "wandb/.1_file"]
    stale = [
        ".0123456789abcdef_table.md",
        ".4711_manifest.json",
        "grids/.0123456789abcdef_a.png",
        "images/S2/.12_0.png",
    ]
    for name in ("unfinished/finished/a", *kept, *stale):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def names() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {RECORDS}

    with Shards(tmp_path / "unfinished" / "locked", range(1)).lock():
        remove_leftovers(tmp_path, records)
        assert names() >= {*kept, *stale}  # whoever computes there may be writing one of them
        assert "unfinished/finished/a" not in names()
    remove_leftovers(tmp_path, records)
    assert {name for name in names() if not name.endswith(".lock")} == {*kept} - {"unfinished/locked/a"}
