"""A training run: from a validated spec to checkpoints in a folder."""

import logging
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from ddim.checkpoints import ModelSpec
from ddim.checkpoints.model import read_checkpoint
from ddim.checkpoints.posthoc import FOLDER
from ddim.data.datamodule import ImageDataModule
from ddim.data.datasets import load_images
from ddim.data.images import MemoryImages
from ddim.distributed import launched_processes
from ddim.errors import Interrupted, UserError
from ddim.inference.auto import SETTINGS, choose_for, words
from ddim.networks import accelerate, build_network, float32_products
from ddim.results.records import code_revision
from ddim.signals import StopSignals
from ddim.training.callbacks import DivergenceGuard, LossByTime, SampleGrid
from ddim.training.checkpoints import LAST, STATE, AtomicCheckpointIO, Checkpoints, explain_disk_errors
from ddim.training.ema import EMA
from ddim.training.lightning_workarounds import end_alone, leave_signals
from ddim.training.loggers import build_loggers, finish_wandb
from ddim.training.module import COUNTS, DiffusionModule
from ddim.training.posthoc_ema import PostHocEMA
from ddim.training.progress import Progress
from ddim.training.resume import (
    FINGERPRINT,
    SameStep,
    check_images,
    check_state,
    explain_memory_errors,
    explain_restore_errors,
    find_checkpoint,
    fingerprint,
    set_aside,
)
from ddim.training.spec import TrainerSpec, TrainSpec
from ddim.training.validation import Validation

log = logging.getLogger(__name__)
MAX_SIGNAL = 0.1  # of sqrt(alpha_bar[T]): 0.006 in Ho et al.'s schedule, 0.07 in latent diffusion's


@dataclass(frozen=True)
class Trained:
    """What a training ends with.

    Attributes:
        checkpoint: the last one.
        metric: the best value of the metric that `eval` chooses checkpoints by, of which less is better; None without.
    """

    checkpoint: Path
    metric: float | None


def train(spec: TrainSpec, config: Mapping[str, Any]) -> Trained:
    """Train, and return the last checkpoint and the best metric.

    Args:
        spec: the run.
        config: the same as plain values, for the loggers.

    Raises:
        UserError: bad input, or another training in the same folder, before any training step; or the training
            cannot go on.
        Interrupted: it received SIGINT (Ctrl-C), SIGTERM or SIGUSR1, and its state is saved.
    """
    code_revision()  # asked now, for the records: at the first one another commit may be checked out
    model = spec.model_spec()
    _make_folder(spec.checkpoint_dir)
    with lock_folder(spec.folder):
        return _train(spec, model, config)


def _train(spec: TrainSpec, model: ModelSpec, config: Mapping[str, Any]) -> Trained:
    spec, reason, checkpoint, data, module = prepare(spec, model)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        set_aside(spec.folder, spec.checkpoint_dir)
    parameters = sum(p.numel() for p in module.network.parameters())
    log.info(
        "%s: %d images, %s parameters, %d steps of %d images, into %s",
        spec.name,
        len(data.images),
        f"{parameters:,}",
        spec.trainer.max_steps,
        spec.trainer.batch_size,
        spec.folder,
    )
    if reason:
        module.computed = {"settings": words(trainer_settings(spec.trainer)), "reason": reason}
        config = {**config, "computed": module.computed}
    loggers = build_loggers(spec.logger, spec.name, spec.folder, {**config, "parameters": parameters})
    stop = StopSignals()
    callbacks = build_callbacks(spec, model, stop)
    trainer = build_trainer(spec, spec.folder, callbacks, loggers)
    if (launcher := trainer.strategy.launcher) is not None:  # which may start processes that train
        stop.forward = partial(launcher.kill, signal.SIGTERM)
    with (
        end_alone(trainer),
        stop,
        float32_products(bool(spec.trainer.tf32)),
        explain_disk_errors(spec.folder),
        finish_wandb(spec.logger),
        explain_restore_errors(trainer, checkpoint),
        explain_memory_errors(trainer, spec.trainer.batch_size),
    ):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    last, steps = spec.checkpoint_dir / LAST, spec.trainer.max_steps
    # The process that called `fit` need not be one that trained (ddp_spawn); one that did may get here before rank 0
    # has renamed its last checkpoint, and those of other nodes may not see the file.
    written: dict[str, Any] = read_checkpoint(last) if last.exists() else {"global_step": 0}
    step = max(trainer.global_step, written["global_step"])
    if step < steps:
        raise Interrupted(f"stopped at step {step} of {steps} and saved it; go on with checkpoint=last.")
    log.info("trained %d steps; checkpoint: %s", steps, last)
    checkpoints = next(callback for callback in callbacks if isinstance(callback, Checkpoints))
    best = checkpoints.best or written.get(COUNTS, {}).get(STATE, {}).get("best")
    return Trained(last, best[0][0] if spec.eval.every and best else None)


def trainer_settings(trainer: TrainerSpec) -> dict[str, bool]:
    """Return a trainer's settings that are not None, by their names in `ddim.inference.auto.SETTINGS`."""
    values = {name: getattr(trainer, name) for name in SETTINGS if name != "bf16"}
    values["bf16"] = None if trainer.precision is None else trainer.precision == "bf16-mixed"
    return {name: values[name] for name in SETTINGS if values[name] is not None}


def choose_trainer(spec: TrainSpec, model: ModelSpec) -> tuple[TrainSpec, str | None]:
    """Return a run with the fastest settings where they are None, and why; None if there is nothing to choose."""
    t, given = spec.trainer, trainer_settings(spec.trainer)
    if len(given) == len(SETTINGS):
        return spec, None
    if not t.graphs:
        del given["graphs"]  # never chosen for a training, so not worth a word
    alone = str(t.devices) == "1" and t.num_nodes == 1
    images = t.batch_size // t.accumulate
    work = (3 * t.max_steps * t.batch_size, images)
    with torch.random.fork_rng(devices=[]):
        network = build_network(model.network, model.network_spec).eval()  # it is given one image
    choice = choose_for(model, network, _device(t), *work, given, training=True, alone=alone)
    chosen: dict[str, Any] = {name: choice.settings[name] for name in ("tf32", "channels_last", "compile", "winograd")}
    precision: Any = "bf16-mixed" if choice.settings["bf16"] else "32-true"
    return replace(spec, trainer=replace(t, precision=precision, **chosen)), choice.reason


def _device(trainer: TrainerSpec) -> torch.device:
    """Return the kind of device that a run trains on."""
    here = torch.get_default_device()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return here if accelerator is None or trainer.accelerator == here.type else accelerator


class Prepared(NamedTuple):
    """What a run starts from: its settings, why they were chosen, and the checkpoint to resume from, if any."""

    spec: TrainSpec
    reason: str | None
    checkpoint: Path | None
    data: ImageDataModule
    module: DiffusionModule


def prepare(spec: TrainSpec, model: ModelSpec) -> Prepared:
    """Return what a run starts from, with a checkpoint that fits the data and the module.

    Raises:
        UserError: bad input.
    """
    resumed, data = find_checkpoint(spec, model), build_data(spec)  # before the seconds that choosing may take
    spec, reason = choose_trainer(spec, model)
    module = build_module(spec, model)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # the one that writes; reading all images may take long
        module.recipe[FINGERPRINT] = fingerprint(data.images)
    if resumed is None:
        if spec.checkpoint == "last":
            log.info("checkpoint=last: there is none in %s, so the run starts at step 0", spec.checkpoint_dir)
        return Prepared(spec, reason, None, data, module)
    path, checkpoint = resumed
    if FINGERPRINT in module.recipe:
        earlier = getattr(data.images, "earlier_fingerprint", None)  # of LSUN
        module.recipe[FINGERPRINT] = check_images(path, checkpoint, module.recipe[FINGERPRINT], earlier)
    check_state(path, checkpoint, module, spec.ema is not None)
    log.info("goes on at step %d, from %s", checkpoint["global_step"], path)
    return Prepared(spec, reason, path, data, module)


def build_data(spec: TrainSpec) -> ImageDataModule:
    """Read the training set of a run.

    Raises:
        UserError: see `load_images` and `ImageDataModule`.
    """
    t, images = spec.trainer, load_images(spec.data, "train")
    if t.overfit:
        first = torch.arange(min(t.batch_size, len(images)))
        labels = None if images.labels is None else images.labels[first]
        images = MemoryImages(images.name, images.batch(first), labels, images.classes)
    return ImageDataModule(images, t.batch_size, spec.seed, t.max_steps, spec.data.flip, t.num_workers)


def build_module(spec: TrainSpec, model: ModelSpec) -> DiffusionModule:
    """Return the module of a run, its network accelerated as `spec.trainer` asks for."""
    if (signal := model.schedule[model.schedule.T] ** 0.5) > MAX_SIGNAL:
        log.warning(
            "the schedule does not reach noise: x_T still holds %.2f of the image (sqrt(alpha_bar[T]) at T=%d), but "
            "sampling starts from pure noise; take a larger schedule.T or schedule.beta_end.",
            signal,
            model.schedule.T,
        )
    module = DiffusionModule(model, spec.objective, spec.optim, spec.seed, spec.recipe())
    t = spec.trainer
    options = {name: bool(getattr(t, name)) for name in ("channels_last", "compile", "winograd", "graphs")}
    accelerate(module.network, _device(t), **options)
    return module


def build_callbacks(spec: TrainSpec, model: ModelSpec, stop: StopSignals) -> list[Callback]:
    """Return the callbacks of a run that trains `model`, in the order in which they are called; `stop` ends it."""
    t = spec.trainer
    ema = EMA(spec.ema) if spec.ema else None
    checkpoints = Checkpoints(spec.checkpoint_dir, t.checkpoint_every, t.keep_last, t.keep_every, stop, t.keep_best)
    callbacks: list[Callback] = [SameStep(), *([ema] if ema else [])]
    if spec.ema and spec.ema.posthoc:
        callbacks.append(PostHocEMA(spec.folder / FOLDER))
    if 0 < spec.eval.every <= t.max_steps:
        callbacks.append(Validation(spec.eval, spec.evaluation(), ema, spec.objective.reduction, checkpoints))
    return [
        *callbacks,
        LossByTime(model.schedule.T, t.log_every, model.num_classes),
        Progress(t.batch_size, t.log_every),
        SampleGrid(spec.grid, spec.folder / "samples", ema, t.batch_size),
        DivergenceGuard(t.log_every, t.max_skipped),
        checkpoints,
    ]


def build_trainer(
    spec: TrainSpec, folder: Path, callbacks: list[Callback], loggers: list[Logger], max_steps: int | None = None
) -> Trainer:
    """Return the Trainer of a run; with `max_steps`, one that stops there and saves nothing.

    Raises:
        UserError: there is no such accelerator, strategy or number of devices, or other processes were launched.
    """
    t = spec.trainer
    try:
        trainer = Trainer(
            accelerator=t.accelerator,
            devices=list(t.devices) if isinstance(t.devices, tuple) else t.devices,
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
            enable_progress_bar=False,  # Progress has one
            default_root_dir=folder,
            profiler=PROFILERS[t.profiler](dirpath=folder, filename="profile") if t.profiler else None,
        )
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:  # no such hardware, no such name
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    if (count := launched_processes().world_size) not in (1, trainer.world_size):
        alone = ", and each would train alone; add trainer=ddp" * (trainer.world_size == 1)
        raise UserError(
            f"{count} processes were started for this training, which is one of {trainer.world_size}{alone}; set "
            f"trainer.devices={count}, or on several nodes the number on each and trainer.num_nodes."
        )
    leave_signals(trainer)
    return trainer


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another output_dir.") from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run's folder; the lock ends with the process, however that ends.

    Of several processes of one training, the main one holds it.

    Raises:
        UserError: another training holds it.
    """
    lock = FileLock(folder / ".lock", timeout=0)  # never removed, so that all runs lock the same file
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another training is running in {folder}; wait for it, or choose another name=... or output_dir=..."
            ) from error
    try:
        yield
    finally:
        lock.release()


class KernelProfiler(PyTorchProfiler):
    """Torch's profiler of ten steps, after ten that compile: a table of operations and their time on the device."""

    def __init__(self, dirpath: Path, filename: str) -> None:
        super().__init__(
            dirpath,
            filename,
            schedule=torch.profiler.schedule(wait=9, warmup=1, active=10, repeat=1),
            row_limit=60,
            export_to_chrome=False,
            record_module_names=False,
        )

    def _cache_functions_events(self) -> None:
        if getattr(self.profiler, "profiler", None) is not None:  # else there were too few steps
            super()._cache_functions_events()


PROFILERS: dict[str, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "kernels": KernelProfiler}
