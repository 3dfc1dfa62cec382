"""Quality while training: the numbers of evaluate.py, exact resuming, the best checkpoint, the held-out loss."""

import csv
import logging
import os
import re
import signal

import pytest
from PIL import Image

from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.data.datasets import DataSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import Interrupted, UserError
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.metrics import MetricSpec
from ddim.inference import generate
from ddim.inference.compute import ComputeSpec
from ddim.results.schema import evaluation_records
from ddim.training.run import train
from ddim.training.spec import TrainSpec
from ddim.training.validation import Validation

pytestmark = pytest.mark.integration
FD = "fd_digits_classifier_20"
DIGITS = DataSpec("digits", (8, 8), 1)
LOSSES = ("loss", *(f"loss_quarter_{k}" for k in (1, 2, 3, 4)))


EVAL = {"every": 2, "n": 20, "heldout": 16, "sampler": {"S": 3}, "metric": {"extractor": "digits_classifier"}}
# Validations at steps 2, 4 and 6 of 7, in batches of 4 images; with dropout.
OPTIONS = {
    "network": {"dropout": 0.3},
    "optim": {"lr": 0.01, "eps": 1e-3},
    "ema": {"decay": [0.9, 0.5]},
    "trainer": {"max_steps": 7, "checkpoint_every": 3, "log_every": 3, "keep_every": 1, "accumulate": 2},
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of the reference statistics."""
    return str(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def options(reference):
    """The options of a run that validates."""
    return OPTIONS | {"eval": EVAL | {"reference_dir": reference}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, reference, tiny):
    """The folder of such a run, which no test changes."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    values = tiny(folder, **OPTIONS, eval=EVAL | {"reference_dir": reference})
    train(build(TrainSpec, values, ""), values)
    return folder


def records(folder):
    """Return weights, step, hash and metrics of each record of a run."""
    found = evaluation_records(folder / "records.jsonl").read()
    return [(*(r["model"][key] for key in ("weights", "step", "weights_hash")), r["metrics"]) for r in found]


def rows(folder):
    """Return each val/ column of the CSV files of a run, by step; a run that was resumed has several files."""
    columns = {}
    for path in sorted(folder.glob("csv/*/metrics.csv")):
        with path.open() as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name.startswith("val/") and value:
                        columns.setdefault(name, {})[int(row["step"])] = float(value)
    return columns


def test_numbers_are_those_of_an_evaluation_of_the_checkpoint(run, options, reference, tmp_path):
    """The same key and the same metrics; also with several averages, and the online weights."""
    labels = ["ema", "ema_0.5", "online"]
    options["eval"]["weights"] = labels
    last = run(**options | {"trainer": OPTIONS["trainer"] | {"max_steps": 5}})
    found, columns = records(tmp_path / "run"), rows(tmp_path / "run")
    assert [record[:2] for record in found] == [(w.replace("online", "raw"), s) for s in (2, 4) for w in labels]
    for label, record in zip(labels, found[3:], strict=True):
        spec = EvaluateSpec(
            checkpoint=str(last.with_name("step_00000004.ckpt")),
            name="x",
            output_dir=str(tmp_path / "evaluated"),
            compute=ComputeSpec("cpu", 4),
            data=DIGITS,
            weights=label,
            sampler=SamplerSpec(S=3),
            metric=MetricSpec("digits_classifier"),
            n=20,
            reference_dir=reference,
        )
        direct, _ = evaluate(spec)
        assert evaluation_records(tmp_path / "run" / "records.jsonl").find(direct["key"])
        assert record[3] == direct["metrics"] | {"val_loss": record[3]["val_loss"]}
        suffix = "" if label == "ema" else f"_{label}"
        assert columns[f"val/{FD}{suffix}"][3] == record[3][FD]
        assert columns[f"val/loss{suffix}"][3] == record[3]["val_loss"]
    assert len({record[3][FD] for record in found}) == 6


def test_validation_does_not_change_the_training(config, uninterrupted, same):
    """Mode, online weights, averages and random numbers."""
    values = config("without", **OPTIONS)
    without = train(build(TrainSpec, values, ""), values)
    assert same(uninterrupted / "checkpoints" / "last.ckpt", without.checkpoint)
    assert without.metric is None


@pytest.fixture
def in_validation(monkeypatch):
    """in_validation(action, k): call action in the k-th batch that is generated from now on."""

    def in_validation(action, k):
        seen, generate_batch = [], generate.generate_batch

        def act(*args):
            seen.append(1)
            if len(seen) == k:
                action()
            return generate_batch(*args)

        monkeypatch.setattr(generate, "generate_batch", act)

    return in_validation


class Killed(Exception):
    pass


def die():
    raise Killed


@pytest.fixture
def as_if_never_stopped(run, options, uninterrupted, same, tmp_path):
    """as_if_never_stopped(): the run goes on and ends with the weights, rows and records of the uninterrupted one."""

    def as_if_never_stopped():
        folders = [tmp_path / "run", uninterrupted]
        assert same(run(**options, checkpoint="last"), uninterrupted / "checkpoints" / "last.ckpt")
        assert rows(folders[0]) == rows(folders[1])
        assert records(folders[0]) == records(folders[1])
        best = [read_checkpoint(folder / "checkpoints" / "best.ckpt") for folder in folders]
        assert best[0]["global_step"] == best[1]["global_step"]

    return as_if_never_stopped


def test_a_signal_leaves_a_validation_for_the_next_run(run, options, in_validation, as_if_never_stopped, tmp_path):
    """It stores the batch and saves the step; the next run makes up for it from the next batch on."""
    in_validation(lambda: os.kill(os.getpid(), signal.SIGTERM), 7)  # the second of five batches of step 4
    with pytest.raises(Interrupted, match="stopped at step 4 of 7 and saved it"):
        run(**options)
    assert [record[1] for record in records(tmp_path / "run")] == [2]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["ddim_counts"]["validation"]["step"] == 2
    generated = []
    in_validation(lambda: generated.append("the last of step 6"), 3 + 5)
    in_validation(lambda: pytest.fail("more than were missing"), 3 + 5 + 1)
    as_if_never_stopped()
    assert generated == ["the last of step 6"]


def test_a_kill_in_or_after_a_validation_doubles_no_row(
    run, options, in_validation, as_if_never_stopped, monkeypatch, tmp_path
):
    """The step is done again; images that are stored, and a record that is there, are not."""
    with monkeypatch.context() as patch:
        in_validation(die, 7)
        with pytest.raises(Killed):
            run(**options)
        validate = Validation._validate

        def validate_and_die(self, trainer, module):
            validate(self, trainer, module)
            die()

        patch.setattr(Validation, "_validate", validate_and_die)
        with pytest.raises(Killed):
            run(**options, checkpoint="last")
    assert [record[1] for record in records(tmp_path / "run")] == [2, 4]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] < 4
    as_if_never_stopped()


def test_two_processes_validate_as_one(run, options, uninterrupted, two_processes, tmp_path):
    run(**options | {"trainer": OPTIONS["trainer"] | two_processes | {"accumulate": 1}})
    one, two = rows(uninterrupted), rows(tmp_path / "run")
    assert set(one) == {f"val/{name}" for name in (FD, *LOSSES)}
    for column, values in one.items():
        assert two[column] == pytest.approx(values, rel=1e-3), column
    assert [record[:2] for record in records(tmp_path / "run")] == [("ema", 2), ("ema", 4), ("ema", 6)]


def test_held_out_loss_alone_needs_no_extractor(config, options, tmp_path):
    options["eval"] |= {"n": 0, "metric": {"extractor": "inception"}}
    values = config(**options)
    trained = train(build(TrainSpec, values, ""), values)
    columns = rows(tmp_path / "run")
    assert set(columns) == {f"val/{name}" for name in LOSSES}
    assert trained.metric == min(columns["val/loss"].values())
    assert not (tmp_path / "run" / "records.jsonl").exists()


@pytest.fixture
def folder(tmp_path):
    """folder("train", "test"): the data of a folder with these splits, ten images each; the pixels of each differ."""

    def folder(*splits):
        for k, split in enumerate(splits):
            (tmp_path / "images" / split).mkdir(parents=True)
            for i in range(10):
                Image.new("L", (8, 8), 20 * i + k).save(tmp_path / "images" / split / f"{i}.png")
        return {"data": {"name": "folder", "root": str(tmp_path / "images")}}

    return folder


@pytest.mark.parametrize(
    ("splits", "said"),
    [(["train", "test"], "images of the test split"), ([""], "training images (folder has no test split)")],
)
def test_cost_and_what_is_measured_are_said_at_the_start(run, options, folder, caplog, splits, said):
    with caplog.at_level(logging.INFO, logger="ddim"):
        run(**options | folder(*splits) | {"trainer": {"max_steps": 2}})
    [line] = [message for message in caplog.messages if message.startswith("validation every")]
    assert line == (
        f"validation every 2 steps, about 0:00:00 each: {FD} of 20 images (η=0.0 S=3 linear), "
        f"val/loss of up to 16 {said}; ema weights"
    )
    [line] = [message for message in caplog.messages if message.startswith("step 2: val/")]
    assert re.fullmatch(rf"step 2: val/loss [\d.]+, val/{FD} [\d.]+ \(\d+ s\), the best", line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"heldout": 8, "data": ["train"]},
            r"eval.heldout=8 takes images of the test split, and eval.heldout=0 none: .*",
        ),
        ({"n": 1}, r"eval.n=1 cannot be measured \(metrics need at least 2 images"),
        ({"metric": {"extractor": "inception", "weights_path": "/none"}}, "/none.*metric@eval.metric=.*eval.n=0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(run, options, folder, after_loss, change, message):
    after_loss(lambda *_: pytest.fail("trained"))
    data = folder(*change.pop("data")) if "data" in change else {}
    options["eval"] |= change
    with pytest.raises(UserError, match=message):
        run(**options | data)
