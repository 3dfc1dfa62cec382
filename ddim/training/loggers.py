"""Where a training run writes its numbers: CSV always, W&B and TensorBoard when asked."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch.loggers
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from ddim.results.protocol import is_distance
from ddim.results.wandb import LoggerSpec, explain_wandb_errors

STEP = "trainer/global_step"  # Lightning's x-axis of all charts


class WandbLogger(lightning.pytorch.loggers.WandbLogger):
    """Lightning's, with the best value of each metric in the run's summary, and checkpoints as artifacts."""

    defined: frozenset[str] = frozenset()  # metrics whose best value W&B was told to keep

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics; of a loss and of what validation measures, the summary keeps the best value and the last."""
        for name in metrics.keys() - self.defined:
            group, _, metric = name.partition("/")
            if group == "val" or metric.startswith("loss"):
                best = "min" if is_distance(metric) else "max"
                self.experiment.define_metric(name, step_metric=STEP, step_sync=True, summary=f"{best},last")
        self.defined |= metrics.keys()
        super().log_metrics(metrics, step)

    @rank_zero_only
    def log_checkpoint(self, path: Path, step: int, *, is_best: bool) -> None:
        """Upload a checkpoint as the newest version of the artifact model-RUNID; `best` and `latest` name the newest.

        W&B copies the file first, so it may be removed or replaced afterwards.
        """
        import wandb

        artifact = wandb.Artifact(f"model-{self.experiment.id}", type="model", metadata={"step": step})
        artifact.add_file(str(path), name="model.ckpt")
        aliases = ["latest", f"step-{step}", *(["best"] if is_best else [])]
        self.experiment.log_artifact(artifact, aliases=aliases)


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


def wandb_run(loggers: Sequence[Logger]) -> str | None:
    """Return the path of the W&B run that a training logs to, [ENTITY/]PROJECT/RUNID, None if there is none."""
    runs = (logger.experiment for logger in loggers if isinstance(logger, lightning.pytorch.loggers.WandbLogger))
    return next((run.path for run in runs if rank_zero_only.rank == 0), None)  # type: ignore[attr-defined]


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
