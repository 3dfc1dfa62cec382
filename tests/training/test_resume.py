"""A training is a function of its configuration: not of where it stopped, nor of how a batch was divided."""

import csv
import shutil

import pytest
import torch

from ddim.checkpoints.model import read_checkpoint
from ddim.training.ema import EMA
from ddim.training.module import DiffusionModule

DROPOUT = {"dropout": 0.3}
TRAINER = {"max_steps": 9, "checkpoint_every": 4}


def disturb():
    """Leave the global generator in another state than it was in."""
    torch.manual_seed(int(torch.randint(1000, ())))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(run, killed_run, same, accumulate):
    options = {"network": DROPOUT, "trainer": TRAINER | {"accumulate": accumulate}}
    whole = run("whole", **options)
    disturb()
    killed_run(6, accumulate - 1, "killed", **options)  # two steps, and half a third, after the checkpoint
    disturb()
    resumed = run("killed", **options, ckpt_path="last")
    assert same(whole, resumed)
    assert read_checkpoint(whole)["global_step"] == 9


def test_the_comparison_would_see_other_dropout_and_other_flips(run, same):
    options = {"network": DROPOUT, "trainer": {"max_steps": 2}}
    base = run("base", **options)
    assert same(base, run("again", **options))
    assert not same(base, run("dry", **options | {"network": {"dropout": 0.0}}))
    assert not same(base, run("upright", **options, data={"flip": False}))
    assert not same(base, run("seed", **options, seed=6))


def test_a_run_killed_again_before_its_first_new_step_goes_on_as_well(run, killed_run, same):
    """A resumed run saves a checkpoint after half a step, when its step is one at which checkpoints are due."""
    options = {"network": DROPOUT, "trainer": TRAINER | {"accumulate": 2}}
    whole = run("whole", **options)
    killed_run(6, 0, "killed", **options)
    killed_run(4, 1, "killed", **options, ckpt_path="last")
    assert same(whole, run("killed", **options, ckpt_path="last"))


def test_a_finished_run_can_be_extended_by_path_into_another_folder(run, same, tmp_path):
    options = {"network": DROPOUT}
    whole = run("whole", **options, trainer={"max_steps": 9})
    first = run("first", **options, trainer={"max_steps": 5})
    second = run("second", **options, trainer={"max_steps": 9}, ckpt_path=str(first))
    assert second == tmp_path / "second" / "checkpoints" / "last.ckpt"
    assert same(whole, second)
    assert read_checkpoint(first)["global_step"] == 5


def test_nothing_happens_to_a_finished_run(run, same, tmp_path):
    last = run()
    shutil.copy(last, tmp_path / "copy.ckpt")
    assert run(ckpt_path="last") == last
    assert same(last, tmp_path / "copy.ckpt")


def test_last_starts_a_run_that_has_no_checkpoint(run, same):
    assert same(run("one"), run("two", ckpt_path="last"))


def test_a_moved_run_keeps_its_last_checkpoint_up_to_date(run, killed_run, tmp_path):
    last = run("here", trainer={"max_steps": 6, "checkpoint_every": 4})
    shutil.move(tmp_path / "here", tmp_path / "there")
    killed_run(10, 0, "there", trainer={"max_steps": 20, "checkpoint_every": 4}, ckpt_path="last")
    folder = tmp_path / "there" / "checkpoints"
    assert read_checkpoint(folder / last.name)["global_step"] == 8
    assert not list(folder.glob("last-*"))


# Where the gradient is no more than rounding noise Adam with a small eps would blow it up to a full step.
ROBUST = {"optim": {"eps": 1e-3}, "trainer": {"max_steps": 6}}


def test_accumulated_batches_do_what_the_whole_batch_does(run, same, monkeypatch):
    updates = []
    on_train_batch_end = EMA.on_train_batch_end

    def record(self, *args):
        on_train_batch_end(self, *args)
        updates.append(self.updates)

    monkeypatch.setattr(EMA, "on_train_batch_end", record)
    whole = run("whole", **ROBUST)
    assert updates == [1, 2, 3, 4, 5, 6]
    updates.clear()
    halves = run("halves", **ROBUST | {"trainer": {"max_steps": 6, "accumulate": 2}})
    assert updates == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert same(whole, halves, atol=1e-6)
    assert not same(whole, run("other", **ROBUST, seed=6), atol=1e-3)


def test_the_accumulation_may_change_on_the_way(run, killed_run, same):
    whole = run("whole", **ROBUST)
    for first, second in ((1, 2), (4, 1)):
        name = f"{first} to {second}"
        killed_run(5, 0, name, **ROBUST | {"trainer": {"accumulate": first, "checkpoint_every": 3}})
        trainer = {"accumulate": second, "checkpoint_every": 3}
        assert same(whole, run(name, **ROBUST | {"trainer": trainer}, ckpt_path="last"), atol=1e-6)


def test_two_processes_do_what_one_does(run, same):
    """Even with dropout, when the one process takes the batch in the same two parts."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used CUDA cannot be forked")
    options = ROBUST | {"network": DROPOUT}
    two = run("two", **options | {"trainer": {"devices": 2, "strategy": "ddp_fork"}})
    one = run("one", **options | {"trainer": {"accumulate": 2}})
    assert same(one, two, atol=1e-6)
    # Going on with one process from where two stopped.
    longer = options | {"trainer": {"max_steps": 8, "accumulate": 2}}
    assert same(run("one", **longer, ckpt_path="last"), run("two", **longer, ckpt_path="last"), atol=1e-6)


def rows(folder, version=0):
    """Return the logged losses and counts of a run, by step: all columns but those of the clock."""
    with (folder / "csv" / f"version_{version}" / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    names = [name for name in table[0] if "loss" in name or name in ("train/skipped_steps", "train/gradient_norm")]
    assert len(names) == 7
    return {int(row["step"]): [row[name] for name in sorted(names)] for row in table if row["train/loss"]}


@pytest.mark.parametrize("saved", [4, 6])
def test_the_logs_go_on_as_well_also_between_two_rows(run, killed_run, tmp_path, monkeypatch, caplog, saved):
    """A row every three steps, over the samples since the row before; the second step is not finite."""
    training_step = DiffusionModule.training_step

    def spoilt(self, batch, batch_idx):
        return training_step(self, batch, batch_idx) * (float("nan") if batch["step"] == 1 else 1)

    monkeypatch.setattr(DiffusionModule, "training_step", spoilt)
    trainer = {"max_steps": 9, "log_every": 3, "checkpoint_every": saved, "accumulate": 2}
    run("whole", trainer=trainer)
    killed_run(saved, 1, "killed", trainer=trainer)
    caplog.clear()
    run("killed", trainer=trainer, ckpt_path="last")
    assert "no finite gradient" not in caplog.text  # that was said before
    whole = rows(tmp_path / "whole")
    assert list(whole) == [2, 5, 8]
    assert rows(tmp_path / "killed", 1) == {step: row for step, row in whole.items() if step >= saved}


def test_two_processes_that_go_on_as_two_or_as_one_do_and_log_what_one_does(run, same, tmp_path):
    """The loss is that of the global batch, not that of the first process."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used CUDA cannot be forked")
    two, one = {"devices": 2, "strategy": "ddp_fork"}, {"accumulate": 1}
    logs, last = {}, {}
    for name, first, second in (("one", one, one), ("two", two, two), ("mixed", two, one)):
        for steps, how in ((5, first), (8, second)):
            trainer = how | {"max_steps": steps, "log_every": 4}
            last[name] = run(name, **ROBUST | {"trainer": trainer}, ckpt_path="last")
        logs[name] = [float(v) for version in (0, 1) for row in rows(tmp_path / name, version).values() for v in row]
        assert len(logs[name]) == 14
    for name in ("two", "mixed"):
        assert logs[name] == pytest.approx(logs["one"], rel=1e-5)
        assert same(last["one"], last[name], atol=1e-6)
