"""The training runs behind the records of a report."""

import json
from pathlib import Path

import pytest
from made_records import FID, record

from ddim.results.records import RECORDS, Record
from ddim.results.report import write_report
from ddim.results.runs import LOSS, find_runs
from ddim.results.training_plots import plot_training

pytestmark = pytest.mark.integration


def evaluated(folder: Path, **changes: str) -> Record:
    checkpoint = str(folder / "checkpoints" / "last.ckpt")
    return record("η=0.0", 10, 3.0, config={"name": "made", "checkpoint": checkpoint}, **changes)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run that was resumed at step 30, which overlaps, and measured at step 20."""
    folder = tmp_path / "runs" / "mine"
    for version, losses in ((0, {9: 0.5, 19: 0.25, 29: 9.0}), (10, {29: 0.2, 39: 0.1})):
        path = folder / "csv" / f"version_{version}" / "metrics.csv"
        path.parent.mkdir(parents=True)
        rows = "".join(f"0,{step},{loss},\n0,{step},,{2 * loss}\n" for step, loss in losses.items())
        rows += f"0,{max(losses) + 2},{losses[max(losses)]},\n"  # as where a run stops
        path.write_text(f"epoch,step,train/loss,val/loss\n{rows}")
    measured = record("η=0.0", 10, 7.0, model__step=20)
    (folder / RECORDS).write_text(json.dumps(measured) + "\n")
    return folder


def test_curves_go_on_where_a_run_was_resumed(trained: Path) -> None:
    [run] = find_runs([evaluated(trained), evaluated(trained, model__weights="raw")])
    assert run.name == "mine"
    assert run.models == ("ema weights 01234567 at step 800,000", "online weights 01234567 at step 800,000")
    losses = ((10, 0.5), (20, 0.25), (30, 0.2), (40, 0.1))
    doubled = tuple((step, 2 * loss) for step, loss in losses)
    assert run.curves == {LOSS: losses, "val/loss": doubled, f"{FID}, ema": ((20, 7.0),)}


def test_evaluations_by_other_samplers_are_curves_of_their_own(trained: Path) -> None:
    """A run that was resumed with another eval.sampler; its val_loss is among the logged ones already."""
    made = [
        record("η=0.0", S, 0.0, spacing, model__step=step, metrics={FID: value, "val_loss": loss})
        for S, spacing, step, value, loss in (
            (10, "quad", 20, 7.0, 0.5),
            (20, "quad", 20, 5.0, 0.5),
            (20, "quad", 30, 4.0, 0.4),
            (20, "linear", 30, 3.0, 0.7),
        )
    ]
    (trained / RECORDS).write_text("".join(json.dumps(r) + "\n" for r in made))
    [run] = find_runs([evaluated(trained)])
    assert {name: curve for name, curve in run.curves.items() if "/" not in name} == {
        f"{FID}, ema, S=10, tau quad": ((20, 7.0),),
        f"{FID}, ema, S=20, tau quad": ((20, 5.0), (30, 4.0)),
        f"{FID}, ema, S=20, tau linear": ((30, 3.0),),
        "val_loss, ema, S=20, tau linear": ((30, 0.7),),  # not the 0.4 that was logged
    }


@pytest.mark.parametrize("damage", ["epoch,step,train/loss\n0,x,1\n", "a\0b\n", ""])
def test_a_damaged_or_missing_file_leaves_no_curve(trained: Path, damage: str) -> None:
    (trained / RECORDS).unlink()
    for path in trained.rglob("metrics.csv"):
        path.write_text(damage)
    assert [run.curves for run in find_runs([evaluated(trained)])] == [{}]
    assert [run.name for run in find_runs([record("η=0.0", 10, 1.0, config={"checkpoint": "a/b.safetensors"})])] == [
        "b"
    ]
    assert find_runs([record("η=0.0", 10, 1.0, config={})]) == []


def test_the_page_names_the_run_and_shows_its_curve(trained: Path, tmp_path: Path) -> None:
    paths = write_report([evaluated(trained)], tmp_path / "out")
    page = paths[-1].read_text(encoding="utf-8")
    assert "<dt>mine</dt>" in page
    assert str(trained / "checkpoints" / "last.ckpt") in page
    assert [path.name for path in paths if "training" in path.name] == ["plot_training.png", "plot_training.pdf"]
    assert page.count("<img") == 2  # the table's plot, and the curve
    assert "losses and metrics of the training against the optimiser step" in page


def test_the_curve_marks_where_a_run_was_stopped(trained: Path) -> None:
    [run] = find_runs([evaluated(trained)])
    assert run.stops == (32,)
    (trained / "csv" / "version_11").mkdir()
    (trained / "csv" / "version_11" / "metrics.csv").write_text("epoch,step,train/loss\n")  # a call that did nothing
    assert find_runs([evaluated(trained)]) == [run]
    for axes in plot_training([run]).axes:
        assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"] == [[32, 32], []]
