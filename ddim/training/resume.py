"""Where a run goes on from, and whether it may."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddim.checkpoints import ModelSpec
from ddim.checkpoints.model import RECIPE, read_checkpoint
from ddim.checkpoints.spec import KEY
from ddim.errors import UserError
from ddim.training.checkpoints import newest_intact
from ddim.training.spec import TrainSpec


def resume_path(spec: TrainSpec, model: ModelSpec, checkpoints: Path) -> Path | None:
    """Return the checkpoint to go on from, after checking that it is whole and belongs to this run."""
    path = None if spec.ckpt_path in (None, "last") else Path(str(spec.ckpt_path))
    here = path is None or path.resolve().parent == checkpoints.resolve()
    newest = newest_intact(checkpoints) if path is None or not here else None
    if newest and (spec.ckpt_path is None or not here):
        raise UserError(
            f"{spec.output_dir} already holds a run at step {newest[1]['global_step']}; go on with ckpt_path=last, or "
            "choose another name=... to start afresh."
        )
    if path is not None:
        checkpoint = read_checkpoint(path)
    elif newest:
        path, checkpoint = newest
    else:
        return None
    differences = ModelSpec.from_dict(checkpoint[KEY]).differences(model)
    if differences:
        raise UserError(
            f"{path} holds another model, so this run cannot resume from it ({'; '.join(differences)}); "
            "use the configuration it was trained with, or choose another name=... to start afresh."
        )
    if changes := _changes(checkpoint[KEY].get(RECIPE, {}), spec.recipe()):
        raise UserError(
            f"{path} was trained with other settings, so this run cannot resume from it ({'; '.join(changes)}); "
            "use the configuration it was trained with, or choose another name=... to start afresh."
        )
    if checkpoint["global_step"] > spec.trainer.max_steps:
        raise UserError(
            f"{path} is at step {checkpoint['global_step']}, past trainer.max_steps={spec.trainer.max_steps}; "
            "raise max_steps to train on."
        )
    return path


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each setting that differs; none for a checkpoint that keeps no settings."""
    keys = {**before, **now} if before else {}
    return [f"{key}: {before.get(key)} and {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
