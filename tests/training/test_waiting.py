"""Between two reports nothing looks at a value on the device: to look is to wait for everything queued there."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddim.training.checkpoints import ASK_EVERY
from ddim.training.module import DiffusionModule

PACKAGE = str(Path(sys.modules["ddim"].__file__).parent)
LOOKS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.is_nonzero)
# At tensors that are on the CPU, whatever the device of the training; random_words looks at no others.
ON_THE_CPU = {"_indices", "_addressed_dropout", "random_words"}


def asking():
    """Return the name of the nearest function of this package that is being executed."""
    frame = sys._getframe()
    while not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_name


class Looks(TorchDispatchMode):
    """Notes who asks for the value of a tensor."""

    def __init__(self):
        super().__init__()
        self.callers = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in LOOKS:
            self.callers.append(asking())
        return function(*args, **(kwargs or {}))


@pytest.fixture
def looks(run, monkeypatch):
    """looks(trainer): who looked, by optimiser step, from one training step to the next."""

    def looks(**trainer):
        seen, step = {}, DiffusionModule.training_step

        def noted(self, batch, batch_idx):
            looking.callers = seen.setdefault(batch["step"], [])
            return step(self, batch, batch_idx)

        monkeypatch.setattr(DiffusionModule, "training_step", noted)
        with Looks() as looking:
            run(trainer=trainer, network={"dropout": 0.1}, ema={"decay": [0.9, 0.5]})
        return {k: set(callers) - ON_THE_CPU for k, callers in seen.items()}

    return looks


def test_only_a_step_that_reports_waits_for_the_device(looks):
    seen = looks(max_steps=9, log_every=4, accumulate=2)
    assert len(seen) == 9
    waiting = {k for k, callers in seen.items() if callers}
    assert waiting == {3, 7}
    assert all("on_train_batch_end" in seen[k] for k in (3, 7))  # of Progress and Guard: the test does see


def test_two_processes_ask_one_another_seldom(run, monkeypatch):
    """Lightning asks by a broadcast at every batch, which would end this run here."""
    if torch.cuda.is_initialized():
        pytest.skip("a process that has used CUDA cannot be forked")
    asked = []
    reduce = torch.distributed.all_reduce

    def noted(tensor, *args, **kwargs):
        asked.append(asking())
        return reduce(tensor, *args, **kwargs)

    def end(self, trainer, module):
        monkeypatch.undo()
        assert asked[:-1].count("_told_to_stop") == 3, asked
        assert [name for name in asked if name not in ("_told_to_stop", "train")] == ["_losses_of_all"]
        assert asked.count("train") <= 2  # Lightning, at the beginning and the end

    monkeypatch.setattr(torch.distributed, "broadcast", lambda *args, **kwargs: pytest.fail("asked", pytrace=False))
    monkeypatch.setattr(torch.distributed, "all_reduce", noted)
    monkeypatch.setattr("ddim.training.checkpoints.Checkpoints.on_train_end", end, raising=False)
    steps = 3 * ASK_EVERY + 5
    run(trainer={"max_steps": steps, "log_every": steps, "devices": 2, "strategy": "ddp_fork"})
