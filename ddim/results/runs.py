"""The training runs that the checkpoints of records are of, and their curves, where their files are still there."""

import csv
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddim.io import check_regular_file, explain_read_errors
from ddim.results.protocol import completed, measured_by, weights_label
from ddim.results.records import RECORDS, Record
from ddim.results.schema import evaluation_records

log = logging.getLogger(__name__)
LOSS = "train/loss"
HELDOUT_LOSS = "val/loss"
LOSSES = (LOSS, HELDOUT_LOSS)
Curve = tuple[tuple[int, float], ...]  # (optimiser step, value)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: of its folder, or of the file of a checkpoint that is in no run's folder.
        checkpoint: as records state it.
        models: the weights that were measured: which, hash, step.
        curves: the losses while training, and the metrics measured meanwhile, by name; none where the files are gone.
        stops: the last logged steps of its calls, but of the newest: there it was stopped, and went on later.
    """

    name: str
    checkpoint: str
    models: tuple[str, ...]
    curves: dict[str, Curve]
    stops: tuple[int, ...] = ()


def find_runs(records: Sequence[Record]) -> list[Run]:
    """Return the runs of the records, in the order of their paths."""
    models: dict[str, set[str]] = {}
    for record in records:
        if isinstance(path := record.get("config", {}).get("checkpoint"), str):
            model = record["model"]
            step = "" if model["step"] is None else f" at step {model['step']:,}"
            models.setdefault(path, set()).add(f"{weights_label(model)} weights {model['weights_hash'][:8]}{step}")
    return [_run(path, tuple(sorted(models[path]))) for path in sorted(models)]


def _run(checkpoint: str, models: tuple[str, ...]) -> Run:
    path = Path(checkpoint)
    if path.parent.name != "checkpoints":  # a model file, or a checkpoint that was copied
        return Run(path.stem, checkpoint, models, {})
    folder = path.absolute().parents[1]
    try:
        return Run(folder.name, checkpoint, models, *read_training(folder))
    except (OSError, ValueError, csv.Error) as error:  # UserError is a ValueError
        log.warning("no training curve of %s: %s", folder, " ".join(str(error).split()))
        return Run(folder.name, checkpoint, models, {})


def read_training(folder: Path) -> tuple[dict[str, Curve], tuple[int, ...]]:
    """Return curves and stops of the run in a folder, see `Run`.

    The curves are its losses, and the metrics of evaluations that it made while training, by what these differ in.

    Raises:
        UserError, ValueError, OSError: a file is damaged, or cannot be read.
    """
    values: dict[str, dict[int, float]] = {}
    ends = []  # the last logged step of each call
    for rows in read_logs(folder):
        ends += [max(steps)] if (steps := [step_of(row) for row in rows if row.get(LOSS)]) else []
        for name in LOSSES:
            logged = [row for row in rows if row.get(name)]
            if len(logged) > 1 and logged[-1][name] == logged[-2][name]:
                del logged[-1]  # Lightning logs the last values again where a run stops
            values.setdefault(name, {}).update((step_of(row), float(row[name])) for row in logged)
    records = map(completed, evaluation_records(folder / RECORDS).read())
    of_steps = [r for r in records if r["model"] and r["model"]["step"] is not None]
    settings = [_settings(record) for record in of_steps]
    differing = [i for i, values in enumerate(zip(*settings, strict=True)) if len(set(values)) > 1]
    for record, texts in zip(of_steps, settings, strict=True):
        step, names = record["model"]["step"], (weights_label(record["model"]), *(texts[i] for i in differing))
        for metric, value in record["metrics"].items():
            if values.get(HELDOUT_LOSS, {}).get(step) != value:  # the record's val_loss is what was logged
                values.setdefault(", ".join((metric, *names)), {})[step] = value
    curves = {name: tuple(sorted(points.items())) for name, points in values.items() if points}
    return curves, tuple(ends[:-1])


def _settings(record: Record) -> tuple[str, ...]:
    """Return what the curves of one metric and weights may differ in, in words."""
    reference, first, precision = measured_by(record)
    sampler = record["label"], f"S={record['S']}", f"tau {record['spacing']}", f"seed {record['seed']}"
    return *sampler, f"against {reference}", f"from image {first:,}", precision


def read_logs(folder: Path) -> Iterator[list[dict[str, str]]]:
    """Yield the rows of metrics.csv of each call of a run, oldest first: a run that is resumed begins another file.

    Raises:
        UserError: a file is no regular one, or cannot be read.
    """
    versions = [path for path in (folder / "csv").glob("version_*") if path.name[8:].isdecimal()]
    for version in sorted(versions, key=lambda path: int(path.name[8:])):
        check_regular_file(path := version / "metrics.csv", "file of metrics")
        if path.is_file():
            with explain_read_errors(path), path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            yield rows


def step_of(row: dict[str, str]) -> int:
    """Return the number of steps when a row was logged; Lightning counts from 0."""
    return int(row["step"]) + 1
