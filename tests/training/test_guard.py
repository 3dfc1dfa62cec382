"""Steps whose gradient is not finite are skipped and counted; a training that only skips ends; what is logged."""

import csv
import logging

import pytest
import torch

from ddim.checkpoints import load_model
from ddim.checkpoints.model import read_checkpoint
from ddim.errors import UserError
from ddim.training.module import DiffusionModule


@pytest.fixture
def spoil(monkeypatch):
    """spoil(steps, value): the loss of these steps is multiplied by a value."""

    def spoil(steps, value):
        training_step = DiffusionModule.training_step

        def step(self, batch, batch_idx):
            loss = training_step(self, batch, batch_idx)
            return loss * value if batch["step"] in steps else loss

        monkeypatch.setattr(DiffusionModule, "training_step", step)

    return spoil


def column(path, name):
    """Return the values of one column of metrics.csv by step."""
    with (path.parents[1] / "csv" / "version_0" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("grad_clip", [1.0, None])
def test_a_step_without_a_finite_gradient_changes_neither_weights_nor_optimiser(run, spoil, caplog, value, grad_clip):
    options = {"optim": {"grad_clip": grad_clip}}
    before = read_checkpoint(run("before", **options, trainer={"max_steps": 3}))
    spoil({3}, value)
    with caplog.at_level(logging.WARNING):
        last = run("after", **options, trainer={"max_steps": 4})
    after = read_checkpoint(last)
    assert all(torch.equal(v, after["state_dict"][k]) for k, v in before["state_dict"].items())
    moments = [c["optimizer_states"][0]["state"] for c in (before, after)]
    assert all(torch.equal(v, moments[1][i][k]) for i, s in moments[0].items() for k, v in s.items())
    assert "step 4: 1 steps so far had no finite gradient and were skipped" in caplog.text
    assert column(last, "train/skipped_steps") == {0: 0, 1: 0, 2: 0, 3: 1}


def test_after_a_skipped_step_the_training_goes_on(run, spoil):
    spoil({2}, float("nan"))
    last = run(trainer={"max_steps": 6})
    assert all(v.isfinite().all() for v in read_checkpoint(last)["state_dict"].values())
    assert all(s["step"] == 5 for s in read_checkpoint(last)["optimizer_states"][0]["state"].values())


def test_many_in_a_row_end_the_run_with_its_state_saved(run, spoil):
    trainer = {"max_steps": 50, "max_skipped": 4, "log_every": 2}
    before = read_checkpoint(run("before", trainer={"max_steps": 6}))
    spoil(set(range(6, 50)), float("nan"))
    with pytest.raises(
        UserError, match=r"the last 4 steps up to step 10 had no finite gradient.*is saved\. Try a smaller"
    ):
        run("diverged", trainer=trainer)
    last = (
        run("before", trainer={"max_steps": 6}, ckpt_path="last").parents[2] / "diverged" / "checkpoints" / "last.ckpt"
    )
    after = read_checkpoint(last)
    assert after["global_step"] == 10
    assert all(torch.equal(v, after["state_dict"][k]) for k, v in before["state_dict"].items())


def test_few_in_a_row_do_not_end_it(run, spoil):
    spoil({0, 1, 2, 4, 5, 6, 8, 9}, float("nan"))
    last = run(trainer={"max_steps": 10, "max_skipped": 4, "log_every": 1})
    assert column(last, "train/skipped_steps")[9] == 8


def test_two_processes_skip_the_same_step(run, spoil, same):
    """One of them has a finite gradient of its own; the sum over both has not."""
    spoil({2}, float("nan"))
    options = {"optim": {"eps": 1e-3}, "trainer": {"max_steps": 5}}
    two = run("two", **options | {"trainer": {"max_steps": 5, "devices": 2, "strategy": "ddp_fork"}})
    assert same(run("one", **options), two, atol=1e-6)
    assert all(s["step"] == 4 for s in read_checkpoint(two)["optimizer_states"][0]["state"].values())


def test_the_norm_of_the_gradient_is_logged_before_clipping(run):
    loose, tight = (column(run(f"clip {c}", optim={"grad_clip": c}), "train/gradient_norm") for c in (None, 1e-3))
    assert loose[0] == tight[0] > 1e-3
    assert len(loose) == 6


def test_the_loss_is_logged_by_quarters_of_the_times(run, monkeypatch):
    """Losses that are the times themselves: the means lie in their quarters, and all of them average to the loss."""
    seen = []

    def losses(model, alpha_bar, x0, t, eps, **options):
        seen.append(t)
        return t.float() + 0 * model(x0, t).flatten(1).sum(1)

    monkeypatch.setattr("ddim.training.module.per_sample_loss", losses)
    last = run(trainer={"max_steps": 8, "batch_size": 32, "log_every": 4})
    for part, step in ((seen[:4], 3), (seen[4:], 7)):
        t = torch.cat(part).double()
        for quarter in range(4):
            inside = t[(t > 5 * quarter) & (t <= 5 * (quarter + 1))]  # T=20
            assert column(last, f"train/loss_quarter_{quarter + 1}")[step] == pytest.approx(float(inside.mean()))


def test_the_mean_loss_is_that_of_the_finite_ones(run, monkeypatch):
    """One sample of each step is lost, and with it the step; the others say how large the loss was."""

    def losses(model, alpha_bar, x0, t, eps, **options):
        one = torch.ones(len(t)) + 0 * model(x0, t).flatten(1).sum(1)
        return torch.cat([one[:-1], one[-1:] * float("inf")])

    monkeypatch.setattr("ddim.training.module.per_sample_loss", losses)
    assert column(run(trainer={"max_steps": 4, "log_every": 2}), "train/loss") == {1: 1.0, 3: 1.0}


def test_several_averages_at_once_are_each_that_of_a_run_of_its_own(run):
    rates = (0.9, 0.5, 0.999)
    several = run("several", ema={"decay": list(rates)})
    for rate in rates:
        alone = run(f"alone {rate}", ema={"decay": rate})
        label = "ema" if rate == rates[0] else f"ema_{rate}"
        assert load_model(several, label).weights_hash == load_model(alone).weights_hash
        assert load_model(several, label).weights == label
    with pytest.raises(UserError, match=r"unknown weights 'ema_0.8'.*allowed: online, ema, ema_0.5, ema_0.999"):
        load_model(several, "ema_0.8")
    with pytest.raises(UserError, match="unknown weights 'emma'"):
        load_model(several, "emma")


def test_several_averages_survive_a_resumption(run, killed_run):
    options = {"ema": {"decay": [0.9, 0.5]}, "trainer": {"max_steps": 6, "checkpoint_every": 2}}
    whole = run("whole", **options)
    killed_run(5, 0, "killed", **options)
    resumed = run("killed", **options, ckpt_path="last")
    for label in ("online", "ema", "ema_0.5"):
        assert load_model(whole, label).weights_hash == load_model(resumed, label).weights_hash


@pytest.mark.parametrize("decay", [[], [0.9, 0.9], [0.9, 1.0]])
def test_rates_that_make_no_sense_are_refused(run, decay):
    with pytest.raises(UserError, match="ema: decay="):
        run(ema={"decay": decay})
