"""Every use of Lightning's and torch's private parts, each with its reason.

tests/training/test_lightning_workarounds.py notices when a new version needs another workaround, or none.
"""

import atexit
import logging
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from ddim.errors import Interrupted, PeerFailed

log = logging.getLogger(__name__)


def disable_sigterm_broadcast(trainer: Trainer) -> None:
    """Stop Lightning from asking rank 0 at every batch whether it received SIGTERM.

    With several processes that is a broadcast, and a wait for the device, per batch. `Checkpoints` asks all of them,
    every few steps.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def leave_signals(trainer: Trainer) -> None:
    """Stop Lightning from handling signals: its handlers end a run without a checkpoint, or wait for others."""
    trainer._signal_connector.register_signal_handlers = _do_nothing  # type: ignore[method-assign]


def _do_nothing() -> None:
    pass


@contextmanager
def end_alone(trainer: Trainer) -> Iterator[None]:
    """Of several processes, let one that fails in the block say why and end; the script of the main one reports itself.

    The others may wait for it in a collective. Lightning destroys NCCL's group at exit, which waits for them in turn;
    and it leaves the processes that it started running, unless the error is Ctrl-C.
    """
    try:
        yield
    except Exception as error:
        if trainer.world_size > 1 and not isinstance(error, Interrupted):
            if trainer.global_rank and not isinstance(error, PeerFailed):
                log.error("process %d of %d failed: %s", trainer.global_rank, trainer.world_size, error)
            atexit.unregister(_destroy_dist_connection)
            if (launcher := trainer.strategy.launcher) is not None:
                # Handlers of weaker signals are in Python, and would wait for the collective.
                launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
                getattr(launcher, "procs", []).clear()  # else Lightning's observer kills this process for their end
        raise


def count_complete_steps(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Rewrite the batch counters of a checkpoint as complete optimiser steps of `accumulate` micro-batches each.

    Lightning counts in micro-batches of the run that wrote the checkpoint, whose accumulation may differ, and resumes
    in the middle of a step when they do not divide. Batches here depend on the step, so that is wrong.
    """
    processed = checkpoint["global_step"] * accumulate
    loop = checkpoint["loops"]["fit_loop"]
    # 1 when saved in the hooks of the batch that ended the step: Lightning then completes that batch itself.
    incomplete = checkpoint["global_step"] - loop["epoch_loop.state_dict"]["_batches_that_stepped"]
    for counts in (loop["epoch_loop.batch_progress"]["total"], loop["epoch_loop.batch_progress"]["current"]):
        counts.update(ready=processed, started=processed, processed=processed, completed=processed - incomplete)


def is_restoring(trainer: Trainer) -> bool:
    """Return whether Lightning is restoring a checkpoint, or failed to.

    What it raises then has no type of its own, and says nothing of a checkpoint.
    """
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def keep_buffers_local(module: LightningModule, names: Iterable[str]) -> None:
    """Stop DDP from sending these buffers of rank 0 to all others at every step.

    DDP's own argument for it (`broadcast_buffers=False`) is about all buffers, and not Lightning's to set by name.
    """
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


def skip_step_if(adam: torch.optim.Adam, skip: Tensor) -> None:
    """Let the following step of a fused Adam change nothing where `skip`, bool (), is true.

    This is how torch's GradScaler skips steps without reading the flag back from the device; a test in Python, as
    `if skip:`, would wait for the device at every step.
    """
    adam.found_inf = skip.float()  # type: ignore[attr-defined]
