"""Each workaround is still needed and still works with the installed Lightning and torch."""

import signal

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddim.checkpoints.model import read_checkpoint
from ddim.training.checkpoints import STOP_CHECK_EVERY
from ddim.training.lightning_workarounds import (
    count_complete_steps,
    keep_buffers_local,
    leave_signals,
    skip_step_if,
)


@pytest.mark.integration
def test_no_broadcast_between_two_processes(run, monkeypatch, two_processes):
    """Lightning's own check for SIGTERM is a broadcast at every batch; our own is a sum every ten steps."""
    seen = []
    all_reduce = torch.distributed.all_reduce

    def record(tensor, *args, **kwargs):
        seen.append(tuple(tensor.shape))
        return all_reduce(tensor, *args, **kwargs)

    def check(self, trainer, module):
        monkeypatch.undo()
        assert seen.count((2, 4)) == 1  # the logged losses
        assert 3 <= seen.count(()) <= 3 + 2  # the checks, and Lightning's at the beginning and the end
        assert seen.count((2,)) == 1  # the steps that the processes start from
        assert len(seen) == 1 + 1 + seen.count(())

    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **kwargs: pytest.fail("sent", pytrace=False))
    monkeypatch.setattr(torch.distributed, "all_reduce", record)
    monkeypatch.setattr("ddim.training.checkpoints.Checkpoints.on_train_end", check, raising=False)
    steps = 3 * STOP_CHECK_EVERY + 5
    run(trainer=two_processes | {"max_steps": steps, "log_every": steps})


@pytest.mark.integration
@pytest.mark.parametrize("accumulate", [1, 3])
def test_counters_become_complete_steps_of_this_run(run, accumulate):
    path = run(trainer={"max_steps": 5, "accumulate": 2, "checkpoint_every": 4})
    for file, completed in ((path, 5 * accumulate), (path.with_name("step_00000004.ckpt"), 4 * accumulate)):
        checkpoint = read_checkpoint(file)
        count_complete_steps(checkpoint, accumulate)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            assert counts["processed"] == counts["ready"] == checkpoint["global_step"] * accumulate
            assert counts["completed"] == completed


def test_local_buffers_are_not_sent_by_ddp(tmp_path):
    module = nn.Linear(2, 2)
    for name in ("constant", "counter", "shared"):
        module.register_buffer(name, torch.zeros(1))
    keep_buffers_local(module, ["constant", "counter"])
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sent = DistributedDataParallel(module).modules_buffers
        assert [id(buffer) for buffer in sent] == [id(module.shared)]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("skip", [True, False])
def test_fused_adam_skips_a_step_on_the_device(skip):
    weight = nn.Parameter(torch.ones(3))
    adam = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.full((3,), float("nan") if skip else 1.0)
    skip_step_if(adam, torch.tensor(skip))
    adam.step()
    assert torch.equal(weight, torch.ones(3)) is skip
    assert all(value.isfinite().all() for value in adam.state[weight].values())
    assert float(adam.state[weight]["step"]) == (0.0 if skip else 1.0)


def test_lightning_leaves_signals_to_the_run():
    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    connector = trainer._signal_connector
    connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) != before  # what is worked around
    connector.teardown()
    assert signal.getsignal(signal.SIGTERM) == before
    leave_signals(trainer)
    connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) == before
