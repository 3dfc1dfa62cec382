"""The jobs of a sweep, known before the first of them runs."""

import copy
import functools
import itertools
import os
import re
import sys
from typing import Any

from _messages import CONFIGS
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

SWEEP_FLAGS = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
Jobs = tuple[list[dict[str, Any]], bool]


def sweep_jobs(config_name: str, words: list[str]) -> Jobs | None:
    """Return the configuration of each job that the words of a command ask for, and whether they run in this process.

    None if it is no sweep, or if the jobs cannot be known before they run.

    Raises:
        UserError: several processes were launched, and would choose different jobs.
    """
    if not SWEEP_FLAGS & set(words) or any(word.startswith("-") and word not in SWEEP_FLAGS for word in words):
        return None
    try:
        return _compose_jobs(config_name, words)
    except (ImportError, AttributeError, TypeError):  # Hydra's parser is made for plugins, and may change
        return None


def _compose_jobs(config_name: str, words: list[str]) -> Jobs | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        parse = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides
        overrides = parse([word for word in words if word not in SWEEP_FLAGS])
        fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
        settings = compose(config_name, fixed, return_hydra_config=True).hydra
        if not settings.sweeper._target_.endswith("BasicSweeper"):  # another sweeper chooses its jobs as it runs
            check_one_process(settings.sweeper._target_)
            return None
        params = parse([f"{key}={value}" for key, value in (settings.sweeper.params or {}).items()])
        choices = {}
        for override in params + overrides:  # the command line replaces the parameters of an experiment
            swept = override.is_sweep_override()
            values = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
            choices[override.get_key_element()] = [f"{override.get_key_element()}={value}" for value in values]
        configs = _compose_all(config_name, [list(job) for job in itertools.product(*choices.values())])
        if any(re.search(r"\$\{(now|hydra):", str(OmegaConf.to_container(config))) for config in configs):
            return None  # only a running job knows its time and number
        try:
            plain = [to_plain(config) for config in configs]
        except InterpolationResolutionError:  # only a running job knows values such as ${hydra:job.num}
            return None
    return plain, settings.launcher._target_.endswith("BasicLauncher")


def check_files(configs: list[dict[str, Any]], here: bool) -> bool:
    """Refuse a sweep with overwrite=true of which a job would replace the file of the one before; False else.

    Raises:
        UserError: it would.
    """
    from ddim.errors import UserError

    files = []  # where a job writes, and the numbers of its files
    for config in configs if all(config.get("overwrite") for config in configs) else ():
        first, n = (config["first"], config["n"]) if config.get("format") == "png" else (0, 1)
        if not (isinstance(first, int) and isinstance(n, int)):  # the job itself says what is allowed
            continue
        files.append(([str(config.get(key)) for key in ("output_dir", "name", "format")], first, first + n))
    for (place, _, end), (other, first, _) in itertools.pairwise(sorted(files)):
        if place == other and first < end:
            raise UserError(
                f"2 jobs of this sweep write one file in {place[0]}, and with overwrite=true one replaces the other; "
                "give each a folder named by what differs, such as 'output_dir=outputs/S${sampler.S}'."
            )
    return False


def check_one_process(sweeper: str) -> None:
    """Check that no other process was launched that would run a sweeper of its own.

    Raises:
        UserError: torchrun or srun launched several.
    """
    from ddim.distributed import launched_processes
    from ddim.errors import UserError

    if (count := launched_processes().world_size) > 1:
        raise UserError(
            f"{count} processes were started, and each would choose settings of its own "
            f"({sweeper.rpartition('.')[2]}); start a search as one process: hydra/launcher=box "
            f"hydra.sweeper.n_jobs={count} gives each run a GPU of this machine, and hydra/launcher=slurm_gpu one of a "
            "cluster."
        )


def job_number() -> str:
    """Return _NUMBER in a job of a sweep, "" elsewhere: for folders that are named by a time, the same for all jobs."""
    config: Any = HydraConfig.instance().cfg
    number = None if config is None else OmegaConf.select(config, "hydra.job.num")  # None of a single run
    return "" if number is None else f"_{number}"


def _compose_all(config_name: str, jobs: list[list[str]]) -> list[DictConfig]:
    """Return the configuration of each job, a list of overrides.

    Hydra composes each choice of groups, a tenth of a second of work, and values are set afterwards.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    is_value = {}
    for word in {word for job in jobs for word in job}:
        override = parser.parse_override(word)
        key, plain = override.get_key_element(), override.type == OverrideType.CHANGE
        if plain and re.fullmatch(r"(?!hydra\b)[\w.]+", key) and not loader.get_group_options(key):
            is_value[word] = (key, override.value())
    composed: dict[tuple[str, ...], DictConfig] = {}
    configs = []
    for job in jobs:
        choices = tuple(word for word in job if word not in is_value)
        if choices not in composed:
            composed[choices] = compose(config_name, list(choices))
        configs.append(copy.deepcopy(composed[choices]))
        for word in job:
            if word in is_value:
                OmegaConf.update(configs[-1], *is_value[word])
    return configs


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Import the plugins that a configuration names, and return its other keys as plain values.

    Of a checkpoint on W&B these hold the path of its download.

    Raises:
        OmegaConfBaseException: a value is missing or cannot be resolved.
        UserError: a plugin cannot be imported, or the checkpoint cannot be downloaded.
    """
    values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    if names := values.pop("plugins", None):
        from ddim.config import convert
        from ddim.plugins import import_plugins

        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        import_plugins(convert(names, tuple[str, ...], "plugins"))
    if str(values.get("checkpoint")).startswith("wandb:"):
        values["checkpoint"] = _download(values["checkpoint"])
    return values


@functools.cache  # a sweep has one checkpoint for all jobs, which stays the same if :latest moves meanwhile
def _download(checkpoint: str) -> str:
    from ddim.results.wandb_artifacts import download_checkpoint

    return download_checkpoint(checkpoint)
