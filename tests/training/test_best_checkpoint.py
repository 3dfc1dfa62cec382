"""The best checkpoint of a training that validates: kept, ranked again by other settings, never lost."""

import os
import signal

import pytest

from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.errors import Interrupted
from ddim.training.run import train
from ddim.training.spec import TrainSpec
from ddim.training.validation import Validation

pytestmark = pytest.mark.integration
FD = "fd_digits_classifier_20"
# Validations at steps 2, 4 and 6 of 7.
TRAINER = {"max_steps": 7, "checkpoint_every": 3, "log_every": 3, "keep_every": 1}


@pytest.fixture
def options(tmp_path):
    """The options of a run that validates."""
    measured = {"n": 20, "sampler": {"S": 3}, "metric": {"extractor": "digits_classifier"}}
    return {
        "trainer": TRAINER,
        "eval": {"every": 2, "heldout": 16, "reference_dir": str(tmp_path / "reference"), **measured},
    }


@pytest.fixture
def measured(monkeypatch):
    """measured({2: 5.0, ...}): validations give these values of the metric, by step."""

    def measured(values):
        monkeypatch.setattr(Validation, "_measure", lambda self, trainer, *_: {FD: values[trainer.global_step]})

    return measured


def test_the_best_checkpoints_are_kept(config, options, measured, tmp_path):
    """Besides the newest; through a resumption; and as best.ckpt."""
    measured({2: 5.0, 4: 1.0, 6: 3.0})
    trainer = {"checkpoint_every": 100, "keep_every": 0, "keep_last": 1, "keep_best": 2}
    for steps in (5, 7):
        values = config(**options | {"trainer": trainer | {"max_steps": steps}}, checkpoint="last")
        trained = train(build(TrainSpec, values, ""), values)
        assert trained.metric == 1.0
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(int(path.stem[5:]) for path in folder.glob("step_*.ckpt")) == [4, 6, 7]
    assert read_checkpoint(folder / "best.ckpt")["global_step"] == 4
    assert read_checkpoint(folder / "last.ckpt")["global_step"] == 7


def test_a_validation_that_is_made_up_for_can_be_the_best(run, options, measured, monkeypatch, tmp_path):
    """Its checkpoint was written before it was known to be."""

    def stop(self, trainer, *_):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            raise Interrupted
        return {FD: 5.0}

    monkeypatch.setattr(Validation, "_measure", stop)
    with pytest.raises(Interrupted, match="stopped at step 4"):
        run(**options)
    measured({4: 1.0, 6: 3.0})
    run(**options, checkpoint="last")
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert best["global_step"] == 4
    assert best["ddim_counts"]["validation"]["best"] == [(1.0, 4)]


def test_a_run_that_goes_on_elsewhere_has_its_own_best(run, options, measured, tmp_path):
    measured({2: 5.0, 4: 1.0, 6: 3.0})
    last = run(**options | {"trainer": TRAINER | {"max_steps": 5}})
    run("other", **options, checkpoint=str(last))
    best = read_checkpoint(tmp_path / "other" / "checkpoints" / "best.ckpt")
    assert (best["global_step"], best["ddim_counts"]["validation"]["best"]) == (6, [(3.0, 6)])


def test_other_settings_of_the_metric_start_another_ranking(run, config, options, measured, tmp_path):
    measured({2: 1.0, 4: 2.0, 6: 3.0})
    run(**options | {"trainer": {"max_steps": 4}})
    options["eval"]["seed"] = 1
    values = config(**options, checkpoint="last")
    assert train(build(TrainSpec, values, ""), values).metric == 2.0  # of step 4, which is measured again
    best = {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.glob("run/checkpoints/best*")}
    assert best == {"best.ckpt": 4, "best_before_step_00000004.ckpt": 2}


def test_other_settings_that_are_given_up_leave_the_best(run, options, measured, after_loss, tmp_path):
    """Ended before they saved a step, and the training goes on with those of before, and gets no better."""
    measured({2: 1.0, 4: 2.0, 6: 3.0})
    run(**options | {"trainer": {"max_steps": 3}})
    best, ends = tmp_path / "run" / "checkpoints" / "best.ckpt", [True]

    def end(*_):
        if ends:
            raise RuntimeError("ended")

    after_loss(end)
    with pytest.raises(RuntimeError, match="ended"):
        run(**options | {"eval": options["eval"] | {"seed": 1}}, checkpoint="last")
    assert not best.exists()
    ends.clear()
    run(**options, checkpoint="last")
    assert read_checkpoint(best)["global_step"] == 2


def test_a_finished_run_keeps_a_best_of_other_settings(run, options, measured, tmp_path):
    """It is saved without a step of training."""
    measured({2: 1.0, 4: 2.0, 6: 3.0})
    for seed, steps in ((0, 3), (1, 3), (1, 6)):
        changes = {"eval": options["eval"] | {"seed": seed}, "trainer": {"max_steps": steps}}
        run(**options | changes, checkpoint="last")
    best = {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.glob("run/checkpoints/best*")}
    assert best["best_before_step_00000003.ckpt"] == 2
    assert best["best.ckpt"] > 3


def test_a_run_without_validation_keeps_the_best(run, options, measured, tmp_path):
    measured({2: 1.0, 4: 2.0, 6: 3.0})
    for steps, every in ((4, 2), (5, 0), (7, 2)):
        changes = {"eval": options["eval"] | {"every": every}, "trainer": {"max_steps": steps, "keep_last": 1}}
        folder = run(**options | changes, checkpoint="last").parent
        assert {path.name for path in folder.iterdir()} >= {"step_00000002.ckpt", f"step_{steps:08d}.ckpt"}
        assert read_checkpoint(folder / "best.ckpt")["global_step"] == 2
