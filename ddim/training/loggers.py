"""Where a training run writes its numbers: CSV always, W&B and TensorBoard when asked."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch.loggers
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from ddim.results.protocol import is_distance
from ddim.results.wandb import LoggerSpec, explain_wandb_errors
from ddim.training.checkpoints import LAST

STEP = "trainer/global_step"  # Lightning's x-axis of all charts


class WandbLogger(lightning.pytorch.loggers.WandbLogger):
    """Lightning's, with the best value of each metric in the run's summary, and our checkpoints as artifacts.

    Args:
        log_model: which checkpoints, see `LoggerSpec`.
        options: Lightning's and those of `wandb.init`.
    """

    def __init__(self, *, log_model: Literal["all", "best", False], **options: Any) -> None:
        super().__init__(**options)
        self.log_model = log_model
        self.defined: set[str] = set()  # metrics that W&B was told about

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics; of a loss and of what validation measures, the summary keeps the best value and the last."""
        for name in metrics.keys() - self.defined:
            group, _, metric = name.partition("/")
            if group == "val" or metric.startswith("loss"):
                best = "min" if is_distance(metric) else "max"
                escaped = name.replace(".", r"\.")  # for W&B a point leads into a nested value
                self.experiment.define_metric(escaped, step_metric=STEP, step_sync=True, summary=f"{best},last")
        self.defined.update(metrics)
        super().log_metrics(metrics, step)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Make the checkpoints that `log_model` asks for versions of the artifact model-RUNID.

        W&B copies a file before it uploads it, so it may be removed or replaced afterwards.

        Args:
            checkpoint_callback: a `ddim.training.checkpoints.Checkpoints` that has saved.
        """
        import wandb

        folder, step = checkpoint_callback.folder, checkpoint_callback.saved
        is_best = checkpoint_callback.best_steps[:1] == [step]
        if self.log_model == "all" or (self.log_model == "best" and is_best):
            artifact = wandb.Artifact(f"model-{self.experiment.id}", type="model", metadata={"step": step})
            artifact.add_file(str(folder / LAST), name="model.ckpt", skip_cache=True)  # whose copies stay for good
            self.experiment.log_artifact(artifact, aliases=["latest", f"step-{step}", *["best"] * is_best])


def build_loggers(spec: LoggerSpec, name: str, folder: Path, config: Mapping[str, Any]) -> list[Logger]:
    """Return the loggers of the run `name`, all of which write under `folder`.

    Args:
        spec: which ones.
        name: of the run.
        folder: of the run; CSV goes to csv/version_0/metrics.csv in it (version_1 after resuming: nothing is
            overwritten), W&B to wandb/, TensorBoard to tensorboard/.
        config: plain values to store with the run.
    """
    loggers: list[Logger] = [CSVLogger(folder, name="csv")]
    if spec.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if spec.wandb:
        loggers.append(_wandb(spec, name, folder, dict(config)))
    return loggers


def _wandb(spec: LoggerSpec, name: str, folder: Path, config: dict[str, Any]) -> WandbLogger:
    folder.mkdir(parents=True, exist_ok=True)
    # The id is stored with the run, so that a resumed training continues the same W&B run. Only rank 0 logs.
    id_file = folder / "wandb_id.txt"
    if rank_zero_only.rank == 0 and not id_file.exists():  # type: ignore[attr-defined]
        # The agent of a W&B sweep has chosen the id, and the project.
        chosen = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
        id_file.write_text(chosen or os.urandom(4).hex(), encoding="utf-8")
    return WandbLogger(
        log_model=spec.log_model,
        name=name,
        save_dir=folder,
        project=spec.project,
        entity=spec.entity,
        group=spec.group,
        tags=list(spec.tags),
        notes=spec.notes,
        job_type="train",
        id=id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None,
        resume="allow",
        offline=spec.offline,
        config=config,
    )


@contextmanager
def finish_wandb(spec: LoggerSpec) -> Iterator[None]:
    """End the W&B run, if there is one, after the block: the next training in this process is another run.

    Raises:
        UserError: W&B is wanted online, and the user is not logged in.
    """
    if not spec.wandb:
        yield
        return
    import wandb

    failed = 1
    try:
        with explain_wandb_errors():
            yield
        failed = 0
    finally:
        wandb.finish(exit_code=failed)
