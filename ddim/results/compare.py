"""Trainings side by side: the settings in which they differ, and what came of them; made from their folders alone."""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from os.path import commonpath
from pathlib import Path
from typing import Any

import yaml

from ddim.config import FilePath, check_name, suggest
from ddim.errors import UserError
from ddim.results.protocol import completed, differing_keys, is_distance, measured_by, weights_label
from ddim.results.records import RECORDS
from ddim.results.runs import HELDOUT_LOSS, read_logs, step_of
from ddim.results.runs import LOSS as LOGGED_LOSS
from ddim.results.schema import evaluation_records

log = logging.getLogger(__name__)
LOSS = "train_loss"  # the metric of trainings without an evaluation
VALIDATION_LOSS = "val_loss"  # of held-out images; compared only where it is asked for, or is the only metric
IGNORED = ("name", "output_dir", "checkpoint", "dry_run", "logger")  # keys and groups that decide no weights
# What tells the rows of one training from each other.
ROW_KEYS = ("weights", "sampler", "S", "spacing", "samples.seed", "reference", "samples.first", "samples.precision")
NOT_A_NUMBER: tuple[type, ...] = (bool, type(None), str, list)
Points = dict[int, float]  # step -> value
Log = list[dict[str, str]]  # the rows that a call of a training logged


@dataclass(frozen=True)
class CompareSpec:
    """A comparison; see configs/compare.yaml.

    Attributes:
        runs: pattern of the folders of the trainings, or a list of patterns.
        name: of the comparison.
        output_dir: its folder.
        by: the metric to compare by: one of their evaluations, val_loss or train_loss; null for the metric of samples
            that most of them have, else val_loss where there is one.

    Raises:
        ValueError: a name that is none.
    """

    runs: str | tuple[str, ...]
    name: str
    output_dir: FilePath
    by: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True)
class Run:
    """What the folder of a training holds.

    Attributes:
        folder: its path.
        settings: key, as on the command line -> value.
        metrics: metric -> the values of ROW_KEYS -> value by step. Of a training that samples nothing (eval.n=0) the
            held-out loss, as val_loss.
        losses: training loss by step.
        hours: of training, over all its calls.
        checkpoint: the best by its validation, else the newest; None if there is none.
    """

    folder: Path
    settings: dict[str, Any]
    metrics: dict[str, dict[tuple[Any, ...], Points]]
    losses: Points
    hours: float
    checkpoint: Path | None

    @property
    def step(self) -> int:
        """The last step that was logged or evaluated, 0 if there is none."""
        evaluated = (step for rows in self.metrics.values() for points in rows.values() for step in points)
        return max((*self.losses, *evaluated), default=0)


@dataclass(frozen=True)
class Row:
    """A training in a comparison, or one set of its weights.

    Attributes:
        name: of the training; its folder as far as folders differ.
        run: the training.
        settings: those in which rows differ: key -> value, None where a training has no such key.
        points: the metric by step.
        best: step and value of the best of them; of the training loss the last. None if there are none.
    """

    name: str
    run: Run
    settings: dict[str, Any]
    points: Points
    best: tuple[int, float] | None

    @property
    def label(self) -> str:
        """The name, with weights and sampler where the training has several rows."""
        own = {key: self.settings.get(key) for key in ROW_KEYS}
        words = (f"{key}={v}" if isinstance(v, int) else str(v) for key, v in own.items() if v is not None)
        return ", ".join([self.name, *words])

    @property
    def loss(self) -> float | None:
        """The last training loss, None if none was logged."""
        return self.run.losses[max(self.run.losses)] if self.run.losses else None


@dataclass(frozen=True)
class Comparison:
    """Trainings by a metric, the best first.

    Attributes:
        metric: its name.
        rows: the trainings.
        keys: the settings in which they differ.
    """

    metric: str
    rows: list[Row]
    keys: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """The steps at which a row has a value, rising."""
        return sorted({step for row in self.rows for step in row.points})

    @property
    def numeric_keys(self) -> list[str]:
        """The keys whose values are numbers in all rows."""
        return [k for k in self.keys if not any(isinstance(row.settings[k], NOT_A_NUMBER) for row in self.rows)]

    def title(self) -> str:
        """Return one line that states what is compared."""
        less = "less" if is_distance(self.metric) else "more"
        folders = {row.run.folder for row in self.rows}
        return f"{self.metric} ({less} is better) of {len(folders)} training{'s' * (len(folders) > 1)}"


def read_run(folder: Path) -> Run | None:
    """Return what the folder of a training holds, None if it is not one.

    Raises:
        UserError: its configuration or its records are damaged.
    """
    if (settings := _settings(folder)) is None:
        return None
    metrics: dict[str, dict[tuple[Any, ...], Points]] = {}
    for record in map(completed, evaluation_records(folder / RECORDS).read()):
        model = record["model"] or {"step": None}  # none of images that exist already
        if (step := model["step"]) is None:
            continue
        sampled = (record[key] for key in ("label", "S", "spacing", "seed"))
        row = weights_label(model), *sampled, *measured_by(record)
        for metric, value in record["metrics"].items():
            metrics.setdefault(metric, {}).setdefault(row, {})[step] = value
    logs = list(read_logs(folder))
    if not metrics and (heldout := _heldout_losses(chain(*logs), settings)):
        metrics[VALIDATION_LOSS] = heldout
    losses, seconds = _read_logs(logs, settings)
    kept = (folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    return Run(folder, settings, metrics, losses, seconds / 3600, next((path for path in kept if path.exists()), None))


def compare(runs: Sequence[Run], metric: str | None = None) -> Comparison:
    """Compare trainings.

    Args:
        runs: at least one.
        metric: see `CompareSpec.by`.

    Raises:
        UserError: none of them has this metric.
    """
    counts = Counter(name for run in runs for name in run.metrics)
    allowed = sorted(counts, key=lambda name: (name == VALIDATION_LOSS, -counts[name], name))
    metric = metric or next(iter(allowed), LOSS)
    if metric not in (*allowed, LOSS):
        known = ", ".join((*allowed, LOSS))
        raise UserError(f"by={metric}: no training has it{suggest(metric, (*allowed, LOSS))}; allowed: {known}.")
    names = _names([run.folder for run in runs])
    rows = []
    for name, run in zip(names, runs, strict=True):
        nothing: tuple[Any, ...] = ("",) * len(ROW_KEYS)
        parts = {nothing: run.losses} if metric == LOSS else run.metrics.get(metric, {})
        # Weights and samplers tell rows of one training from each other; else the settings say what they are.
        telling = [i for i in range(len(ROW_KEYS)) if len({row[i] for row in parts}) > 1]
        for row, points in (parts or {nothing: Points()}).items():
            added = {ROW_KEYS[i]: row[i] for i in telling}
            rows.append(Row(name, run, run.settings | added, points, _best(points, metric)))
    keys = differing_keys([row.settings for row in rows])
    rows = [replace(row, settings={key: row.settings.get(key) for key in keys}) for row in rows]
    sign = 1 if is_distance(metric) else -1

    def order(row: Row) -> tuple[float, float, str]:
        best = math.inf if row.best is None else sign * row.best[1]
        return best, row.loss if row.loss is not None and math.isfinite(row.loss) else math.inf, row.name

    return Comparison(metric, sorted(rows, key=order), keys)


def last_loss(folder: Path) -> float | None:
    """Return the last training loss that a run logged, None if it logged none."""
    losses, _ = _read_logs(read_logs(folder), {})
    return losses[max(losses)] if losses else None


def _settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings of a run by key, None if the folder has no configuration of a training.

    They are those of the newest call that wrote results: one that was refused afterwards left its configuration too.
    """
    written = [path.stat().st_mtime for path in (*folder.glob("checkpoints/*.ckpt"), *folder.glob("csv/*/metrics.csv"))]
    configs = [path for depth in ("*", "*/*") for path in folder.glob(f"hydra/{depth}/.hydra/config.yaml")]
    configs.sort(key=lambda path: (path.stat().st_mtime <= max(written, default=0), path.stat().st_mtime))
    for path in reversed(configs):
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); delete its folder.") from error
        if isinstance(values, dict) and "trainer" in values:
            return _flat(values)
    return None


def _flat(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return a configuration by key; values that are taken from other keys (${...}) stay as they are."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if f"{where}{key}" not in IGNORED:
            flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return flat


def _heldout_losses(rows: Iterable[dict[str, str]], settings: Mapping[str, Any]) -> dict[tuple[Any, ...], Points]:
    """Return the held-out loss by step, of each set of weights; only the names of further weights are logged."""
    measured = settings.get("eval.weights") or ("online" if settings.get("ema", "") is None else "ema")
    first = measured if isinstance(measured, str) else measured[0]
    losses: dict[tuple[Any, ...], Points] = {}
    for row in rows:
        for column, value in row.items():
            if value and (found := re.fullmatch(rf"{HELDOUT_LOSS}(?:_(?!quarter_)(.+))?", str(column))):
                try:
                    step, loss = step_of(row), float(value)
                except (KeyError, TypeError, ValueError) as error:  # a row that was cut short
                    log.debug("%s: %s", column, error)
                    continue
                losses.setdefault((found[1] or first, *[""] * (len(ROW_KEYS) - 1)), {})[step] = loss
    return losses


def _read_logs(logs: Iterable[Log], settings: Mapping[str, Any]) -> tuple[Points, float]:
    """Return the training loss by step and the seconds of training, of all calls together."""
    losses, seconds = Points(), 0.0
    most, images = (settings.get(f"trainer.{key}") for key in ("log_every", "batch_size"))
    for rows in logs:
        before = None
        for row in rows:
            try:
                step, loss = step_of(row), float(row[LOGGED_LOSS])
                per_second = float(row["train/images_per_second"])
            except (KeyError, TypeError, ValueError) as error:  # a row of other metrics, or cut short
                log.debug("%s: %s", LOGGED_LOSS, error)
                continue
            losses[step] = loss
            # A call that resumes logs after at most log_every steps.
            steps = min(step, most or step) if before is None else step - before
            seconds += steps * (images or 0) / per_second if per_second > 0 else 0
            before = step
    return losses, seconds


def _best(points: Points, metric: str) -> tuple[int, float] | None:
    if metric == LOSS and points:  # the last one, not an earlier one of a training that has diverged
        last = max(points)
        return (last, points[last]) if math.isfinite(points[last]) else None
    numbers = {step: value for step, value in points.items() if math.isfinite(value)}
    if not numbers:
        return None
    return (min if is_distance(metric) else max)(numbers.items(), key=lambda item: item[1])


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the name of each folder: its own, or where several share it the path below their common folder."""
    if len({folder.name for folder in folders}) == len(folders):
        return [folder.name for folder in folders]
    common = commonpath([folder.resolve() for folder in folders])
    return [str(folder.resolve().relative_to(common)) for folder in folders]
