"""Logging evaluations to Weights & Biases: one run for a sweep, with a chart of each table and all numbers."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from ddim.errors import UserError
from ddim.io import atomic_write, check_regular_file
from ddim.results.protocol import completed, is_distance
from ddim.results.records import RECORDS, Record
from ddim.results.report import build_tables
from ddim.results.row_labels import distinct_labels
from ddim.results.schema import evaluation_records
from ddim.results.table import Table
from ddim.results.wandb_artifacts import artifact_of

_NOT_IN_NAMES = "/\\#?%:"  # characters that W&B takes neither in a project nor in an entity
RUNS = "wandb/runs"  # in a sweep's folder: ids of W&B runs, in files: report, and the keys of records with own runs
LOG_EVERY = 300.0  # seconds between two updates of the run of a sweep


@dataclass(frozen=True)
class LoggerSpec:
    """Loggers of a run in addition to CSV.

    Attributes:
        wandb, tensorboard: also log there.
        project, entity, group, tags, notes: of the W&B run.
        offline: keep the W&B run on this disk, without an account; `wandb sync` uploads it later.
        log_model: checkpoints of a training that become W&B artifacts: all, those that were the best, or none.
        per_evaluation: a W&B run for each evaluation, besides the one of the sweep.

    Raises:
        ValueError: W&B would refuse the project, the entity or a tag, or checkpoints are to go to W&B without it.
    """

    wandb: bool = False
    tensorboard: bool = False
    project: str = "ddim"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    offline: bool = False
    log_model: Literal["all", "best", False] = False
    per_evaluation: bool = False

    def __post_init__(self) -> None:
        if not self.wandb:
            if self.log_model or self.per_evaluation:
                key = "log_model" if self.log_model else "per_evaluation"
                raise ValueError(f"{key} is for W&B; choose logger=wandb or logger=wandb_offline.")
            return
        for key, name in (("project", self.project), ("entity", self.entity)):
            if name is not None and not re.fullmatch(rf"[^{re.escape(_NOT_IN_NAMES)}]{{1,128}}", name):
                raise ValueError(
                    f"{key}={name!r} must have 1 to 128 characters, none of them {' '.join(_NOT_IN_NAMES)}; choose "
                    "another name."
                )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise ValueError(f"tags: {tag!r} has {len(tag)} characters; W&B takes tags of 1 to 64.")

    def check_evaluation(self) -> None:
        """Check that these are options of an evaluation.

        Raises:
            ValueError: one is for training.
        """
        if self.tensorboard:
            raise ValueError("logger=tensorboard is for training; choose logger=wandb or wandb_offline.")
        if self.log_model:
            raise ValueError("logger.log_model is for training; leave it false.")


@contextmanager
def explain_wandb_errors() -> Iterator[None]:
    """Turn an error of W&B in the block into one sentence.

    Raises:
        UserError: W&B failed to start or to continue.
    """
    import wandb

    try:
        yield
    except wandb.errors.UsageError as error:
        raise UserError(
            f"W&B refused to start ({' '.join(str(error).split())}); run `wandb login`, or choose logger=wandb_offline."
        ) from error
    except wandb.errors.Error as error:
        raise UserError(
            f"W&B failed ({' '.join(str(error).split())[:300]}); run the same command again, or with "
            "logger=wandb_offline."
        ) from error


class SweepLogger:
    """Logs the evaluations of one sweep to W&B: one run, which a repeated command continues.

    Args:
        spec: project, group and so on; without `spec.wandb` nothing is logged.
        name: of the sweep, and of the group if the spec has none.
        folder: of the sweep; W&B's own files go to wandb/ in it.
    """

    def __init__(self, spec: LoggerSpec, name: str, folder: Path) -> None:
        self.spec, self.name, self.folder = spec, name, folder
        self.updated = time.monotonic()  # when the run of the sweep was

    def check(self) -> None:
        """Check that W&B can be used, before there is something to log.

        Raises:
            UserError: W&B is wanted online, and the user is not logged in.
        """
        if not self.spec.wandb or self.spec.offline:
            return
        import wandb

        with explain_wandb_errors():
            if not wandb.login():
                raise wandb.errors.UsageError("not logged in")

    def log_evaluation(self, record: Record, title: str) -> None:
        """Log the evaluations so far, unless that was a moment ago; with `per_evaluation`, this one as a run as well.

        That run has its numbers, its grid, and its protocol as configuration. An evaluation that has a run already gets
        no second one, so a sweep that was killed can continue.
        """
        if self.spec.wandb and time.monotonic() - self.updated > LOG_EVERY:
            self.log_report([])
        if not self.spec.per_evaluation or self._run_id(record["key"]):
            return
        import wandb

        protocol = {key: value for key, value in record.items() if key not in ("metrics", "grid", "config")}
        with self._run(title, "evaluate", [record], {"protocol": protocol}, record["key"]) as run:
            stated = ("seconds_sampling", "seconds_metrics", "S")
            values: dict[str, Any] = record["metrics"] | {key: record[key] for key in stated if key in record}
            if "grid" in record and (grid := self.folder / record["grid"]).is_file():
                values["grid"] = wandb.Image(str(grid), caption=title)
            run.log(values)

    def log_report(self, paths: Sequence[Path]) -> None:
        """Log the run of the sweep: a chart of each table, a table of all evaluations, the plots and the page.

        Its summary has the best value of each metric, and at which sampler and S.

        Args:
            paths: the files that `write_report` wrote.
        """
        if not self.spec.wandb:
            return
        import wandb

        records = evaluation_records(self.folder / RECORDS).read()
        tables, config = build_tables(records), {"entries": len(records)}
        # Jobs in several processes log to the same run, one after the other.
        with FileLock(self.folder / ".wandb.lock"), self._run(self.name, "sweep", records, config, "report") as run:
            plots = {path.stem: wandb.Image(str(path), caption=path.stem) for path in paths if path.suffix == ".png"}
            page = {path.stem: wandb.Html(str(path)) for path in paths if path.suffix == ".html"}
            values = {"table": _table_of(tables), "evaluations": self._evaluations(records)}
            run.log({**values, **_charts(tables), **plots, **page})
            run.summary.update(_best_values(tables))
        self.updated = time.monotonic()

    def _evaluations(self, records: Sequence[Record]) -> Any:
        """Return a W&B table with a row for each record: what was measured, its numbers, its grid."""
        import wandb

        metrics = sorted({metric for record in records for metric in record["metrics"]})
        shown = {"sampler": "label", "S": "S", "NFE": "nfe"} | {key: key for key in ("spacing", "n", "first", "seed")}
        columns: list[str | int] = [*shown, "checkpoint", "weights", "step"]
        table = wandb.Table([*columns, *metrics, "seconds_sampling", "seconds_metrics", "grid"])
        for record in distinct_labels([completed(record) for record in records]):
            model = record["model"] or {"weights": None, "step": None}  # of images that exist already
            grid = self.folder / record["grid"] if "grid" in record else None
            table.add_data(
                *(record.get(key) for key in shown.values()),
                *(record.get("config", {}).get("checkpoint"), model["weights"], model["step"]),
                *(record["metrics"].get(metric) for metric in metrics),
                *(record.get(key) for key in ("seconds_sampling", "seconds_metrics")),
                wandb.Image(str(grid)) if grid is not None and grid.is_file() else None,
            )
        return table

    @contextmanager
    def _run(self, title: str, kind: str, records: Sequence[Record], config: dict[str, Any], key: str) -> Iterator[Any]:
        """Give the run whose id is kept as `key`, or a new one; its id is kept when the block ends without an error."""
        import wandb

        settings = [record.get("config", {}) for record in records]
        shared = {key: value for key, value in settings[0].items() if all(s.get(key) == value for s in settings)}
        trainings = sorted({record["training_run"] for record in records if record.get("training_run")})
        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            explain_wandb_errors(),
            wandb.init(
                project=self.spec.project,
                entity=self.spec.entity,
                group=self.spec.group or self.name,
                tags=list(self.spec.tags),
                notes=self.spec.notes,
                name=title,
                job_type=kind,
                id=self._run_id(key),
                resume="allow",
                mode="offline" if self.spec.offline else "online",
                dir=self.folder,
                config={**shared, **config, **({"training_run": ", ".join(trainings)} if trainings else {})},
                reinit="finish_previous",
            ) as run,
        ):
            for checkpoint in {values.get("checkpoint", "") for values in settings}:
                artifact = artifact_of(checkpoint)
                if artifact and not self.spec.offline:  # W&B takes this in online runs only
                    run.use_artifact(artifact)
            yield run
            with atomic_write(self.folder / RUNS / key) as partial:
                partial.write_text(run.id, encoding="utf-8")

    def _run_id(self, key: str) -> str | None:
        """Return the id of the run of a record, or of the report, None if there is none."""
        path = self.folder / RUNS / key
        check_regular_file(path, "id of a W&B run")
        return path.read_text(encoding="utf-8") if path.exists() else None


def _entries(table: Table) -> Iterator[tuple[str, int, float]]:
    """Yield the row, the column and the value of each entry of a table."""
    for row in table.rows:
        for column in table.columns:
            if (value := table.value(row, column)) is not None:
                yield row, column, value


def _table_of(tables: Sequence[Table]) -> Any:
    """Return a W&B table of the entries of all tables, next to the paper's."""
    import wandb

    column = "NFE" if any(table.by_nfe for table in tables) else "S"
    columns: list[str | int] = ["table", "metric", "sampler", column, "value", "paper"]
    rows = [
        [table.title(), table.metric, row, nfe, value, table.paper_value(row, nfe)]
        for table in tables
        for row, nfe, value in _entries(table)
    ]
    return wandb.Table(columns, rows)


def _charts(tables: Sequence[Table]) -> dict[str, Any]:
    """Return an interactive chart of each table: the metric against S (or NFE), a line for each sampler."""
    import wandb

    charts = {}
    for number, table in enumerate(tables):
        data = wandb.Table(["sampler", table.column, table.metric], [list(entry) for entry in _entries(table)])
        key = f"chart_{table.metric}{f'_{number}' if number else ''}"
        charts[key] = wandb.plot.line(data, table.column, table.metric, stroke="sampler", title=table.title())
    return charts


def _best_values(tables: Sequence[Table]) -> dict[str, Any]:
    """Return the best value of each metric, and where it is."""
    values: dict[str, Any] = {}
    for metric in sorted({table.metric for table in tables}):
        of_metric = [table for table in tables if table.metric == metric]
        entries = [
            (value, f"{row} {table.column}={column}{f'; {table.title()}' if len(of_metric) > 1 else ''}")
            for table in of_metric
            for row, column, value in _entries(table)
        ]
        values[metric], values[f"{metric}_at"] = (min if is_distance(metric) else max)(entries)
    return values
