"""Between two reports nothing reads a value from the device: that would wait for all work queued there."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddim.training.module import DiffusionModule

pytestmark = pytest.mark.integration
PACKAGE = str(Path(sys.modules["ddim"].__file__).parent)
READS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.is_nonzero)
# They read tensors that are on the CPU whatever the device of the training.
ON_THE_CPU = {"_indices", "_addressed_dropout", "random_words"}


class Reads(TorchDispatchMode):
    """Records which function of this package, the nearest on the stack, reads the value of a tensor."""

    def __init__(self):
        super().__init__()
        self.callers = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in READS:
            frame = sys._getframe()
            while not frame.f_code.co_filename.startswith(PACKAGE):
                frame = frame.f_back
            self.callers.append(frame.f_code.co_name)
        return function(*args, **(kwargs or {}))


def test_only_steps_that_report_wait_for_the_device(run, monkeypatch):
    by_step, training_step = {}, DiffusionModule.training_step

    def step(self, batch, batch_idx):
        reads.callers = by_step.setdefault(batch["step"], [])
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionModule, "training_step", step)
    with Reads() as reads:
        trainer = {"max_steps": 9, "log_every": 4, "accumulate": 2}
        run(trainer=trainer, network={"dropout": 0.1}, ema={"decay": [0.9, 0.5]})
    waits = {k: set(callers) - ON_THE_CPU for k, callers in by_step.items()}
    assert len(waits) == 9
    assert {k for k, callers in waits.items() if callers} == {3, 7}
    assert all("_loss" in waits[k] for k in (3, 7))  # that Progress reports
