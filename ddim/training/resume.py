"""Which checkpoint a run resumes from, and whether it may."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddim.checkpoints import ModelSpec
from ddim.checkpoints.model import RECIPE, read_checkpoint
from ddim.checkpoints.spec import KEY
from ddim.errors import UserError
from ddim.training.checkpoints import newest_intact
from ddim.training.spec import TrainSpec


def resume_path(spec: TrainSpec, model: ModelSpec) -> Path | None:
    """Return the checkpoint that a run resumes from, None for a new run.

    Raises:
        UserError: it is missing, damaged, of another model or other settings, or past the last step; or the run's
            folder holds a run already, which would be overwritten.
    """
    resumed = _find(spec)
    if resumed is None:
        return None
    path, checkpoint = resumed
    advice = "use the configuration it was trained with, or choose another name=... to start from scratch."
    if differences := ModelSpec.from_dict(checkpoint[KEY]).differences(model):
        raise UserError(
            f"{path} holds another model, so this run cannot resume from it ({'; '.join(differences)}); {advice}"
        )
    if changes := _changes(checkpoint[KEY].get(RECIPE, {}), spec.recipe()):
        raise UserError(
            f"{path} was trained with other settings, so this run cannot resume from it ({'; '.join(changes)}); "
            f"{advice}"
        )
    if checkpoint["global_step"] > spec.trainer.max_steps:
        raise UserError(
            f"{path} is at step {checkpoint['global_step']}, past trainer.max_steps={spec.trainer.max_steps}; "
            "raise max_steps to train on."
        )
    return path


def _find(spec: TrainSpec) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the checkpoint that `spec.checkpoint` names, None for a new run."""
    path = None if spec.checkpoint in (None, "last") else Path(str(spec.checkpoint))
    if path is not None and path.resolve().parent == spec.checkpoint_dir.resolve():
        return path, read_checkpoint(path)
    newest = newest_intact(spec.checkpoint_dir)
    if spec.checkpoint == "last":
        return newest
    if newest:
        raise UserError(
            f"{spec.output_dir} already holds a run at step {newest[1]['global_step']}; go on with checkpoint=last, or "
            "choose another name=... to start from scratch."
        )
    return (path, read_checkpoint(path)) if path is not None else None


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each setting that differs; none for a checkpoint without settings."""
    keys = {**before, **now} if before else {}
    return [f"{key}: {before.get(key)} and {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
