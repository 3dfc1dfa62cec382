"""Checkpoints of a run: atomic writes with a checksum, how many are kept, saving on signals, the newest intact one."""

import errno
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
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
from ddim.signals import StopSignals
from ddim.training.lightning_workarounds import disable_sigterm_broadcast
from ddim.training.module import COUNTS, step_ended

log = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"
STATE, FILES = "validation", "files"  # in the entry COUNTS of a checkpoint
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
STOP_CHECK_EVERY = 10  # steps between two checks whether any of several processes received a signal


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, with a checksum at the end."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a temporary name, add the checksum, flush to the disk, then rename.

        Raises:
            UserError: the disk is full, or the folder cannot be written to; older checkpoints are left unchanged.
        """
        path = Path(path)
        what = f"the checkpoint {path} of step {checkpoint.get('global_step')}"
        with explain_disk_errors(path.parent, what), atomic_write(path) as partial:
            if KEY in checkpoint:  # otherwise Lightning passes it from one process to another
                checkpoint[KEY][HAS_CHECKSUM] = True
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
            write_checksum(partial)


@contextmanager
def explain_disk_errors(folder: Path, what: str | None = None) -> Iterator[None]:
    """Turn failed writes of a run into one sentence.

    Args:
        folder: of the run; without `what`, failures outside it are passed on unless the disk is full.
        what: is written in the block, for the message; by default the file that the failure names, or the folder.

    Raises:
        UserError: something could not be written.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as failure:
        # torch's writer raises a second error while it closes the file, which hides the first.
        error = next((e for e in reversed(list(_chain(failure))) if isinstance(e, OSError)), None)
        if error is None or not (what or error.errno in DISK_FULL or _inside(error.filename, folder)):
            raise
        full = error.errno in DISK_FULL
        reason = "the disk is full" if full else error.strerror or str(error)
        raise UserError(
            f"{what or error.filename or folder} cannot be written ({reason}); the checkpoints before are intact. "
            f"Make {'room' if full else 'the folder writable'} and go on with checkpoint=last."
        ) from failure


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and those during whose handling it was raised, the newest first."""
    while error is not None:
        yield error
        error = error.__context__


def _inside(name: Any, folder: Path) -> bool:
    return isinstance(name, str | Path) and Path(name).resolve().is_relative_to(folder.resolve())


class Checkpoints(Checkpoint):
    """Saves every so many steps, at the end, and on a signal to stop; keeps the newest few.

    Files are `step_XXXXXXXX.ckpt`; `last.ckpt` is a second name of the newest (a hard link where the file system has
    them, else a copy), and `best.ckpt` of the best.

    Args:
        folder: gets the files.
        every: optimiser steps between two.
        keep_last: how many of the newest are kept.
        keep_every: those whose step is a multiple of it are kept for good; 0 for none. Those that a call before kept in
            this way are left too, whatever this one is told.
        stop: holds signals to stop back while the run trains.
        keep_best: how many of the best are kept; they are saved also where `every` does not ask for it.
    """

    def __init__(
        self, folder: Path, every: int, keep_last: int, keep_every: int, stop: StopSignals, keep_best: int = 0
    ) -> None:
        self.folder, self.every, self.keep_last, self.keep_every = folder, every, keep_last, keep_every
        self.stop, self.keep_best = stop, keep_best
        self.saved = 0  # the step of the newest checkpoint
        self.files: list[tuple[int, bool]] | None = None  # (step, kept for good) of the newest and best, oldest first
        self.best: list[tuple[float, int]] = []  # (metric, step), the best first; at least one if a step was ranked
        self.ranked = 0  # the step that was ranked last, since this process started
        self.protocol: str | None = None  # of the validation that ranks, if there is one
        self.loaded: dict[str, Any] = {}  # what was stored of the validation before

    def rank(self, metric: float, step: int) -> bool:
        """Note the metric of this step, of which less is better; return whether it is the best so far."""
        metric = _ordered(metric)
        self.best = sorted({*self.best, (metric, step)})[: max(1, self.keep_best)]
        self.ranked = step
        return math.isfinite(metric) and self.best[0] == (metric, step)

    @property
    def best_steps(self) -> list[int]:
        """The steps whose checkpoints are kept as the best, the best first."""
        return [step for metric, step in self.best[: self.keep_best] if math.isfinite(metric)]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore which files there are, and which steps are best, unless they were ranked by other settings."""
        if (files := checkpoint.get(COUNTS, {}).get(FILES)) is not None:
            self.files = [(int(step), bool(kept)) for step, kept in files]
        self.loaded = checkpoint.get(COUNTS, {}).get(STATE, {})
        if self.protocol in (None, self.loaded.get("protocol")):
            best = sorted((_ordered(float(metric)), int(step)) for metric, step in self.loaded.get("best", []))
            if self.keep_best and not (self.folder / BEST).exists():
                # Of a run in another folder, whose files are not here: the best of this one is still to come.
                best = [(metric, step) for metric, step in best if step_file(self.folder, step).exists()]
            self.best = best

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store which files there are; and what a validation stored before that this run does without."""
        if self.files is not None:
            checkpoint.setdefault(COUNTS, {})[FILES] = self.files
        if self.protocol is None and self.loaded:
            checkpoint.setdefault(COUNTS, {})[STATE] = self.loaded

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle the stop signals also in a process that Lightning started; set a best of other settings aside."""
        self._rename_best(trainer)
        if trainer.global_step != self.ranked:  # else a validation was made up for, and is saved with the step
            self.saved = trainer.global_step
        if trainer.is_global_zero:
            for partial in self.folder.glob(".*.ckpt"):  # left by a save that was killed
                partial.unlink()
        disable_sigterm_broadcast(trainer)
        self.stop.listen()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the training after a signal."""
        if step_ended(trainer, batch_idx) and self._stop_requested(trainer):
            log.warning("stop requested at step %d of %d; saving", trainer.global_step, trainer.max_steps)
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the step before if a checkpoint is due, or if it is one of the best.

        Its metrics are written by now: they would be lost by a kill between the checkpoint and them.
        """
        step = trainer.global_step
        if step != self.saved and (step_ended(trainer, batch_idx - 1, self.every) or step in self.best_steps):
            self.save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the steps after the last regular checkpoint."""
        if trainer.global_step != self.saved or not (self.folder / LAST).exists():
            self.save(trainer)

    def _rename_best(self, trainer: Trainer) -> None:
        """Give another name to a best checkpoint that was ranked by numbers of other settings, the first time.

        If such a run has ended before it saved a step, the checkpoints know nothing of it: the best has its name again.
        """
        best, before = self.folder / BEST, self.loaded.get("protocol")
        if None in (self.protocol, before) or before == self.protocol:
            steps = self.best_steps[:1]
            if trainer.is_global_zero and steps and not best.exists() and step_file(self.folder, *steps).exists():
                _link(step_file(self.folder, *steps), best)
            return
        self.loaded = {}
        if trainer.is_global_zero and best.exists():
            aside = best.with_name(f"best_before_{step_file(self.folder, trainer.global_step).name}")
            best.rename(aside)
            log.warning("eval has other settings than before, whose best checkpoint is now %s", aside)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of this step, point last.ckpt to it, and remove those that are not kept."""
        self._rename_best(trainer)  # of a run that was finished already, which has not begun to train
        self.saved = trainer.global_step
        path = step_file(self.folder, self.saved)
        if self.files is None:  # of earlier code, which does not state them: others than these were kept for good
            self.files = sorted((_step(old), False) for old in _steps(self.folder)[: self.keep_last])
        kept = self._is_kept(self.saved) or (self.saved, True) in self.files
        # A step that this call keeps, though not the one that saved it, stays kept when the next call goes on.
        others = [(step, stays or self._is_kept(step)) for step, stays in self.files if step != self.saved]
        self.files = [*others, (self.saved, kept)]
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            if self.best_steps[:1] == [self.saved]:
                _link(path, self.folder / BEST)
            _link(path, self.folder / LAST)  # after the best: a kill in between leaves the step to be done again
            self._remove_old()
        for logger in trainer.loggers:
            logger.after_save_checkpoint(self)  # type: ignore[arg-type]  # Lightning's hook; W&B may take a copy

    def _is_kept(self, step: int) -> bool:
        return bool(self.keep_every) and step % self.keep_every == 0

    def _remove_old(self) -> None:
        """Remove the checkpoints that are neither among the newest nor the best, nor kept for good."""
        assert self.files is not None
        for file in self.files[: -self.keep_last]:
            step, kept = file
            if step not in self.best_steps:
                if not kept:
                    step_file(self.folder, step).unlink(missing_ok=True)
                self.files.remove(file)

    def _stop_requested(self, trainer: Trainer) -> bool:
        """Return whether any process received a signal: the same answer on all of them, at the same step."""
        if trainer.world_size == 1:
            return self.stop.received is not None
        if trainer.global_step % STOP_CHECK_EVERY:
            return False
        return trainer.strategy.reduce_boolean_decision(self.stop.received is not None, all=False)


def _ordered(metric: float) -> float:
    """Return a metric such that less is better: NaN has no order."""
    return metric if math.isfinite(metric) else math.inf


def newest_intact(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the newest intact checkpoint of a run; None when there are no checkpoints.

    Raises:
        UserError: all of them are damaged.
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
        raise UserError(
            f"every checkpoint in {folder} is damaged ({names}); choose another name=... to start from scratch."
        )
    return None


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first; files of other names, such as copies, are the user's."""
    paths = [path for path in folder.glob("step_*.ckpt") if re.fullmatch(r"step_\d+", path.stem) and path.is_file()]
    return sorted(paths, key=_step, reverse=True)


def step_file(folder: Path, step: int) -> Path:
    """Return the checkpoint of a step."""
    return folder / f"step_{step:08d}.ckpt"


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _link(path: Path, name: Path) -> None:
    """Give a file a second name; a file that had it is replaced."""
    with atomic_write(name) as partial:
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, partial)
