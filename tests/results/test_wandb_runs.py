"""What W&B gets of a sweep: one group, a run for each cell and one for the table. Nothing needs a network."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.results.records import RecordFile
from ddim.results.report import write_report
from ddim.results.wandb import Dashboard, LoggerSpec

OFFLINE = LoggerSpec(wandb=True, offline=True, project="p", tags=("a",))


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """How runs are started, and what they log; everything of W&B lies below tmp_path, and no account is known."""
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


@pytest.fixture
def spec(spec: EvaluateSpec) -> EvaluateSpec:
    return dataclasses.replace(spec, sampler=SamplerSpec(S=3), n=12, grid=4, logger=OFFLINE)


def test_a_sweep_is_one_group_with_a_run_for_each_cell_and_one_for_the_table(
    spec: EvaluateSpec, started: list[dict[str, Any]]
) -> None:
    folder = Path(spec.output_dir)
    for _ in range(2):  # the second time, the cells have their runs already
        dashboard = Dashboard(spec.logger, spec.name, folder)
        dashboard.check()
        for S in (2, 3):
            cell = dataclasses.replace(spec, sampler=SamplerSpec(S=S))
            dashboard.log_cell(evaluate(cell)[0], cell.title)
    records = RecordFile(folder / "records.jsonl").read()
    paths = write_report(records, folder)
    dashboard.log_report(paths)
    assert {(run["project"], run["group"], run["mode"], *run["tags"]) for run in started} == {
        ("p", "tiny", "offline", "a")
    }
    assert [(run["job_type"], run["name"]) for run in started] == [
        ("evaluate", "η=0.0 S=2 linear"),
        ("evaluate", "η=0.0 S=3 linear"),
        ("report", "tiny table"),
    ]
    for run, record in zip(started, records, strict=False):
        assert run["logged"]["fd_digits_classifier_12"] == record["metrics"]["fd_digits_classifier_12"]
        assert run["config"]["protocol"]["sampler"]["tau"] == record["sampler"]["tau"]
        assert run["config"]["protocol"]["metric"] == record["metric"]
        assert json.dumps(run["config"])
    logged = started[-1]["logged"]
    table = logged["table"]
    by_steps = {row[table.columns.index("S")]: row[table.columns.index("value")] for row in table.data}
    assert by_steps == {r["S"]: r["metrics"]["fd_digits_classifier_12"] for r in records}
    assert {"table", "report"} <= set(logged)
    assert any(name.startswith("plot_fd") for name in logged)
    wandb.teardown()
    media = [path for path in folder.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()]
    kinds = {path.suffix for path in media}
    assert {".png", ".json", ".html"} <= kinds
    grids = {(folder / record["grid"]).read_bytes() for record in records}
    assert grids <= {path.read_bytes() for path in media}


def test_the_group_can_be_named(spec: EvaluateSpec, started: list[dict[str, Any]]) -> None:
    named = dataclasses.replace(OFFLINE, group="mine")
    Dashboard(named, spec.name, Path(spec.output_dir)).log_cell(evaluate(spec)[0], spec.title)
    assert started[0]["group"] == "mine"


def test_nothing_is_logged_unless_asked_for(spec: EvaluateSpec, started: list[dict[str, Any]]) -> None:
    dashboard = Dashboard(LoggerSpec(), spec.name, Path(spec.output_dir))
    dashboard.check()
    dashboard.log_cell(evaluate(spec)[0], spec.title)
    dashboard.log_report([])
    assert started == []
    assert not (Path(spec.output_dir) / "wandb").exists()


def test_online_without_an_account_is_one_sentence_before_any_image(
    spec: EvaluateSpec, started: list[dict[str, Any]]
) -> None:
    online = dataclasses.replace(OFFLINE, offline=False)
    with pytest.raises(UserError, match=r"W&B refused to start .*run `wandb login`, or choose logger=wandb_offline"):
        Dashboard(online, spec.name, Path(spec.output_dir)).check()


def test_a_run_that_breaks_off_is_one_sentence_and_is_made_again(
    spec: EvaluateSpec, started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dashboard, (record, _) = Dashboard(spec.logger, spec.name, Path(spec.output_dir)), evaluate(spec)
    with monkeypatch.context() as patch:

        def fail(**_: Any) -> None:
            raise wandb.errors.CommError("the connection\nwas lost")

        patch.setattr(wandb, "init", fail)
        with pytest.raises(UserError, match=r"W&B failed \(the connection was lost\); run the same command again"):
            dashboard.log_cell(record, spec.title)
    dashboard.log_cell(record, spec.title)
    assert len(started) == 1


def test_tensorboard_is_refused_for_evaluation(spec: EvaluateSpec) -> None:
    with pytest.raises(ValueError, match="tensorboard is for training"):
        dataclasses.replace(spec, logger=LoggerSpec(tensorboard=True))
