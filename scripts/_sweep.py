"""What the scripts that measure share: each job is one evaluation, with a plan before and a report after all."""

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import explain, pick_device
from _jobs import SWEEP_FLAGS
from _last_words import command_line, of_model, same_command
from _start import COMMAND

if TYPE_CHECKING:
    from ddim.distributed import Processes
    from ddim.evaluation.job import Job
    from ddim.evaluation.session import Session
    from ddim.results.wandb import SweepLogger


MOST_PENDING = 8  # evaluations that wait for their metrics, each with moments in memory
_sessions: "list[Session]" = []  # of this process: none or one


class Sweep:
    """The evaluations of one command.

    Args:
        module, spec_name: where the specification is and `evaluate`; imported when needed, so that help stays quick.
    """

    def __init__(self, module: str, spec_name: str) -> None:
        self.module, self.spec_name = module, spec_name
        # Of this command, by folder: (title, reason) of each evaluation that failed, and whether it had started.
        self.failures: dict[Path, dict[tuple[str, str], bool]] = {}
        self.loggers: dict[Path, SweepLogger] = {}  # by the folders that the evaluations of this command write to
        self.started: set[Path] = set()  # those folders that one of them got to
        self.cleaned: set[Path] = set()  # those that leftovers of killed runs were removed from
        self.specs: dict[Path, Any] = {}  # the last specification of each folder
        self.planned = False  # whether there was a plan
        self.here = False  # whether it was for jobs of this process, whose results nobody waits for
        # By key: evaluations that are sampled, and whose metrics a thread computes while others are.
        self.pending: dict[str, Generator[Any, None, dict[str, float]]] = {}
        self.pool: Executor | None = None  # that thread

    def build(self, config: dict[str, Any]) -> Any:
        """Return the specification of an evaluation."""
        from ddim.config import build

        pick_device(config.get("compute"), "device", without_float64=True)
        return build(getattr(importlib.import_module(self.module), self.spec_name), config, "")

    def logger(self, spec: Any) -> "SweepLogger":
        """Return the W&B logger of the folder of an evaluation."""
        from ddim.results.wandb import SweepLogger

        folder = Path(spec.output_dir)
        self.specs[folder] = spec
        return self.loggers.setdefault(folder, SweepLogger(spec.logger, spec.name, folder))

    def plan(self, configs: list[dict[str, Any]], here: bool) -> bool:
        """Print and note what is going to be computed, `here` or in jobs that a launcher starts elsewhere.

        Returns:
            Whether nothing is: no image is left to sample.
        """
        from ddim.errors import UserError
        from ddim.evaluation.dry_run import dry_run
        from ddim.evaluation.sweep import Manifest, forecast, outline, survey

        specs, lines = [], []
        for config in configs:
            try:
                specs.append(self.build(config))
            except UserError as error:
                lines.append(f"not possible: {error}")
        current_session().planned = sum(spec.network_evaluations or 0 for spec in specs)
        nothing_left = dry = any(spec.dry_run for spec in specs)
        if dry:
            estimate = dry_run(specs, current_session())
        elif here:
            jobs, refused = survey(specs, current_session())
            if current_session().plan(sum(job.images * job.steps for job in jobs)):  # more than the specifications tell
                jobs, refused = survey(specs, current_session())
            estimate = forecast(jobs, refused, current_session().processes.world_size)
            nothing_left = not (lines or refused or any(job.missing for job in jobs))
        else:
            estimate = outline(specs)
        if not estimate:  # each job is going to report why
            return False
        self.planned, self.here = True, here
        if current_session().processes.is_main:
            for folder in set() if dry else {self.logger(spec).folder for spec in specs}:
                self.started |= set() if here else {folder}
                Manifest(folder).plan(command(), [spec for spec in specs if Path(spec.output_dir) == folder])
            print("\n".join(f"plan: {line}" for line in estimate + lines), flush=True)
        return nothing_left

    def run(self, config: dict[str, Any]) -> dict[str, float]:
        """Compute one evaluation and print its numbers; those of a sweep can follow while others are sampled."""
        spec = self.build(config)
        if getattr(spec, "dry_run", False):  # images that exist already have none
            if not self.planned:
                spec.prepare(current_session())  # raises where nothing can be computed
                self.plan([config], here=True)
                self.planned = False
            return {}
        steps = self.evaluate(spec)
        try:
            if (key := next(steps)) in self.pending:  # the same evaluation by another name
                self.wait()
            for _ in spec.repetitions:
                next(steps)
        except StopIteration as end:
            return end.value
        self.pending[key] = steps
        self.wait(MOST_PENDING)
        return {}

    def wait(self, most: int = 0) -> None:
        """Wait for the metrics of all pending evaluations but the last `most`; one that fails does not stop others."""
        if len(self.pending) > most:
            steps = self.pending.pop(next(iter(self.pending)))
            try:
                for _ in steps:
                    continue
            finally:
                self.wait(most)

    def evaluate(self, spec: Any) -> Generator[Any, None, dict[str, float]]:
        """Yield the key of an evaluation and then compute it; yield again if only its metrics are missing."""
        from ddim.diffusion.spec import NFENotPossible
        from ddim.evaluation.sweep import NOT_STARTED, Manifest, remove_leftovers

        session = current_session()
        processes = session.processes
        folder = Path(spec.output_dir)
        manifest, started = Manifest(folder), False
        module = importlib.import_module(self.module)
        repetitions, metrics = spec.repetitions, {}

        def on_main(call: Callable[..., Any], *arguments: Any) -> None:
            with processes.barrier():  # so that no process continues alone if it fails
                if processes.is_main:
                    call(*arguments)

        def tell(repetition: Any, record: dict[str, Any], new: bool = True) -> None:
            print_metrics(repetition.title, record, new)
            logger.log_evaluation(record, repetition.title)
            if repetition is repetitions[-1]:
                manifest.note(spec, "done")

        on_main(manifest.read)  # before work starts, and before there is something to report
        if folder not in self.cleaned:  # known to all processes, unlike the loggers
            self.cleaned.add(folder)
            on_main(remove_leftovers, folder, session.records(spec.output_dir))
        logger = self.logger(spec)
        try:
            on_main(logger.check)
            with processes.barrier():
                job = repetitions[0].prepare(session)
            yield job.key
            if processes.run_on_main(job.find_record) is None:
                on_main(manifest.note, spec, "running")
            started = True
            self.started.add(folder)
            pool = self.metrics_thread(module, job, processes)
            for repetition in repetitions:
                if pool is None:
                    record, new = module.evaluate(repetition, session)
                else:
                    record, new = yield from module.evaluate_in_steps(
                        repetition, session, pool=pool, report=partial(tell, repetition)
                    )
                metrics = record["metrics"]
                if pool is None or not new:
                    on_main(tell, repetition, record, new)
        except Exception as error:
            why = reason(error)
            if isinstance(error.__cause__, NFENotPossible) and processes.run_on_main(lambda: manifest.skip(spec, why)):
                return metrics
            if processes.is_main:
                if failed := getattr(error, "failed", True):
                    manifest.note(spec, "failed" if started else NOT_STARTED, why)
                self.failures.setdefault(folder, {})[spec.title, why] = started and failed
                print(f"{spec.title}: failed", flush=True)
            raise
        return metrics

    def metrics_thread(self, module: Any, job: "Job", processes: "Processes") -> Executor | None:
        """Return the thread that computes metrics while other evaluations are sampled; None where that gains nothing.

        A single process on a CPU needs it for sampling; and nothing may use a GPU while it captures CUDA graphs.
        """
        gains = job.shares_gpu or (processes.world_size > 1 and job.compute.device == "cpu")
        if not (self.here and gains and hasattr(module, "evaluate_in_steps")):
            return None
        self.pool = self.pool or ThreadPoolExecutor(1)
        return self.pool

    def report(self) -> None:
        """Wait for all metrics; then write tables, plots and a page of all records in each folder, and say where."""
        try:
            self.wait()
        finally:
            if current_session().processes.is_main:
                self.write_reports()

    def write_reports(self) -> None:
        """Write the report of each folder.

        What could not start is no result: it is printed, and changes nothing in the folder.
        """
        from ddim.evaluation.sweep import Manifest

        for folder, logger in sorted(self.loggers.items()):
            manifest = Manifest(folder)
            # A single evaluation that fails says so itself, and a sweep without a plan has no manifest.
            own = self.failures.get(folder, {}) if SWEEP_FLAGS & set(sys.argv) else {}
            failures = manifest.failures() or [failure for failure, started in own.items() if started]
            if folder in self.started:
                self.write_report(logger, manifest.read()["command"] or command(), failures, manifest.impossible())
            for title, why in dict.fromkeys([*failures, *manifest.take_not_started(), *own]):
                print(f"failed: {title}: {why}")

    def write_report(
        self,
        logger: "SweepLogger",
        command: str,
        failures: list[tuple[str, str]],
        impossible: list[tuple[str, str]],
    ) -> None:
        """Write the report of a folder that has records, print its tables and paths, and log it."""
        from filelock import FileLock

        from ddim.results.report import write_report

        spec, grids = self.specs[logger.folder], (logger.folder / "grids",) * (logger.folder / "grids").is_dir()
        if not logger.folder.is_dir():
            return
        with FileLock(logger.folder / ".report.lock"):  # held while reading too: the last report has all records
            records = current_session().records(str(logger.folder)).read()
            options = {"style": spec.style, "figure": spec.figure} if hasattr(spec, "figure") else {}
            options |= {"shown": spec.table, "failures": failures, "impossible": impossible}
            paths = write_report(records, logger.folder, command=command, **options) if records else []
        if paths:
            print(f"\n{paths[0].read_text(encoding='utf-8')}")
            for path in (*paths, *grids):
                print(path)
            logger.log_report(paths)
            if failures:
                print(same_command())
            elif hasattr(spec, "checkpoint"):  # not images that exist already
                print(command_line("figures", "figure=samples", *of_model(spec), f"name={spec.name}"))


def current_session() -> "Session":
    """Return what the evaluations of this process share.

    It belongs to the process, not to `Sweep`, which launchers copy to the processes of their jobs: those join whom they
    were started with, and load a model once for all their jobs.
    """
    from ddim.distributed import join_process_group
    from ddim.evaluation.session import Session

    processes = join_process_group()
    if not _sessions or _sessions[-1].processes != processes:
        _sessions[:] = [Session(processes)]
    return _sessions[-1]


def print_metrics(title: str, record: dict[str, Any], new: bool) -> None:
    """Print the numbers of an evaluation."""
    from tqdm import tqdm

    from ddim.results.records import code_revision

    values = ", ".join(f"{key} {value:.4g}" for key, value in record["metrics"].items())
    if new:
        how = f"{record['seconds_sampling']:.1f} s sampling, {record['seconds_metrics']:.1f} s metrics"
    else:
        how, revision = "already in the records", record.get("revision") or "unknown"
        if revision != code_revision():
            how += f", by the code of {revision[:7]}{revision[40:]}"
    with tqdm.external_write_mode():  # above the progress bar of an evaluation that is being sampled
        print(f"{title}: {values} ({how})", flush=True)


def reason(error: Exception) -> str:
    """Return an exception in one line."""
    return explain(error) or f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def command() -> str:
    """Return the command that is running, to be typed again."""
    script, *words = sys.argv
    return shlex.join(["ddim", Path(script).stem, *words] if COMMAND in os.environ else ["python", *sys.argv])
