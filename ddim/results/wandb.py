"""A sweep on Weights & Biases: one group, a run for each cell, and a run with the table and the plots."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddim.errors import UserError
from ddim.io import atomic_write
from ddim.results.records import RECORDS, Record, RecordFile
from ddim.results.report import build_tables

RUNS = "wandb/runs"  # in a sweep's folder: a file for each run that W&B has, named by the key of its cell


@dataclass(frozen=True)
class LoggerSpec:
    """Where a run is logged besides CSV.

    Attributes:
        wandb, tensorboard: also log there.
        project, entity, group, tags: of the W&B run.
        offline: keep the W&B run on this disk; needs no account. `wandb sync` uploads it later.
    """

    wandb: bool = False
    tensorboard: bool = False
    project: str = "ddim"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    offline: bool = False


@contextmanager
def explain_wandb_errors() -> Iterator[None]:
    """Say in one sentence why W&B does not start, or not go on.

    Raises:
        UserError: it does not.
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


class Dashboard:
    """The runs of one sweep's folder.

    Args:
        spec: project, group and so on; nothing is done unless `spec.wandb`.
        name: of the sweep, and of the group if the spec has none.
        folder: of the sweep; W&B's own files go to wandb/ in it.
    """

    def __init__(self, spec: LoggerSpec, name: str, folder: Path) -> None:
        self.spec, self.name, self.folder = spec, name, folder

    def check(self) -> None:
        """Find out whether W&B can be used, before there is something to log.

        Raises:
            UserError: it is wanted online, and nobody is logged in.
        """
        if not self.spec.wandb or self.spec.offline:
            return
        import wandb

        with explain_wandb_errors():
            if not wandb.login():
                raise wandb.errors.UsageError("nobody is logged in")

    def log_cell(self, record: Record, title: str) -> None:
        """Make the run of a cell: its numbers, its grid, and its whole protocol as configuration.

        A cell that has a run already gets no second one, so a sweep that goes on completes what a killed one left out.
        """
        if not self.spec.wandb or self._known(record["key"]):
            return
        import wandb

        protocol = {key: value for key, value in record.items() if key not in ("metrics", "grid", "config")}
        with self._run(title, "evaluate", {**record["config"], "protocol": protocol}) as run:
            seconds = {key: record[key] for key in ("seconds_sampling", "seconds_metrics")}
            values: dict[str, Any] = {**record["metrics"], **seconds, "S": record["S"]}
            if "grid" in record:
                values["grid"] = wandb.Image(str(self.folder / record["grid"]))
            run.log(values)
            self._note(record["key"], run.id)

    def log_report(self, paths: Sequence[Path]) -> None:
        """Make the run of the whole sweep: a table of all cells, plots, and the page; the same run for each sweep."""
        if not self.spec.wandb:
            return
        import wandb

        columns: list[str | int] = ["table", "metric", "sampler", "S", "value", "paper"]
        rows = []
        for table in build_tables(RecordFile(self.folder / RECORDS).read()):
            for row, S in ((row, S) for row in table.rows for S in table.columns if table.values(row, S)):
                rows.append([table.title(), table.metric, row, S, table.value(row, S), table.paper_value(row, S)])
        with self._run(f"{self.name} table", "report", {"cells": len(rows)}, self._known("report")) as run:
            pictures = {path.stem: wandb.Image(str(path)) for path in paths if path.suffix == ".png"}
            page = {path.stem: wandb.Html(str(path)) for path in paths if path.suffix == ".html"}
            run.log({"table": wandb.Table(columns, rows), **pictures, **page})
            self._note("report", run.id)

    @contextmanager
    def _run(self, title: str, kind: str, config: dict[str, Any], known: str | None = None) -> Iterator[Any]:
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
                id=known,
                resume="allow",
                mode="offline" if self.spec.offline else "online",
                dir=self.folder,
                config=config,
                reinit="finish_previous",
            ) as run,
        ):
            yield run

    def _known(self, what: str) -> str | None:
        """Return the id of the run of a cell, or of the report, if there is one."""
        path = self.folder / RUNS / what
        return path.read_text() if path.exists() else None

    def _note(self, what: str, run_id: str) -> None:
        with atomic_write(self.folder / RUNS / what) as partial:
            partial.write_text(run_id)
