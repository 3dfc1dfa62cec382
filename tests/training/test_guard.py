"""Steps without a finite gradient are skipped and counted; a training that only skips, or does not fit, ends."""

import logging

import pytest
import torch

from ddim.checkpoints.model import read_checkpoint
from ddim.config import build
from ddim.errors import UserError
from ddim.networks import UNet
from ddim.training.dry_run import dry_run
from ddim.training.spec import TrainSpec

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("value", "grad_clip"), [("nan", 1.0), ("nan", None), ("inf", 1.0), ("-inf", None)])
def test_skipped_step_changes_neither_weights_nor_optimiser(run, scale_loss, logged, caplog, value, grad_clip):
    options = {"optim": {"grad_clip": grad_clip}}
    before = read_checkpoint(run("before", **options, trainer={"max_steps": 3}))
    scale_loss({3}, float(value))
    with caplog.at_level(logging.WARNING):
        after = read_checkpoint(run("after", **options, trainer={"max_steps": 4}))
    assert all(torch.equal(v, after["state_dict"][k]) for k, v in before["state_dict"].items())
    moments = [c["optimizer_states"][0]["state"] for c in (before, after)]
    assert all(torch.equal(v, moments[1][i][k]) for i, s in moments[0].items() for k, v in s.items())
    assert "step 4: 1 steps so far had no finite gradient and were skipped" in caplog.text
    assert logged("after", "train/skipped_steps") == {0: 0, 1: 0, 2: 0, 3: 1}


def test_training_continues_after_a_skipped_step(run, scale_loss):
    scale_loss({2}, float("nan"))
    last = read_checkpoint(run(trainer={"max_steps": 6}))
    assert all(v.isfinite().all() for v in last["state_dict"].values())
    assert all(s["step"] == 5 for s in last["optimizer_states"][0]["state"].values())


def test_many_skipped_in_a_row_end_the_run_and_save(run, scale_loss, tmp_path):
    before = read_checkpoint(run("before", trainer={"max_steps": 6}))
    scale_loss(set(range(6, 50)), float("nan"))
    message = r"the last 4 steps up to step 10 had no finite gradient.*is saved\. Try a smaller"
    with pytest.raises(UserError, match=message):
        run("diverged", trainer={"max_steps": 50, "max_skipped": 4, "log_every": 2})
    after = read_checkpoint(tmp_path / "diverged" / "checkpoints" / "last.ckpt")
    assert after["global_step"] == 10
    assert all(torch.equal(v, after["state_dict"][k]) for k, v in before["state_dict"].items())


def test_fewer_skipped_in_a_row_do_not_end_the_run(run, scale_loss, logged):
    scale_loss({0, 1, 2, 4, 5, 6, 8, 9}, float("nan"))
    run(trainer={"max_steps": 10, "max_skipped": 4})
    assert logged("run", "train/skipped_steps")[9] == 8


def test_two_processes_skip_the_same_step(run, after_loss, same, two_processes):
    """Only the second process has a loss that is not finite; the gradient's mean over both decides."""

    def spoil(step, batch_idx, output):
        second = torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        if step == 2 and (second or not torch.distributed.is_initialized()):
            output["loss"] = output["loss"] * float("nan")

    after_loss(spoil)
    options = {"optim": {"eps": 1e-3}}
    two = run("two", **options, trainer=two_processes | {"max_steps": 5})
    assert same(run("one", **options, trainer={"max_steps": 5}), two, atol=1e-6)
    assert all(s["step"] == 4 for s in read_checkpoint(two)["optimizer_states"][0]["state"].values())


def test_gradient_norm_is_logged_before_clipping(run, logged):
    for clip in (None, 1e-3):
        run(f"clip {clip}", optim={"grad_clip": clip})
    loose, tight = (logged(f"clip {clip}", "train/gradient_norm") for clip in (None, 1e-3))
    assert loose[0] == tight[0] > 1e-3
    assert len(loose) == 6


@pytest.mark.parametrize(
    ("accumulate", "message"),
    [
        (1, "the training does not fit into memory; if it is the step, trainer.accumulate=2 (now 1) computes"),
        (3, "the training does not fit into memory; if it is the step, trainer.accumulate=6 (now 3) computes"),
        (9, "the training does not fit into memory; if it is the step, trainer.accumulate=18 (now 9) computes"),
        (18, "not even one image at a time fits into memory; take a smaller network"),
    ],
)
def test_a_step_that_does_not_fit_says_what_to_set(run, config, monkeypatch, accumulate, message):
    def forward(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(UNet, "forward", forward)
    changes = {"trainer": {"batch_size": 18, "accumulate": accumulate}}
    spec = build(TrainSpec, config(**changes), "")
    for train in (lambda: run(**changes), lambda: dry_run(spec)):
        with pytest.raises(UserError) as caught:
            train()
        assert str(caught.value).startswith(message)
