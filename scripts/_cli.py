"""What the scripts share: Hydra's door, and one clear sentence for each mistake.

Together with the scripts themselves this is the only file that knows Hydra.
"""

import difflib
import errno
import importlib.util
import logging
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TRY_AGAIN = 75  # the exit status of a run that was stopped and saved (EX_TEMPFAIL)
CANNOT_WRITE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    errno.EROFS: "choose another folder",
}
STOPPED = 130  # the exit status of a run that Ctrl-C ended (128 + SIGINT)
MODES = ("run", "sweep")  # of Hydra, each with a folder for its files
Task = Callable[[dict[str, Any]], Any]


def entry(
    task: Task,
    config_name: str,
    finish: Callable[[], None] | None = None,
    plan: Callable[[list[dict[str, Any]], bool], None] | None = None,
) -> None:
    """Run `task` on the composed configuration as plain values; exit with 2 on a mistake of the user's, 1 on
    ours, 75 when the run was told to stop and can go on, 130 after Ctrl-C.

    Each reason is printed once, at the end. A job of a sweep that fails does not take the others down.

    Args:
        task: gets the configuration without Hydra's own part; called once for each job of a sweep.
        config_name: of a file in configs/.
        finish: called after the last job.
        plan: called before the first job of a sweep, with the configuration of each and whether they run in this
            process; needs `BeforeSweep` among the callbacks of the configuration.
    """
    if importlib.util.find_spec("ddim") is None:
        sys.exit("error: the package ddim is not installed; run bash scripts/quickstart.sh, or pip install -e .")
    failures = Failures(wants_traceback=os.environ.get("HYDRA_FULL_ERROR") == "1")
    # Hydra then hands its exceptions on instead of printing its own summary of them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    silence()
    # The processes of a launcher find this file where its jobs say it is.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

    def job(config: DictConfig) -> Any:
        silence()  # again in the processes of a launcher
        return failures.guard(lambda: task(_plain(config)), explain)

    def before(config: DictConfig) -> None:
        def words(error: Exception) -> str | None:
            return explain_hydra(error, config_name) if isinstance(error, HydraException) else explain(error)

        if plan is not None:
            failures.guard(lambda: _plan(plan, config), words)
            failures.exit()

    BeforeSweep.then = before
    if _rank() > 0:  # the first of several processes keeps Hydra's files
        place = next((i for i, word in enumerate(sys.argv) if i and "=" in word), len(sys.argv))
        own = ["hydra.output_subdir=null", *(f"hydra.{mode}.dir=${{output_dir}}/hydra/others" for mode in MODES)]
        sys.argv[place:place] = own  # Hydra wants the overrides side by side
    main = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    failures.guard(main(job), lambda error: explain_hydra(error, config_name))
    if finish is not None:
        failures.guard(finish, explain)
    failures.exit()


class Failures:
    """What went wrong in the jobs of a command: each reason, and how often.

    Args:
        wants_traceback: print one also for mistakes of the user's.
    """

    def __init__(self, wants_traceback: bool) -> None:
        self.wants_traceback = wants_traceback
        self.reasons: Counter[str] = Counter()
        self.defects = self.interrupted = False
        self.process = os.getpid()

    def guard(self, call: Callable[[], Any], explain: Callable[[Exception], str | None]) -> Any:
        """Return what `call` returns; count an exception, put into words by `explain` or taken as a defect of ours."""
        try:
            return call()
        except KeyboardInterrupt:
            if os.getpid() != self.process or self.wants_traceback:
                raise
            if _rank() == 0:
                print("stopped.", file=sys.stderr)
            sys.exit(STOPPED)
        except Exception as error:
            # Counts of another process nobody would see: let the launcher report.
            if os.getpid() != self.process:
                raise
            from ddim.errors import Interrupted

            if isinstance(error, Interrupted):
                self.interrupted = True
                print(error, file=sys.stderr)
                return None
            reason = explain(error)
            self.defects |= reason is None
            if self.wants_traceback or reason is None:
                traceback.print_exc()
            self.reasons[reason or f"unexpected {type(error).__name__}, see the traceback above"] += 1

    def exit(self) -> None:
        """Print the reasons, once for all processes that started together, and exit if there are any."""
        if _rank() == 0 or self.defects:
            for reason, count in self.reasons.items():
                print(f"error: {reason}{f' ({count} times)' if count > 1 else ''}", file=sys.stderr)
        if self.reasons:
            sys.exit(1 if self.defects else 2)
        if self.interrupted:
            sys.exit(TRY_AGAIN)


class BeforeSweep(Callback):
    """Hands Hydra's own configuration of a sweep to `then` before the first job."""

    then: Callable[[DictConfig], Any] | None = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Called by Hydra, which would turn an exception into a warning."""
        if BeforeSweep.then is not None:
            BeforeSweep.then(config)


def _plan(plan: Callable[[list[dict[str, Any]], bool], None], config: DictConfig) -> None:
    launcher, sweeper = (config.hydra[part]._target_ for part in ("launcher", "sweeper"))
    if not sweeper.endswith("BasicSweeper"):  # another one does not know its jobs beforehand
        return
    try:
        jobs = jobs_of(config)
    except InterpolationResolutionError:  # something that only a running job knows, such as ${hydra:job.num}
        return
    plan(jobs, launcher.endswith("BasicLauncher"))


def jobs_of(config: DictConfig) -> list[dict[str, Any]]:
    """Return the configurations of the jobs that Hydra's own sweeper is about to make of `config`, in its order."""
    # Late, as Hydra loads its plugins anew.
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    sweeper = BasicSweeper(max_batch_size=None, params=config.hydra.sweeper.params)
    loader = GlobalHydra.instance().config_loader()
    arguments = [*sweeper._parse_config(), *config.hydra.overrides.task]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(arguments)
    [jobs] = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    configs = []
    for job in jobs:
        composed = loader.load_sweep_config(config, list(job))
        with open_dict(composed):
            del composed["hydra"]
        configs.append(_plain(composed))
    return configs


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def silence() -> None:
    """Third-party noise at every start: torch's deprecation inside Lightning, and Lightning's advertisements."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)


def pick_device(values: Any, key: str) -> None:
    """Replace values[key] = "auto" by the accelerator of this machine, or by cpu.

    Apple's GPUs are passed over: they have no float64, in which noise levels and noise are computed.
    """
    if isinstance(values, dict) and values.get(key) == "auto":
        import torch

        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        values[key] = "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type


def explain(error: Exception) -> str | None:
    """Return one line for an error of a job that the user can put right, None for a defect of ours."""
    from ddim.errors import UserError

    if isinstance(error, MissingMandatoryValue):
        key = str(error).split(":")[-1].split()[0]
        return f"{key} is required; add {key}=... to the command."
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        advice = CANNOT_WRITE[error.errno]
        return f"cannot write{f' to {error.filename}' if error.filename else ''} ({error.strerror}); {advice}."
    if isinstance(error, PermissionError):
        return f"{error.filename} may not be used ({error.strerror}); change its permissions, or choose another path."
    if isinstance(error, UserError | OmegaConfBaseException):
        return " ".join(str(error).split())
    return None


def explain_hydra(error: Exception, config_name: str) -> str:
    """Return one line for an error before the first job, while Hydra read the command line or made the run's folder."""
    from ddim.config import suggest

    message = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"unknown option {group}={option}{suggest(option, error.options)}; allowed: {', '.join(error.options)}."
    if isinstance(error, OverrideParseException):
        reason = message.partition(" See https")[0]
        return (
            f"the argument {error.override!r} cannot be read ({reason}); write key=value, and quote special characters."
        )
    if isinstance(error, OSError) and error.filename:
        return f"cannot write to {error.filename} ({error.strerror}); choose another output_dir=..."
    if unknown := re.search(r"Could not override '([^']+)'", message):
        return _unknown_key(unknown[1], config_name)
    return message


def _unknown_key(key: str, config_name: str) -> str:
    from ddim.config import suggest

    # The group options of the command line decide which keys there are.
    given = [argument.split(",")[0] for argument in sys.argv[1:] if (CONFIGS / argument.split("=")[0]).is_dir()]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config: Any = OmegaConf.to_container(hydra.compose(config_name, given))
    node, path = config, ""
    for part in key.split("."):
        if not isinstance(node.get(part), dict):
            break
        node, path = node[part], f"{path}{part}."
    allowed = [f"{path}{name}" for name in node]
    inner = {name: f"{group}.{name}" for group, keys in config.items() if isinstance(keys, dict) for name in keys}
    elsewhere = difflib.get_close_matches(key.rpartition(".")[2], inner, n=1)
    near = suggest(key, allowed) or (f" (did you mean {inner[elsewhere[0]]}?)" if elsewhere else "")
    return f"unknown key {key}{near}; allowed: {', '.join(allowed)}."


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
