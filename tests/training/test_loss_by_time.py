"""The logged losses: means over all samples and processes since the last log, also by quarters of the times."""

from types import SimpleNamespace

import pytest
import torch

from ddim.checkpoints.model import read_checkpoint
from ddim.training.callbacks import LossByTime

pytestmark = pytest.mark.integration


def test_loss_is_logged_by_quarters_of_the_times(run, after_loss, logged):
    """With losses equal to the times the means are those of the times in each quarter of 1..20."""
    seen = []

    def losses_are_times(step, batch_idx, output):
        seen.append(output["t"])
        output["losses"] = output["t"].double()

    after_loss(losses_are_times)
    run(trainer={"max_steps": 8, "batch_size": 32, "log_every": 4, "accumulate": 2})
    for times, step in ((seen[:8], 3), (seen[8:], 7)):
        t = torch.cat(times).double()
        assert logged("run", "train/loss")[step] == pytest.approx(float(t.mean()))
        for quarter in range(4):
            inside = t[(t > 5 * quarter) & (t <= 5 * (quarter + 1))]
            assert logged("run", f"train/loss_quarter_{quarter + 1}")[step] == pytest.approx(float(inside.mean()))


def test_losses_that_are_not_finite_are_left_out(run, after_loss, logged):
    """One sample of each step is lost, and the step with it; the mean is that of the others."""

    def lose_one(step, batch_idx, output):
        output["losses"] = torch.ones(8).index_fill(0, torch.tensor([7]), float("inf"))
        output["loss"] = output["loss"] * float("inf")

    after_loss(lose_one)
    run(trainer={"max_steps": 4, "log_every": 2})
    assert logged("run", "train/loss") == {1: 1.0, 3: 1.0}


def test_checkpoint_stores_losses_that_are_not_logged_yet(run):
    """Under the key and in the shape of checkpoints that older versions wrote; which files there are is newer."""
    for max_steps, samples in ((5, 2 * 8), (6, 0)):
        counts = read_checkpoint(run(f"{max_steps}", trainer={"max_steps": max_steps, "log_every": 3}))["ddim_counts"]
        assert set(counts) == {"losses", "skipped", "files"}
        assert counts["losses"].shape == (2, 4)
        assert counts["losses"][1].sum() == samples
        assert counts["skipped"].tolist() == [0, 0]


def test_quarters_are_those_of_the_default_T(run, logged):
    """A config may leave T out; of 1000 times each quarter then has its share of 64 samples."""
    run(schedule={"T": None}, trainer={"max_steps": 1, "batch_size": 64})
    assert all(logged("run", f"train/loss_quarter_{k}")[0] > 0 for k in (1, 2, 3, 4))


@pytest.mark.parametrize("is_global_zero", [True, False])
def test_sums_of_all_processes_are_restored_on_one(is_global_zero):
    callback, trainer = LossByTime(20, every=3), SimpleNamespace(is_global_zero=is_global_zero)
    sums = torch.arange(8.0).reshape(2, 4)
    callback.on_load_checkpoint(trainer, None, {"ddim_counts": {"losses": sums}})
    assert torch.equal(callback.sums, sums * is_global_zero)


def test_checkpoint_without_counts_starts_at_zero():
    callback = LossByTime(20, every=3)
    callback.on_load_checkpoint(SimpleNamespace(is_global_zero=True), None, {})
    assert not callback.sums.any()


def test_losses_are_added_up_on_the_device_of_the_strategy():
    """NCCL adds up nothing else; a run that is resumed when it is finished never moves them there."""
    reduced = []
    strategy = SimpleNamespace(
        root_device="meta", reduce=lambda x, reduce_op: reduced.append((x.device.type, reduce_op))
    )
    callback = LossByTime(20, 1)
    checkpoint = {"ddim_counts": {"losses": torch.ones(2, 4)}}
    callback.on_load_checkpoint(SimpleNamespace(is_global_zero=True), None, checkpoint)
    callback.on_save_checkpoint(SimpleNamespace(strategy=strategy), None, checkpoint)
    assert reduced == [("meta", "sum")]
