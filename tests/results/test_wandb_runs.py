"""A sweep on W&B: one run with charts and tables, and by option one for each evaluation. No test needs a network."""

import dataclasses
import re
from base64 import b64encode
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest
from made_records import FID, record
from PIL import Image
from wandb_files import isolate_wandb, offline_runs

from ddim.config import build
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.results.records import Record, RecordFile
from ddim.results.report import write_report
from ddim.results.wandb import LoggerSpec, SweepLogger

wandb = pytest.importorskip("wandb")  # a GPU machine may have none
pytestmark = pytest.mark.integration
OFFLINE = LoggerSpec(wandb=True, offline=True, project="p", tags=("a",), notes="why")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Return the options and the logged values of each run; all of W&B's files are in tmp_path, without an account."""
    isolate_wandb(monkeypatch, tmp_path / "home")
    real, runs = wandb.init, []

    def init(**options: Any) -> Any:
        run = real(**options)
        runs.append({**options, "logged": {}})
        log = run.log
        run.log = lambda values: (runs[-1]["logged"].update(values), log(values))
        return run

    monkeypatch.setattr(wandb, "init", init)
    yield runs
    wandb.teardown()


def evaluation(folder: Path, S: int, shade: int = 0) -> Any:
    """Return a record whose grid is in the folder."""
    grid = f"grids/{S}.png"
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(folder / grid)
    return record("η=0.0", S, 100.0 / S, grid=grid)


def sweep_of(folder: Path, spec: LoggerSpec) -> list[Record]:
    """Log three evaluations and the report, as a command does; return the records."""
    records = [evaluation(folder, S, shade=S) for S in (10, 20)]
    records.append(record("η=1.0", 10, 30.0, training_run="p/abc"))
    for made in records:
        RecordFile(folder / "records.jsonl").append(made)
    logger = SweepLogger(spec, "tiny", folder)
    logger.check()
    for made in records:
        logger.log_evaluation(made, f"{made['label']} S={made['S']}")
    logger.log_report(write_report(records, folder))
    return records


@pytest.mark.usefixtures("started")
def test_a_sweep_is_one_run_with_a_chart_and_tables(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    records = sweep_of(folder, OFFLINE)
    (run,) = offline_runs(folder)
    assert (run.run.project, run.run.display_name, run.run.run_group) == ("p", "tiny", "tiny")
    assert (run.run.job_type, list(run.run.tags), run.run.notes) == ("sweep", ["a"], "why")
    assert run.charts == {f"chart_{FID}": {"x": "S", "y": FID, "stroke": "sampler"}}
    expected = {(made["label"], made["S"]): made["metrics"][FID] for made in records}
    chart, table, evaluations = map(run.table, (f"chart_{FID}_table", "table", "evaluations"))
    assert {(row["sampler"], row["S"]): row[FID] for row in chart} == expected
    assert {(row["sampler"], row["S"]): row["value"] for row in table} == expected
    assert {(row["sampler"], row["S"]): row[FID] for row in evaluations} == expected
    assert [row["checkpoint"] for row in evaluations] == ["/somewhere/else"] * 3
    assert (run.config["training_run"], run.config["checkpoint"]) == ("p/abc", "/somewhere/else")
    assert (run.summary[FID], run.summary[f"{FID}_at"]) == (5.0, "η=0.0 S=20")
    grids = [(folder / made["grid"]).read_bytes() for made in records if "grid" in made]
    assert run.table_images("evaluations") == {b64encode(md5(grid).digest()).decode() for grid in grids}
    assert {"report", f"plot_{FID}"} <= set().union(*run.rows)


def test_evaluations_of_other_times_or_images_are_told_apart(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    changes: list[dict[str, Any]] = [{}, {"spacing": "uniform"}, {"first": 50_000}]
    for value, change in zip((5.0, 4.0, 6.0), changes, strict=True):
        RecordFile(folder / "records.jsonl").append(record("σ̂", 10, value, **change))
    SweepLogger(OFFLINE, "tiny", folder).log_report([])
    columns, rows = (getattr(started[0]["logged"]["evaluations"], name) for name in ("columns", "data"))
    seen = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [(row["spacing"], row["first"], row[FID]) for row in seen] == [
        ("quad", 0, 5.0),
        ("uniform", 0, 4.0),
        ("quad", 50_000, 6.0),
    ]
    (run,) = offline_runs(folder)
    assert run.summary[FID] == 4.0
    assert re.fullmatch(r"σ̂ S=10; .*tau uniform.*", run.summary[f"{FID}_at"])


@pytest.mark.usefixtures("started")
def test_each_evaluation_is_a_run_if_asked_for(tmp_path: Path) -> None:
    spec = dataclasses.replace(OFFLINE, per_evaluation=True)
    records = sweep_of(tmp_path / "out", spec)
    *single, sweep = offline_runs(tmp_path / "out")
    assert [(run.run.job_type, run.run.display_name) for run in (*single, sweep)] == [
        *(("evaluate", f"{made['label']} S={made['S']}") for made in records),
        ("sweep", "tiny"),
    ]
    for run, made in zip(single, records, strict=True):
        assert run.rows[0][FID] == made["metrics"][FID]
        assert run.config["protocol"]["sampler"]["tau"] == made["sampler"]["tau"]
        assert run.config["protocol"]["metric"] == made["metric"]
    SweepLogger(spec, "tiny", tmp_path / "out").log_evaluation(records[0], "again")  # which has its run
    assert len(offline_runs(tmp_path / "out")) == 4
    lean = {key: value for key, value in records[0].items() if not key.startswith("seconds_")}  # without its picture
    SweepLogger(spec, "tiny", tmp_path / "out").log_evaluation(lean | {"grid": "gone.png", "key": "lean"}, "lean")
    assert len(offline_runs(tmp_path / "out")) == 5


@pytest.mark.usefixtures("started")
def test_a_long_sweep_is_logged_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RecordFile(tmp_path / "records.jsonl").append(record("η=0.0", 10, 1.0))
    logger = SweepLogger(OFFLINE, "tiny", tmp_path)
    logger.log_evaluation(record("η=0.0", 10, 1.0), "title")
    assert offline_runs(tmp_path) == []
    monkeypatch.setattr(logger, "updated", logger.updated - 301)
    for _ in range(2):
        logger.log_evaluation(record("η=0.0", 10, 1.0), "title")
    (run,) = offline_runs(tmp_path)
    assert run.table("table")[0]["value"] == 1.0


def test_an_evaluation_is_linked_to_the_artifact_it_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    class Run:
        id = "abc"
        log = summary = staticmethod(dict)

        def __enter__(self) -> "Run":
            return self

        def __exit__(self, *_: object) -> None: ...

        use_artifact = staticmethod(used.append)

    Run.summary = {}  # type: ignore[assignment]
    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    path = "outputs/artifacts/team/p/model-abc/v3/model.ckpt"
    for number, config in enumerate(({"checkpoint": path}, {"checkpoint": "/a/last.ckpt"})):
        RecordFile(tmp_path / "records.jsonl").append(record("η=0.0", 10 + number, 1.0, config=config))
    SweepLogger(dataclasses.replace(OFFLINE, offline=False), "tiny", tmp_path).log_report([])
    assert used == ["team/p/model-abc:v3"]


def test_report_is_one_continued_run(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    RecordFile(tmp_path / "records.jsonl").append(record("η=0.0", 10, 1.0))
    for _ in range(2):
        SweepLogger(OFFLINE, "tiny", tmp_path).log_report([])
    first, second = started
    assert (first["id"], second["id"]) == (None, (tmp_path / "wandb" / "runs" / "report").read_text())


def test_group_can_be_named(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    RecordFile(tmp_path / "records.jsonl").append(record("η=0.0", 10, 1.0))
    SweepLogger(dataclasses.replace(OFFLINE, group="mine"), "tiny", tmp_path).log_report([])
    assert started[0]["group"] == "mine"


def test_nothing_is_logged_unless_asked_for(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    logger = SweepLogger(LoggerSpec(), "tiny", tmp_path / "out")
    logger.check()
    logger.log_evaluation(record("η=0.0", 10, 1.0), "title")
    logger.log_report([])
    assert started == []
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("started")
def test_missing_account_is_reported_before_sampling(tmp_path: Path) -> None:
    online = dataclasses.replace(OFFLINE, offline=False)
    with pytest.raises(UserError, match=r"W&B refused to start .*run `wandb login`, or choose logger=wandb_offline"):
        SweepLogger(online, "tiny", tmp_path).check()


def test_failed_run_is_reported_and_logged_again(
    tmp_path: Path, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(OFFLINE, per_evaluation=True)
    logger, made = SweepLogger(spec, "tiny", tmp_path), record("η=0.0", 10, 1.0)
    with monkeypatch.context() as patch:

        def fail(**_: Any) -> None:
            raise wandb.errors.CommError("the connection\nwas lost")

        patch.setattr(wandb, "init", fail)
        with pytest.raises(UserError, match=r"W&B failed \(the connection was lost\); run the same command again"):
            logger.log_evaluation(made, "title")
    logger.log_evaluation(made, "title")
    assert len(started) == 1


def test_tensorboard_is_refused_for_evaluation(spec: EvaluateSpec) -> None:
    with pytest.raises(ValueError, match="tensorboard is for training"):
        dataclasses.replace(spec, logger=LoggerSpec(tensorboard=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tags": ["x" * 65]}, "logger: tags: 'x+' has 65 characters; W&B takes tags of 1 to 64"),
        ({"tags": ["a", ""]}, "logger: tags: '' has 0 characters; W&B takes tags of 1 to 64"),
        *(
            ({"project": f"a{mark}b"}, "logger: project='a.+b' must have 1 to 128 characters, none")
            for mark in "/\\#?%:"
        ),
        ({"project": ""}, "logger: project='' must have 1 to 128 characters"),
        ({"project": "x" * 129}, "logger: project='x+' must have 1 to 128 characters"),
        ({"entity": "team/x"}, "logger: entity='team/x' must have 1 to 128 characters"),
    ],
)
def test_what_wandb_would_refuse_is_refused_at_once(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(LoggerSpec, {"wandb": True, **values}, "logger")
    build(LoggerSpec, values, "logger")  # without W&B nobody minds


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wandb": True, "log_model": "last"}, "logger.log_model='last' is not known; allowed: all, best, False"),
        ({"log_model": "all"}, "logger: log_model is for W&B; choose logger=wandb or logger=wandb_offline"),
        ({"per_evaluation": True}, "logger: per_evaluation is for W&B"),
    ],
)
def test_options_of_wandb_need_wandb(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(LoggerSpec, values, "logger")


def test_the_limits_of_names_are_those_of_wandb() -> None:
    spec = LoggerSpec(wandb=True, project="p" * 128, tags=("t" * 64,))
    wandb.Settings(project=spec.project, run_tags=spec.tags)
    for refused in ({"project": "p" * 129}, {"project": "a/b"}, {"run_tags": ("t" * 65,)}):
        with pytest.raises((ValueError, wandb.errors.UsageError)):
            wandb.Settings(**refused)  # type: ignore[arg-type]


def test_images_that_no_model_here_made_are_logged(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    made = {key: value for key, value in record("cats", 5, 3.0).items() if key not in ("model", "sampler")}
    images = {"name": "cats", "images": made["n"], "fingerprint": "f"}
    RecordFile(tmp_path / "records.jsonl").append(made | {"kind": "images", "images": images})
    SweepLogger(OFFLINE, "tiny", tmp_path).log_report([])
    columns, [row] = (getattr(started[0]["logged"]["evaluations"], name) for name in ("columns", "data"))
    values = dict(zip(columns, row, strict=True))
    assert (values["sampler"], values["weights"], values[FID]) == ("cats", None, 3.0)
