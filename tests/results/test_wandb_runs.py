"""A sweep on W&B: one group with a run for each evaluation and one for the report. No test needs a network."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from made_records import FID, record
from PIL import Image

from ddim.config import build
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.results.records import RecordFile
from ddim.results.report import write_report
from ddim.results.wandb import LoggerSpec, SweepLogger

pytestmark = pytest.mark.integration
OFFLINE = LoggerSpec(wandb=True, offline=True, project="p", tags=("a",))


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Return the options and the logged values of each run; all of W&B's files are in tmp_path, without an account."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    for name in ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name, value in {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(name, value)
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


def test_sweep_is_a_group_with_a_run_for_each_record(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    folder = tmp_path / "out"
    records = [evaluation(folder, S, shade=S) for S in (10, 20)]
    for made in records:
        RecordFile(folder / "records.jsonl").append(made)
    for _ in range(2):  # the second time, the evaluations already have their runs
        logger = SweepLogger(OFFLINE, "tiny", folder)
        logger.check()
        for made in records:
            logger.log_evaluation(made, f"η=0.0 S={made['S']}")
    logger.log_report(write_report(records, folder))
    groups = {(run["project"], run["group"], run["mode"], *run["tags"]) for run in started}
    assert groups == {("p", "tiny", "offline", "a")}
    assert [(run["job_type"], run["name"]) for run in started] == [
        ("evaluate", "η=0.0 S=10"),
        ("evaluate", "η=0.0 S=20"),
        ("report", "tiny table"),
    ]
    for run, made in zip(started, records, strict=False):
        assert run["logged"][FID] == made["metrics"][FID]
        assert run["config"]["protocol"]["sampler"]["tau"] == made["sampler"]["tau"]
        assert run["config"]["protocol"]["metric"] == made["metric"]
        assert json.dumps(run["config"])
    logged = started[-1]["logged"]
    table = logged["table"]
    by_steps = {row[table.columns.index("S")]: row[table.columns.index("value")] for row in table.data}
    assert by_steps == {made["S"]: made["metrics"][FID] for made in records}
    assert {"table", "report", f"plot_{FID}"} <= set(logged)
    wandb.teardown()
    media = [path for path in folder.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()]
    assert {".png", ".json", ".html"} <= {path.suffix for path in media}
    grids = {(folder / made["grid"]).read_bytes() for made in records}
    assert grids <= {path.read_bytes() for path in media}


def test_report_is_one_continued_run(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    RecordFile(tmp_path / "records.jsonl").append(record("η=0.0", 10, 1.0))
    for _ in range(2):
        SweepLogger(OFFLINE, "tiny", tmp_path).log_report([])
    first, second = started
    assert (first["id"], second["id"]) == (None, (tmp_path / "wandb" / "runs" / "report").read_text())


def test_group_can_be_named(tmp_path: Path, started: list[dict[str, Any]]) -> None:
    named = dataclasses.replace(OFFLINE, group="mine")
    SweepLogger(named, "tiny", tmp_path).log_evaluation(record("η=0.0", 10, 1.0), "title")
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
    logger, made = SweepLogger(OFFLINE, "tiny", tmp_path), record("η=0.0", 10, 1.0)
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


def test_the_limits_of_names_are_those_of_wandb() -> None:
    spec = LoggerSpec(wandb=True, project="p" * 128, tags=("t" * 64,))
    wandb.Settings(project=spec.project, run_tags=spec.tags)
    for refused in ({"project": "p" * 129}, {"project": "a/b"}, {"run_tags": ("t" * 65,)}):
        with pytest.raises((ValueError, wandb.errors.UsageError)):
            wandb.Settings(**refused)  # type: ignore[arg-type]
