"""What evaluate.py and reconstruct.py share: a cell a job, a plan before the first and a report after the last."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _cli import explain, pick_device


class Sweep:
    """The jobs of one command.

    Args:
        module, spec_name: where the spec of a cell is; imported when it is needed, so that help stays quick.
    """

    def __init__(self, module: str, spec_name: str) -> None:
        self.module, self.spec_name = module, spec_name
        self.dashboards: dict[Path, Any] = {}  # of the folders that the cells of this command belong to

    def build(self, config: dict[str, Any]) -> Any:
        """Return the spec of a cell."""
        import importlib

        from ddim.config import build

        pick_device(config.get("compute"), "device")
        return build(getattr(importlib.import_module(self.module), self.spec_name), config, "")

    def dashboard(self, spec: Any) -> Any:
        """Return the dashboard of a cell's folder."""
        from ddim.results.wandb import SweepLogger

        folder = Path(spec.output_dir)
        return self.dashboards.setdefault(folder, SweepLogger(spec.logger, spec.name, folder))

    def plan(self, configs: list[dict[str, Any]], here: bool) -> None:
        """Say what is going to be computed, and note it; `here` or in jobs that a launcher starts elsewhere."""
        from ddim.distributed import join_process_group
        from ddim.errors import UserError
        from ddim.evaluation.sweep import Manifest, forecast, outline

        specs, lines = [], []
        for config in configs:
            try:
                specs.append(self.build(config))
            except UserError as error:
                lines.append(f"not possible: {error}")
        processes = join_process_group()
        outlook = forecast(specs, processes) if here else outline(specs)
        if not outlook:  # each cell is going to say why
            return
        if processes.is_main:
            for folder in {self.dashboard(spec).folder for spec in specs}:
                Manifest(folder).plan(command(), [spec for spec in specs if Path(spec.output_dir) == folder])
            print("\n".join(f"plan: {line}" for line in outlook + lines), flush=True)

    def run(self, config: dict[str, Any]) -> dict[str, float]:
        """Compute one cell and print its numbers."""
        from ddim.distributed import join_process_group
        from ddim.evaluation.job import once
        from ddim.evaluation.sweep import Manifest

        processes = join_process_group()
        spec = self.build(config)
        dashboard = self.dashboard(spec)
        manifest = Manifest(dashboard.folder)
        metrics: dict[str, float] = {}

        def first(call: Callable[..., Any], *arguments: Any) -> None:
            with processes.barrier():  # so that none goes on alone if it fails
                if processes.is_main:
                    call(*arguments)

        try:
            first(dashboard.check)
            first(manifest.note, spec, "running")
            for single in spec.single:
                record, new = once(single.prepare, processes)
                metrics = record["metrics"]
                first(say, single.title, record, new)
                first(dashboard.log_evaluation, record, single.title)
            first(manifest.note, spec, "done")
        except Exception as error:
            if processes.is_main:
                manifest.note(spec, "failed", reason(error))
                print(f"{spec.title}: failed", flush=True)
            raise
        return metrics

    def report(self) -> None:
        """Write tables, plots and a page of all records in each folder, and print where they are."""
        from ddim.distributed import join_process_group
        from ddim.evaluation.sweep import Manifest
        from ddim.results.records import RECORDS, RecordFile
        from ddim.results.report import write_report

        if not join_process_group().is_main:
            return
        for folder, dashboard in sorted(self.dashboards.items()):
            records, manifest = RecordFile(folder / RECORDS).read(), Manifest(folder)
            failures = manifest.failures()
            if records:
                how = manifest.read()["command"] or command()
                paths = write_report(records, folder, command=how, failures=failures)
                print(f"\n{paths[0].read_text()}")
                for path in paths:
                    print(path)
                dashboard.log_report(paths)
            for title, why in failures:
                print(f"failed: {title}: {why}")


def say(title: str, record: dict[str, Any], new: bool) -> None:
    """Print the numbers of a cell."""
    values = ", ".join(f"{key} {value:.4g}" for key, value in record["metrics"].items())
    seconds = f"{record['seconds_sampling']:.1f} s sampling, {record['seconds_metrics']:.1f} s metrics"
    print(f"{title}: {values} ({seconds if new else 'already in the records'})", flush=True)


def reason(error: Exception) -> str:
    """Return an exception in one line."""
    return explain(error) or f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def command() -> str:
    """Return the command that is running, to be typed again."""
    return shlex.join(["python", *sys.argv])
