"""Which checkpoint a run resumes from, and whether it may."""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.migration import migrate_checkpoint
from torch import Tensor

from ddim.checkpoints import ModelSpec
from ddim.checkpoints.model import EMA_STATE, NETWORK_PREFIX, RECIPE, read_checkpoint
from ddim.checkpoints.posthoc import FOLDER as POSTHOC_FOLDER
from ddim.checkpoints.posthoc import LENGTHS
from ddim.checkpoints.posthoc import STATE as POSTHOC_STATE
from ddim.checkpoints.spec import KEY
from ddim.data.images import Images
from ddim.distributed import is_restarted
from ddim.errors import UserError
from ddim.inference.batching import is_out_of_memory
from ddim.io import explain_read_errors, is_safetensors
from ddim.results.records import RECORDS
from ddim.training.checkpoints import explain_disk_errors, newest_intact
from ddim.training.lightning_workarounds import is_restoring
from ddim.training.module import COUNTS, MOMENTS, DiffusionModule
from ddim.training.spec import TrainSpec

log = logging.getLogger(__name__)

FINGERPRINT = "data.fingerprint"  # of the training images; older recipes have none
# By a run, with its checkpoints; csv is last, since `set_aside` goes by it, and may be killed between two.
WRITTEN = ("tensorboard", "wandb_id.txt", "samples", RECORDS, POSTHOC_FOLDER, "csv")
FROM_SCRATCH = "choose another name=... to start from scratch."


def find_checkpoint(spec: TrainSpec, model: ModelSpec) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the checkpoint that a run resumes from, None for a new run.

    Raises:
        UserError: it is missing, damaged, of another model or other settings, or past the last step; or the run's
            folder holds a run already, which would be overwritten.
    """
    resumed = _find(spec)
    if resumed is None:
        return None
    path, checkpoint = resumed
    with explain_read_errors(path):
        _check_settings(spec, model, path, checkpoint)
    return path, checkpoint


def _check_settings(spec: TrainSpec, model: ModelSpec, path: Path, checkpoint: Mapping[str, Any]) -> None:
    advice = f"use the configuration it was trained with, or {FROM_SCRATCH}"
    stored = ModelSpec.from_dict(checkpoint[KEY])
    if differences := stored.differences(model):
        raise UserError(
            f"{path} holds another model, so this run cannot resume from it ({'; '.join(differences)}); {advice}"
        )
    recipe = {key: value for key, value in checkpoint[KEY].get(RECIPE, {}).items() if key != FINGERPRINT}
    changes = _changes(recipe, spec.recipe())
    # Not a difference of the models: weights have the same meaning with any dropout.
    before, now = (getattr(m.network_spec, "dropout", None) for m in (stored, model))
    if before != now:
        changes.append(f"network.dropout: {before} and {now}")
    if changes:
        raise UserError(
            f"{path} was trained with other settings, so this run cannot resume from it ({'; '.join(changes)}); "
            f"{advice}"
        )
    if checkpoint["global_step"] > spec.trainer.max_steps:
        raise UserError(
            f"{path} is at step {checkpoint['global_step']}, past trainer.max_steps={spec.trainer.max_steps}; "
            "raise max_steps to train on."
        )


def set_aside(folder: Path, checkpoints: Path) -> None:
    """Move what a run wrote that ended before its first checkpoint: it would be taken for that of the run to come."""
    found = [path for name in WRITTEN if (path := folder / name).is_file() or (path.is_dir() and any(path.iterdir()))]
    # Each training begins its csv at once; without one, samples and averages are of other commands.
    if folder / "csv" not in found or next(checkpoints.glob("[!.]*.ckpt"), None) is not None:
        return
    places = (folder / f"without_checkpoint_{number}" for number in itertools.count(1))
    aside = next(place for place in places if not place.exists())
    with explain_disk_errors(folder, str(aside)):
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
    log.warning("a run in %s ended before its first checkpoint; what it wrote is in %s now.", folder, aside)


def fingerprint(images: Images) -> str:
    """Return 64 hexadecimal digits that identify images and their labels."""
    pixels = images.fingerprint()
    if images.labels is None:
        return pixels
    return hashlib.sha256(pixels.encode() + images.labels.numpy().tobytes()).hexdigest()


def check_images(path: Path, checkpoint: Mapping[str, Any], fingerprint: str, earlier: str | None = None) -> str:
    """Refuse a checkpoint that was trained on images of another fingerprint; warn when it has none.

    Return the fingerprint to go on with: the one that the training has, by which post-hoc averages know theirs.

    Args:
        path, checkpoint: where the run resumes.
        fingerprint: of the images now.
        earlier: as earlier code had it.

    Raises:
        UserError: it was.
    """
    before = checkpoint[KEY].get(RECIPE, {}).get(FINGERPRINT)
    if before is None:
        log.warning("%s is of earlier code and does not tell its training images; they are not compared.", path)
    elif before not in (fingerprint, earlier):
        raise UserError(
            f"{path} was trained on other images or labels (fingerprint {str(before)[:16]}, now {fingerprint[:16]}), "
            f"so this run cannot resume from it; set data to the images it was trained on, or {FROM_SCRATCH}"
        )
    return before or fingerprint


def check_state(path: Path, checkpoint: dict[str, Any], module: DiffusionModule, has_ema: bool) -> None:
    """Refuse a checkpoint whose training state is incomplete or has other shapes than the parameters.

    Neither torch nor Lightning checks all of it: fused Adam reads outside a tensor that is too small.

    Raises:
        UserError: it is.
    """
    with explain_read_errors(path):
        migrate_checkpoint(checkpoint)  # as Lightning does; it needs entries of its own
        parameters = dict(module.network.named_parameters())
        weights = {name.removeprefix(NETWORK_PREFIX): value for name, value in checkpoint["state_dict"].items()}
        _check_shapes("weights", weights, module.network.state_dict())
        (adam,), (scheduler,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        (group,) = adam["param_groups"]
        states = {name: adam["state"].get(i) for name, i in zip(parameters, group["params"], strict=True)}
        if not checkpoint["global_step"] and not adam["state"]:  # saved before the first step
            states = {}
        for key in MOMENTS if states else ():
            _check_shapes(f"optimizer state {key}", {name: state[key] for name, state in states.items()}, parameters)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
        if progress["step"]["total"]["completed"] != checkpoint["global_step"]:
            raise ValueError("the loops are at another step")
        numbers = [group["lr"], scheduler["last_epoch"], *(state["step"] for state in states.values())]
        if not all(float(number) >= 0 for number in numbers):  # float raises unless it is one number
            raise ValueError("a negative step or learning rate")
        if has_ema:
            ema = checkpoint["callbacks"][EMA_STATE]
            for shadow in (ema["shadow"], *ema.get("others", {}).values()):
                _check_shapes("EMA", shadow, parameters)
        if posthoc := checkpoint.get(POSTHOC_STATE):
            for length in LENGTHS:
                _check_shapes(f"post-hoc EMA {length:g}", posthoc["averages"][f"{length:g}"], parameters)
            if not 0 <= posthoc["start"] <= checkpoint["global_step"]:
                raise ValueError("the post-hoc EMA begins later")
        counts = checkpoint.get(COUNTS, {})
        history = tuple(module.loss_history.shape)
        if module.has_importance_times and "loss_history" not in counts:
            raise ValueError("loss_history is missing")
        losses = (2, 4 if module.spec.num_classes is None else 8)
        for key, shape in (("skipped", (2,)), ("losses", losses), ("loss_history", history)):
            if key in counts and counts[key].shape != shape:
                raise ValueError(f"{key} has the shape {tuple(counts[key].shape)}, not {shape}")


class SameStep(Callback):
    """Refuses a run whose processes start from different steps; it comes before callbacks that communicate.

    Each process looks for its checkpoint itself, and of the state of rank 0 the others get the weights alone.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the steps of all processes.

        Raises:
            UserError: they differ.
        """
        here = torch.zeros(trainer.world_size, dtype=torch.int64, device=pl_module.device)
        here[trainer.global_rank] = trainer.global_step
        steps = trainer.strategy.reduce(here, reduce_op="sum").tolist()
        if len(set(steps)) > 1:
            raise UserError(
                f"the processes resume from different steps (by rank: {', '.join(map(str, steps))}); all of them must "
                f"see the same {trainer.default_root_dir}: choose an output_dir on a disk that all nodes share."
            )


@contextmanager
def explain_restore_errors(trainer: Trainer, path: Path | None) -> Iterator[None]:
    """Turn what Lightning raises in the block while it restores the checkpoint `path` into a UserError."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        if path is None or not is_restoring(trainer):
            raise
        with explain_read_errors(path):
            raise error


@contextmanager
def explain_memory_errors(trainer: Trainer, batch_size: int) -> Iterator[None]:
    """Turn what is raised in the block when a step of `batch_size` images does not fit into memory into a UserError."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        parts, most = trainer.accumulate_grad_batches, batch_size // trainer.world_size
        if parts == most:
            reason = "not even one image at a time fits into memory; take a smaller network, or a device with more."
            raise UserError(reason) from error
        more = next(n for n in range(min(2 * parts, most), most + 1) if most % n == 0)
        raise UserError(
            f"the training does not fit into memory; if it is the step, trainer.accumulate={more} (now {parts}) "
            "computes it in so many parts with the same result up to rounding."
        ) from error


def _check_shapes(what: str, values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless `values` has the names and shapes of `expected`."""
    if missing := sorted(expected.keys() ^ values.keys()):
        raise ValueError(f"{what}: {missing[0]} is missing or unknown")
    for name, value in values.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"{what}: {name} has the shape {(*value.shape,)}, not {(*expected[name].shape,)}")


def _find(spec: TrainSpec) -> tuple[Path, dict[str, Any]] | None:
    """Return path and content of the checkpoint that `spec.checkpoint` names, None for a new run.

    A job that SLURM started again has the command of its first start, and perhaps checkpoints since then.
    """
    if is_restarted() and (newest := newest_intact(spec.checkpoint_dir)):
        log.info("SLURM started this job again: it goes on from %s", newest[0])
        return newest
    path = None if spec.checkpoint in (None, "last") else Path(str(spec.checkpoint))
    if path is not None and path.is_file() and is_safetensors(path):
        raise UserError(
            f"{path} is a model file, without the state of an optimiser; a training goes on from a checkpoint of one, "
            "such as RUN/checkpoints/last.ckpt."
        )
    if path is not None and path.resolve().parent == spec.checkpoint_dir.resolve():
        return path, read_checkpoint(path)
    newest = newest_intact(spec.checkpoint_dir)
    if spec.checkpoint == "last":
        return newest
    if newest:
        raise UserError(
            f"{spec.output_dir} already holds a run at step {newest[1]['global_step']}; go on with checkpoint=last, or "
            f"{FROM_SCRATCH}"
        )
    return (path, read_checkpoint(path)) if path is not None else None


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each setting that differs; none for a checkpoint without settings."""
    keys = {**before, **now} if before else {}
    return [f"{key}: {before.get(key)} and {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
