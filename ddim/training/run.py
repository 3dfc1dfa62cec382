"""A training run: from a validated spec to checkpoints in a folder."""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ddim.checkpoints import ModelSpec
from ddim.checkpoints.model import read_checkpoint
from ddim.config import config_context
from ddim.data.datamodule import ImageDataModule
from ddim.data.datasets import load_images
from ddim.data.images import Images
from ddim.errors import Interrupted, UserError
from ddim.networks import accelerate
from ddim.training.callbacks import DivergenceGuard, Progress, SampleGrid
from ddim.training.checkpoints import LAST, AtomicCheckpointIO, Checkpoints, explain_disk_errors
from ddim.training.dry_run import Stopwatch, plan
from ddim.training.ema import EMA
from ddim.training.loggers import build_loggers, finish_wandb
from ddim.training.module import DiffusionModule
from ddim.training.resume import resume_path
from ddim.training.spec import TrainSpec

log = logging.getLogger(__name__)


def train(spec: TrainSpec, config: Mapping[str, Any]) -> Path:
    """Train, and return the path of the last checkpoint.

    Args:
        spec: the run.
        config: the same as plain values, to be kept by the loggers.

    Raises:
        UserError: bad input, before any training step; or the training cannot go on.
        Interrupted: it was told to stop (SIGTERM, SIGUSR1), and its state is saved.
    """
    folder = Path(spec.output_dir)
    model = _checked_model(spec)
    checkpoints = folder / "checkpoints"
    resume = resume_path(spec, model, checkpoints)
    _make_folder(checkpoints)
    images, module, data = _prepare(spec, model)
    log.info(
        "%s: %d images, %s parameters, %d steps of %d images, into %s",
        spec.name,
        len(images),
        f"{sum(p.numel() for p in module.network.parameters()):,}",
        spec.trainer.max_steps,
        spec.trainer.batch_size,
        folder,
    )
    trainer = build_trainer(
        spec, folder, _callbacks(spec, folder), build_loggers(spec.logger, spec.name, folder, config)
    )
    with explain_disk_errors(folder), finish_wandb(spec.logger):
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    last, steps = checkpoints / LAST, spec.trainer.max_steps
    # The process that called `fit` need not be one that trained; one that did may be here before the first of them has
    # named its last checkpoint, and those of other nodes may not see the file.
    step = max(trainer.global_step, read_checkpoint(last)["global_step"] if last.exists() else 0)
    if step < steps:
        raise Interrupted(f"stopped at step {step} of {steps} and saved it; go on with ckpt_path=last.")
    log.info("trained %d steps; checkpoint: %s", steps, last)
    return last


def dry_run(spec: TrainSpec, steps: int = 10) -> list[str]:
    """Return, in lines for people, what a run is going to be, after `steps` real steps of which nothing is kept.

    Raises:
        UserError: bad input, as from `train`.
    """
    model = _checked_model(spec)
    folder = Path(spec.output_dir)
    resume = resume_path(spec, model, folder / "checkpoints")
    images, module, data = _prepare(spec, model)
    stopwatch = Stopwatch(first=2)
    callbacks: list[Callback] = [EMA(spec.ema)] if spec.ema else []
    trainer = build_trainer(spec, folder, [*callbacks, stopwatch], loggers=[], max_steps=stopwatch.first + steps)
    trainer.fit(module, data)
    parameters = sum(p.numel() for p in module.network.parameters())
    done = read_checkpoint(resume)["global_step"] if resume else 0
    return plan(spec, model, parameters, len(images), stopwatch, trainer, done)


def _checked_model(spec: TrainSpec) -> ModelSpec:
    model = spec.model_spec()
    with config_context("grid.sampler"):
        spec.grid.sampler.tau(model.schedule.T)
    return model


def _prepare(spec: TrainSpec, model: ModelSpec) -> tuple[Images, DiffusionModule, ImageDataModule]:
    t = spec.trainer
    images = load_images(spec.data, "train")
    data = ImageDataModule(images, t.batch_size, spec.seed, t.max_steps, spec.data.flip, t.num_workers)
    return images, build_module(spec, model), data


def build_module(spec: TrainSpec, model: ModelSpec) -> DiffusionModule:
    """Return the module of a run, its network tuned as `spec.trainer` says."""
    module = DiffusionModule(model, spec.objective, spec.optim, spec.seed, spec.recipe())
    t = spec.trainer
    here = next(module.network.parameters()).device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = here if found is None or t.accelerator == here.type else found
    ways = {name: getattr(t, name) for name in ("channels_last", "compile", "winograd")}
    accelerate(module.network, device, **ways)
    return module


def _callbacks(spec: TrainSpec, folder: Path) -> list[Callback]:
    t = spec.trainer
    ema = EMA(spec.ema) if spec.ema else None
    callbacks: list[Callback] = [ema] if ema else []
    return [
        *callbacks,
        Progress(t.batch_size, t.log_every),
        SampleGrid(spec.grid, folder / "samples", ema, t.batch_size),
        DivergenceGuard(t.log_every, t.max_skipped),
        Checkpoints(folder / "checkpoints", t.checkpoint_every, t.keep_last, t.keep_every),
    ]


def build_trainer(
    spec: TrainSpec, folder: Path, callbacks: list[Callback], loggers: list[Logger], max_steps: int | None = None
) -> Trainer:
    """Return the Trainer of a run; with `max_steps`, one that stops there, keeps nothing and shows no bar.

    Raises:
        UserError: there is no such accelerator, strategy or number of devices.
    """
    t = spec.trainer
    try:
        return Trainer(
            accelerator=t.accelerator,
            devices=t.devices,
            num_nodes=t.num_nodes,
            strategy=t.strategy,
            precision=t.precision,
            max_steps=max_steps or t.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=t.accumulate,
            gradient_clip_val=spec.optim.grad_clip,
            log_every_n_steps=t.log_every,
            logger=loggers or False,
            enable_checkpointing=max_steps is None,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_model_summary=False,
            # A bar for people, lines for logs.
            enable_progress_bar=os.isatty(2) and max_steps is None,
            default_root_dir=folder,
        )
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:  # no such hardware, no such name
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another output_dir.") from error
