"""The entry point that all scripts share: Hydra composes the configuration, and errors become exit codes.

Only this file, _help.py, _jobs.py, _messages.py, _overrides.py and train.py import Hydra.
"""

from _start import STOPPED, TRY_AGAIN, rank, started_by_lightning, typed  # first: it handles signals

# ruff: isort: split
import importlib.util
import logging
import os
import re
import select
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if missing := next((name for name in ("ddim", "hydra") if importlib.util.find_spec(name) is None), None):
    sys.exit(
        f"error: the package {missing} is not installed for this Python; activate the environment (source "
        ".venv/bin/activate; bash scripts/quickstart.sh creates it), or install with pip install -e ."
    )

import hydra
from _gpus import jobs_side_by_side, own_gpu
from _help import help_groups, help_keys
from _jobs import job_number, sweep_jobs, to_plain
from _last_words import same_command
from _messages import CONFIGS, explain, explain_any, explain_hydra
from _overrides import check_command
from omegaconf import DictConfig, OmegaConf

# Used in configs/: only rank 0 keeps Hydra's files, ~ is expanded as in `ddim.config`, --help is of one script,
# hydra/launcher=box gives each process a GPU, and a search that is kept in a storage goes on with other random numbers.
OmegaConf.register_new_resolver("if_main", lambda here, other: other if rank() else here, replace=True)
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
OmegaConf.register_new_resolver("groups", help_groups, replace=True)
OmegaConf.register_new_resolver("jobs_side_by_side", jobs_side_by_side, replace=True)
OmegaConf.register_new_resolver("job_number", job_number, replace=True)
OmegaConf.register_new_resolver("unless", lambda given, value: None if given else value, replace=True)
OmegaConf.register_new_resolver("own_gpu", own_gpu, replace=True)
OmegaConf.register_new_resolver("short", "{:.3g}".format, replace=True)  # numbers in names of runs
OmegaConf.register_new_resolver("keys", help_keys, replace=True)


WAIT_FOR_MAIN = 5  # seconds


def entry(
    task: Callable[[dict[str, Any]], Any],
    config_name: str,
    finish: Callable[[], None] | None = None,
    plan: Callable[[list[dict[str, Any]], bool], bool] | None = None,
) -> None:
    """Run `task` on the composed configuration as plain values.

    The exit status is 2 for a user error, 1 for a bug, 75 for a run that received a signal to stop and can go on (0 of
    a process that Lightning started for it), 130 where Ctrl-C ended it at once. Each reason is printed once, at the
    end. A job of a sweep that fails does not stop the others; a signal does.

    Args:
        task: gets the configuration without Hydra's own part; called once for each job of a sweep.
        config_name: of a file in configs/.
        finish: called after the last job.
        plan: called before the first job of a sweep, with the configuration of each and whether they run in this
            process; returns whether nothing is left to compute.
    """
    failures = Failures(wants_traceback=os.environ.get("HYDRA_FULL_ERROR") == "1")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its exceptions instead of printing a summary of them
    # The processes of the submitit launcher import this file by its module name before they read any configuration.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    silence()
    # Hydra wants a value that begins with ~ in quotes, which the shell takes away.
    sys.argv[1:] = [re.sub(r"^([\w.]+)=(~[\w./-]*)$", r"\1='\2'", word) for word in sys.argv[1:]]
    failures.guard(lambda: check_command(config_name, sys.argv[1:]), lambda error: explain_any(error, config_name))
    failures.exit()

    def job(config: DictConfig) -> Any:
        silence()  # again in the processes of a launcher
        return failures.guard(partial(_checked, task, config), explain)

    jobs = nothing_left = None
    if plan is not None:
        jobs = failures.guard(lambda: sweep_jobs(config_name, sys.argv[1:]), lambda e: explain_any(e, config_name))
        if jobs is not None:
            nothing_left = failures.guard(partial(plan, *jobs), explain)
        failures.exit()
    if jobs is not None and nothing_left:  # Hydra would compose the configuration of each job twice more
        for values in jobs[0]:
            failures.guard(partial(_checked, task, values), explain)
    else:
        main = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
        failures.guard(main(job), lambda error: explain_hydra(error, config_name))
    if finish is not None:
        failures.guard(finish, explain)
    failures.exit()


def _checked(task: Callable[[dict[str, Any]], Any], config: DictConfig | dict[str, Any]) -> Any:
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ddim.distributed import check_launch_variables
    from ddim.results.records import code_revision

    check_launch_variables()  # before Lightning, which reads them when it is imported
    code_revision()  # asked now, for the records: at the first one another commit may be checked out
    with logging_redirect_tqdm():  # lines above a progress bar, not at its end
        try:
            return task(to_plain(config) if isinstance(config, DictConfig) else config)
        except Exception as error:
            error.of_task = True  # type: ignore[attr-defined]  # not of the words, which all processes have
            raise


class Failures:
    """What went wrong in the jobs of a command: each reason, and how often.

    Args:
        wants_traceback: print one also for user errors.
    """

    def __init__(self, wants_traceback: bool) -> None:
        self.wants_traceback = wants_traceback
        self.reasons: Counter[str] = Counter()
        self.defects = self.interrupted = False
        self.alone = False  # whether it went wrong before this process was connected with others
        self.process = os.getpid()

    def guard(self, call: Callable[[], Any], explain: Callable[[Exception], str | None]) -> Any:
        """Return the result of `call`; count an exception, which is a bug if `explain` returns None."""
        from_launcher = os.getpid() != self.process  # whose process reports exceptions; counts would be lost
        try:
            return call()
        except KeyboardInterrupt:
            if from_launcher or self.wants_traceback:
                raise
            if rank() == 0:
                print("stopped.", file=sys.stderr)
            sys.exit(STOPPED)
        except Exception as error:
            from ddim.errors import Disconnected, Interrupted, PeerFailed

            if isinstance(error, BrokenPipeError) and nobody_reads():
                sys.exit(128 + signal.SIGPIPE)  # as other commands before `| head`
            if from_launcher:
                if isinstance(error, Interrupted) and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
                    # submitit's handler, which was replaced while there was something to save, requeues the job
                    signal.raise_signal(signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"])
                raise
            if isinstance(error, Interrupted):
                self.interrupted = True
                if rank() == 0:
                    print(error, file=sys.stderr)
                    print(same_command("checkpoint=last"))
                self.exit()  # the other jobs of a sweep too
            reason = explain(error)
            self.defects |= reason is None
            self.alone |= hasattr(error, "of_task") and not (isinstance(error, PeerFailed) or connected())
            if self.wants_traceback or reason is None:
                traceback.print_exc()
            self.reasons[reason or f"unexpected {type(error).__name__}, see the traceback above"] += 1
            if isinstance(error, Disconnected):
                self.exit()  # the other jobs of a sweep need all processes too

    def exit(self) -> None:
        """Print the reasons and exit if there are any.

        Of several processes the main one does, and another one that may have a reason of its own.
        """
        if self.reasons and self.alone and rank():
            # Where the main one has failed too, and so has said the same, torchrun ends this one meanwhile.
            time.sleep(WAIT_FOR_MAIN)
        if rank() == 0 or self.defects or self.alone:
            who = f"process {rank()}: " if rank() else ""
            for reason, count in self.reasons.items():
                print(f"error: {who}{typed(reason)}{f' ({count} times)' if count > 1 else ''}", file=sys.stderr)
        if self.reasons:
            sys.exit(1 if self.defects else 2)
        if self.interrupted:
            # Lightning kills the main process, which may still be saving, when one that it started ends with another.
            sys.exit(0 if started_by_lightning() else TRY_AGAIN)


def connected() -> bool:
    """Return whether this process has been connected with others."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def nobody_reads() -> bool:
    """Return whether the reader of what is printed has gone; then nothing is printed any more."""
    output = select.poll()
    output.register(sys.stdout, select.POLLOUT)
    if gone := any(event & select.POLLERR for _, event in output.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def silence() -> None:
    """Hide Lightning's tips, a deprecation of torch inside it, and a traceback for each line that a log cannot take.

    Also what fontTools reports of every letter of a PDF, and what a process of joblib's removes after a signal.
    """
    logging.raiseExceptions = False
    hidden = [*os.environ.get("PYTHONWARNINGS", "").split(","), "ignore:resource_tracker:UserWarning"]
    os.environ["PYTHONWARNINGS"] = ",".join(dict.fromkeys(filter(None, hidden)))
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    tips = ("utilities.rank_zero", "trainer.connectors.checkpoint_connector")
    for name in (*(f"lightning.pytorch.{part}" for part in tips), "fontTools"):
        logging.getLogger(name).setLevel(logging.WARNING)


def pick_device(values: Any, key: str, without_float64: bool = False) -> None:
    """Replace values[key] = "auto" by the accelerator of this machine, or by cpu.

    Apple's GPUs have no float64, which training and metrics need; sampling runs the network alone there.
    """
    if isinstance(values, dict) and values.get(key) == "auto":
        import torch

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = "cpu" if accelerator is None else accelerator.type
        values[key] = "cpu" if kind == "mps" and not without_float64 else kind
