"""A line that is no record of an evaluation is refused with its number; what is accepted makes a report."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from made_records import record

from ddim.errors import UserError
from ddim.results import text
from ddim.results.html import render_page
from ddim.results.plots import timings
from ddim.results.protocol import completed
from ddim.results.records import RECORDS
from ddim.results.report import build_tables, sigma_hat_variants
from ddim.results.schema import OPTIONAL, REQUIRED, evaluation_records

COMPUTE = {"device": "d", "processes": 1, "batch_size": 7}
COMPLETE = record("η=0.0", 10, 1.0, kind="fidelity", first=0, paper=None, grid="grids/a.png", compute=COMPUTE)
VALUES = ["x", -1, 0, 1.5, 10**400, True, None, [], {}, [1], {"a": 1}, "\ud800\0", float("nan"), float("inf"), 1e308]


def write(folder: Path, *records: Any) -> Path:
    (folder / RECORDS).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder / RECORDS


def changed(path: str, value: Any) -> Any:
    made = copy.deepcopy(COMPLETE)
    *outer, last = path.split(".")
    node = made[outer[0]] if outer else made
    if value is KeyError:
        node.pop(last)
    else:
        node[last] = value
    return made


def test_records_of_today_and_of_earlier_versions_pass(tmp_path: Path) -> None:
    older = {
        key: value for key, value in COMPLETE.items() if key not in ("kind", "first", "paper", "grid", "compute", "n")
    }
    published = COMPLETE | {"reference": COMPLETE["reference"] | {"images": None}}
    between = changed("sampler.tau", [1, 500.5])  # as of a scheduler of diffusers
    records = [COMPLETE, older, published, between]
    assert evaluation_records(write(tmp_path, *records)).read() == records


@pytest.mark.parametrize("path", [*REQUIRED, *OPTIONAL])
def test_a_wrong_type_is_refused_with_its_line(tmp_path: Path, path: str) -> None:
    wrong: Any = "text" if str not in (REQUIRED | OPTIONAL)[path] else 5
    for value in (wrong, {"nested": [wrong]} if dict not in (REQUIRED | OPTIONAL)[path] else [wrong]):
        file = evaluation_records(write(tmp_path, COMPLETE, changed(path, value)))
        with pytest.raises(
            UserError, match=rf"records.jsonl, line 2, is damaged \({path}=.* must be .*delete that line"
        ):
            file.read()
        with pytest.raises(UserError, match="line 2"):
            file.find("another")


@pytest.mark.parametrize("path", [*REQUIRED, "compute.device"])
def test_a_missing_field_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match=f"line 1, is damaged .it lacks {path}"):
        evaluation_records(write(tmp_path, changed(path, KeyError))).read()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("S", 0),
        ("n", 0),
        ("first", -1),
        ("seed", 1 << 64),
        ("sampler.tau", ["1"]),
        ("metrics", {"a": "1"}),
        ("S", True),
    ],
)
def test_values_out_of_range_are_refused(tmp_path: Path, path: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"line 1, is damaged .*{path}"):
        evaluation_records(write(tmp_path, changed(path, value))).read()


@pytest.mark.parametrize("seed", range(4))
def test_a_record_is_refused_or_makes_a_report(tmp_path: Path, seed: int) -> None:
    """For anything in the place of any value: no other exception."""
    generator, accepted = random.Random(seed), 0
    for _ in range(60):
        made = copy.deepcopy(COMPLETE)
        for _ in range(generator.choice((1, 1, 2))):
            node: Any = generator.choice([made, *(value for value in made.values() if isinstance(value, dict))])
            name = generator.choice(list(node) or ["x"])
            node[name] = generator.choice(VALUES)
        try:
            records = evaluation_records(write(tmp_path, COMPLETE, made, made | {"S": 20})).read()
        except UserError:
            continue
        accepted += 1
        tables = [*build_tables(records), *sigma_hat_variants(records)]
        for write_text in (text.markdown, text.as_csv, text.as_json, text.latex):
            write_text(tables)
        complete = [completed(r) for r in records]
        text.timing_csv(complete)
        assert [timing.caption() for timing in timings(complete)]
        assert render_page([], [], records, tmp_path, None, ())
    assert 0 < accepted < 60
