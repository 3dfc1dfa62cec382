"""Logging a sweep to Weights & Biases: a group with a run for each evaluation and a run for the report."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim.errors import UserError
from ddim.io import atomic_write, check_regular_file
from ddim.results.records import RECORDS, Record
from ddim.results.report import build_tables
from ddim.results.schema import evaluation_records

_NOT_IN_NAMES = "/\\#?%:"  # characters that W&B takes neither in a project nor in an entity
RUNS = "wandb/runs"  # in a sweep's folder: the ids of its W&B runs, each in a file named by the key of its record


@dataclass(frozen=True)
class LoggerSpec:
    """Loggers of a run in addition to CSV.

    Attributes:
        wandb, tensorboard: also log there.
        project, entity, group, tags: of the W&B run.
        offline: keep the W&B run on this disk, without an account; `wandb sync` uploads it later.

    Raises:
        ValueError: W&B would refuse the project, the entity or a tag.
    """

    wandb: bool = False
    tensorboard: bool = False
    project: str = "ddim"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    offline: bool = False

    def __post_init__(self) -> None:
        if not self.wandb:
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
    """Logs the evaluations of one sweep to W&B.

    Args:
        spec: project, group and so on; without `spec.wandb` nothing is logged.
        name: of the sweep, and of the group if the spec has none.
        folder: of the sweep; W&B's own files go to wandb/ in it.
    """

    def __init__(self, spec: LoggerSpec, name: str, folder: Path) -> None:
        self.spec, self.name, self.folder = spec, name, folder

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
        """Log the numbers and the grid of an evaluation as a run, with its protocol as the run's configuration.

        An evaluation that has a run already gets no second one, so a sweep that was killed can continue.
        """
        if not self.spec.wandb or self._run_id(record["key"]):
            return
        import wandb

        protocol = {key: value for key, value in record.items() if key not in ("metrics", "grid", "config")}
        with self._run(title, "evaluate", {**record["config"], "protocol": protocol}) as run:
            seconds = {key: record[key] for key in ("seconds_sampling", "seconds_metrics")}
            values: dict[str, Any] = {**record["metrics"], **seconds, "S": record["S"]}
            if "grid" in record:
                values["grid"] = wandb.Image(str(self.folder / record["grid"]))
            run.log(values)
            self._save_run_id(record["key"], run.id)

    def log_report(self, paths: Sequence[Path]) -> None:
        """Log a table of all evaluations, the plots and the page. A sweep has one such run, which is continued.

        Args:
            paths: the files that `write_report` wrote.
        """
        if not self.spec.wandb:
            return
        import wandb

        tables = build_tables(evaluation_records(self.folder / RECORDS).read())
        column = "NFE" if any(table.by_nfe for table in tables) else "S"
        columns: list[str | int] = ["table", "metric", "sampler", column, "value", "paper"]
        rows = [
            [table.title(), table.metric, row, nfe, value, table.paper_value(row, nfe)]
            for table in tables
            for row in table.rows
            for nfe in table.columns
            if (value := table.value(row, nfe)) is not None
        ]
        with self._run(f"{self.name} table", "report", {"entries": len(rows)}, self._run_id("report")) as run:
            plots = {path.stem: wandb.Image(str(path)) for path in paths if path.suffix == ".png"}
            page = {path.stem: wandb.Html(str(path)) for path in paths if path.suffix == ".html"}
            run.log({"table": wandb.Table(columns, rows), **plots, **page})
            self._save_run_id("report", run.id)

    @contextmanager
    def _run(self, title: str, kind: str, config: dict[str, Any], run_id: str | None = None) -> Iterator[Any]:
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        with (
            explain_wandb_errors(),
            wandb.init(
                project=self.spec.project,
                entity=self.spec.entity,
                group=self.spec.group or self.name,
                tags=list(self.spec.tags),
                name=title,
                job_type=kind,
                id=run_id,
                resume="allow",
                mode="offline" if self.spec.offline else "online",
                dir=self.folder,
                config=config,
                reinit="finish_previous",
            ) as run,
        ):
            yield run

    def _run_id(self, key: str) -> str | None:
        """Return the id of the run of a record, or of the report, None if there is none."""
        path = self.folder / RUNS / key
        check_regular_file(path, "id of a W&B run")
        return path.read_text(encoding="utf-8") if path.exists() else None

    def _save_run_id(self, key: str, run_id: str) -> None:
        with atomic_write(self.folder / RUNS / key) as partial:
            partial.write_text(run_id, encoding="utf-8")
