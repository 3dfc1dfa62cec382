"""Where a training run writes its numbers: CSV always, W&B and TensorBoard when asked."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ddim.results.wandb import LoggerSpec, explain_wandb_errors


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
        id_file.write_text(os.urandom(4).hex(), encoding="utf-8")
    return WandbLogger(
        name=name,
        save_dir=folder,
        project=spec.project,
        entity=spec.entity,
        group=spec.group,
        tags=list(spec.tags),
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
