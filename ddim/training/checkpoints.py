"""Checkpoints of a run: written whole and sealed, a few of them kept, the newest whole one found again."""

import errno
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from ddim.checkpoints.checksum import write_checksum
from ddim.checkpoints.model import HAS_CHECKSUM, read_checkpoint
from ddim.checkpoints.spec import KEY
from ddim.errors import UserError
from ddim.io import atomic_write

log = logging.getLogger(__name__)

LAST = "last.ckpt"
STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send some time before they kill
FULL = (errno.ENOSPC, errno.EDQUOT)
ASK_EVERY = 10  # steps between two questions whether any process was told to stop


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint so that its name stands for a whole, sealed file at any moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to another name, seal, flush to the disk, then take the name.

        Raises:
            UserError: the disk is full, or the folder cannot be written to; what was there before is untouched.
        """
        path = Path(path)
        what = f"the checkpoint {path} of step {checkpoint.get('global_step')}"
        with explain_disk_errors(path.parent, what), atomic_write(path) as partial:
            if KEY in checkpoint:  # else it is a file that Lightning hands from one process to another
                checkpoint[KEY][HAS_CHECKSUM] = True
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            write_checksum(partial)


@contextmanager
def explain_disk_errors(folder: Path, what: str | None = None) -> Iterator[None]:
    """Say in one sentence why a run cannot write to its folder any more.

    Args:
        folder: which it writes to; by default a file elsewhere that fails is none of this.
        what: it is that cannot be written; by default the file that the failure names, or the folder.

    Raises:
        UserError: something could not be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as failure:
        # torch's writer stumbles once more on its way out and hides the reason behind that.
        error = next((e for e in reversed(list(_chain(failure))) if isinstance(e, OSError)), None)
        if error is None or not (what or error.errno in FULL or _inside(error.filename, folder)):
            raise
        full = error.errno in FULL
        reason = "the disk is full" if full else error.strerror or str(error)
        raise UserError(
            f"{what or error.filename or folder} cannot be written ({reason}); the checkpoints before are intact. "
            f"Make {'room' if full else 'the folder writable'} and go on with ckpt_path=last."
        ) from failure


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those that it came up in the handling of, the newest first."""
    while error is not None:
        yield error
        error = error.__context__


def _inside(name: Any, folder: Path) -> bool:
    return isinstance(name, str | Path) and Path(name).resolve().is_relative_to(folder.resolve())


class Checkpoints(Checkpoint):
    """Saves every so many steps and at the end, keeps the newest few, and saves when the run is told to stop.

    Files are `step_XXXXXXXX.ckpt`; `last.ckpt` is the newest of them by another name (a hard link where the file
    system knows those, else a second file).

    Args:
        folder: gets the files.
        every: optimiser steps between two.
        keep_last: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay for good; 0 for none.
    """

    def __init__(self, folder: Path, every: int, keep_last: int, keep_every: int) -> None:
        self.folder, self.every, self.keep_last, self.keep_every = folder, every, keep_last, keep_every
        self.step = self.saved = 0  # the newest step, and the newest that was saved
        self.signal: int | None = None  # that came

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to listen, until Lightning restores the handlers of before at the end of the training.

        Not with Lightning's own handlers, which wait for other processes inside the handler.
        """
        self.step = self.saved = trainer.global_step
        self.signal = None
        if trainer.is_global_zero:
            for rest in self.folder.glob(".*.ckpt"):  # of a save that was killed
                rest.unlink()
        # With several processes Lightning asks at every batch whether the first of them was told to stop, and waits for
        # the device to answer; here all of them are asked, and seldom.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in STOPPING:
                signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save at the end of a step at which a checkpoint is due, and end the training if it was told to stop."""
        if trainer.global_step == self.step:  # in the middle of accumulated batches
            return
        self.step = trainer.global_step
        if self._told_to_stop(trainer):
            log.warning("told to stop at step %d of %d; saving", self.step, trainer.max_steps)
            trainer.should_stop = True
        if trainer.should_stop or self.step % self.every == 0:
            self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the steps after the last regular checkpoint, which would otherwise be lost."""
        if trainer.global_step != self.saved or not (self.folder / LAST).exists():
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of this step, give it the name of the last one, and remove those that are not kept."""
        self.saved = trainer.global_step
        path = self.folder / f"step_{self.saved:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            _link(path, self.folder / LAST)
            for old in _steps(self.folder)[self.keep_last :]:
                if old != path and (not self.keep_every or _step(old) % self.keep_every):
                    old.unlink()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _told_to_stop(self, trainer: Trainer) -> bool:
        """Whether any process was told to; all of them must come to the same answer at the same step."""
        if trainer.world_size == 1:
            return self.signal is not None
        if self.step % ASK_EVERY:
            return False
        return trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)


def newest_intact(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint of a run that is whole, and its content; None when there are no checkpoints at all.

    Raises:
        UserError: there are some, and all are damaged.
    """
    paths = [path for path in (folder / LAST, *_steps(folder)) if path.exists()]
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
        except UserError as error:
            log.warning("%s Trying the one before.", error)
        else:
            return path, checkpoint
    if paths:
        names = ", ".join(path.name for path in paths)
        raise UserError(f"every checkpoint in {folder} is damaged ({names}); choose another name=... to start afresh.")
    return None


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a run by their steps, the newest first."""
    return sorted(folder.glob("step_*.ckpt"), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _link(path: Path, name: Path) -> None:
    """Give a file another name, which until now may be that of another file."""
    with atomic_write(name) as partial:
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)
