"""The training runs that the checkpoints of records are of, and their curves, where their files are still there."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddim.io import check_regular_file
from ddim.results.protocol import LABELS
from ddim.results.records import RECORDS, Record
from ddim.results.schema import evaluation_records

log = logging.getLogger(__name__)
LOSS = "train/loss"
Curve = tuple[tuple[int, float], ...]  # (optimiser step, value)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: of its folder, or of the file of a checkpoint that is in no run's folder.
        checkpoint: as records state it.
        models: the weights that were measured: which, hash, step.
        curves: the loss while training, and the metrics measured meanwhile, by name; none where the files are gone.
    """

    name: str
    checkpoint: str
    models: tuple[str, ...]
    curves: dict[str, Curve]


def find_runs(records: Sequence[Record]) -> list[Run]:
    """Return the runs of the records, in the order of their paths."""
    models: dict[str, set[str]] = {}
    for record in records:
        if isinstance(path := record.get("config", {}).get("checkpoint"), str):
            model = record["model"]
            step = "" if model["step"] is None else f" at step {model['step']:,}"
            weights = LABELS.get(model["weights"], model["weights"])
            models.setdefault(path, set()).add(f"{weights} weights {model['weights_hash'][:8]}{step}")
    return [_run(path, tuple(sorted(models[path]))) for path in sorted(models)]


def _run(checkpoint: str, models: tuple[str, ...]) -> Run:
    path = Path(checkpoint)
    if path.parent.name != "checkpoints":  # a model file, or a checkpoint that was copied
        return Run(path.stem, checkpoint, models, {})
    folder = path.absolute().parents[1]
    try:
        return Run(folder.name, checkpoint, models, read_curves(folder))
    except (OSError, ValueError, csv.Error) as error:  # UserError is a ValueError
        log.warning("no training curve of %s: %s", folder, " ".join(str(error).split()))
        return Run(folder.name, checkpoint, models, {})


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curves of the run in a folder: its loss, and the metrics of evaluations that it made while training.

    Raises:
        UserError, ValueError, OSError: a file is damaged, or cannot be read.
    """
    values: dict[str, dict[int, float]] = {}
    versions = [path for path in (folder / "csv").glob("version_*") if path.name[8:].isdecimal()]
    for version in sorted(versions, key=lambda path: int(path.name[8:])):  # a resumed run begins another
        check_regular_file(path := version / "metrics.csv", "file of metrics")
        if path.is_file():
            with path.open(encoding="utf-8", newline="") as file:
                rows = [(int(row["step"]) + 1, float(row[LOSS])) for row in csv.DictReader(file) if row.get(LOSS)]
            values.setdefault(LOSS, {}).update(rows)
    for record in evaluation_records(folder / RECORDS).read():
        for metric, value in record["metrics"].items():
            if record["model"]["step"] is not None:
                weights = LABELS.get(record["model"]["weights"], record["model"]["weights"])
                values.setdefault(f"{metric}, {weights}", {})[record["model"]["step"]] = value
    return {name: tuple(sorted(points.items())) for name, points in values.items() if points}
