"""The words of a command line and the experiment that they name, checked before Hydra makes a folder or starts a job.

Hydra takes what is refused here, and does something else than was meant.
"""

import re
from importlib.util import find_spec
from typing import Any

from _jobs import SWEEP_FLAGS
from _messages import CONFIGS, own_groups, own_options
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf.errors import OmegaConfBaseException

# The plugin of Hydra's that a launcher needs.
PLUGINS = {
    **dict.fromkeys(("box", "joblib"), "hydra_joblib_launcher"),
    **dict.fromkeys(("slurm_gpu", "submitit_slurm", "submitit_local"), "hydra_submitit_launcher"),
}


def check_command(config_name: str, words: list[str]) -> None:
    """Check the words of a command.

    Raises:
        UserError: a group that is a list, null or of another script, an experiment of another script, a sweep over
            nothing or without -m, a launcher without -m or without its package, a key that is removed, or a name or
            folder that is none.
        HydraException, OmegaConfBaseException: Hydra cannot read the words, or compose them.
    """
    if any(word.startswith("-") and word not in SWEEP_FLAGS for word in words):  # --help, --cfg, --config-dir
        return
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        parse = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides
        fixed: list[str] = []  # of a sweep its first values
        names: list[list[str]] = [[]]
        for override in parse([word for word in words if word not in SWEEP_FLAGS]):
            if override.is_hydra_override():
                _check_launcher(override, bool(SWEEP_FLAGS & set(words)))
                fixed.append(str(override.input_line))
                continue
            settings = [f"{override.get_key_element()}={value}" for value in _check_override(override, config_name)]
            if override.key_or_group == "name":
                names = [[setting] for setting in settings]
            else:
                fixed += settings[:1]
        for name in names:
            config = compose(config_name, [*fixed, *name], True)
            _check_groups(config.hydra.runtime.choices, config_name)
            _check_folder(config)
        swept = parse([f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()])
        for override in swept:
            _check_override(override, config_name)
        keys = [override.get_key_element() for override in swept]
        if keys and not SWEEP_FLAGS & set(words) and not any(setting.partition("=")[0] in keys for setting in fixed):
            raise _refused(f"the sweep over {', '.join(keys)}", "it needs -m; for a single job give one of these keys")


def _check_override(override: Any, config_name: str) -> list[str]:
    """Check one word; return its values, as Hydra writes them."""
    word, key, group = override.input_line, override.get_key_element().lstrip("+~"), override.key_or_group
    is_group = (CONFIGS / group).is_dir()
    if override.is_delete():
        instead = f"{key}=OPTION" if is_group else f"{key}=null, or the value you mean"
        raise _refused(word, f"a default would take over from what is removed; write {instead}")
    if override.is_interval_sweep():  # any number in between
        return []
    if override.is_sweep_override():
        values, plain = [*override.sweep_string_iterator()], [*override.sweep_iterator()]
        if not values:
            raise _refused(word, "there is no value to sweep over; a range is range(START,STOP), and ends before STOP")
    else:
        values, plain = [override.get_value_element_as_str()], [override.value()]
    if not is_group:
        return values
    groups = own_groups(config_name)
    if key not in groups:
        raise _refused(word, _foreign(group, values[0], groups, config_name))
    if override.is_add() or override.is_force_add():
        raise _refused(word, f"{group} has an option already; write {key}={values[0]}, without +")
    for value in plain:
        if isinstance(value, list):
            options = ",".join(map(str, value))
            raise _refused(word, f"{group} takes one option; for a sweep over several write {key}={options} with -m")
        if not isinstance(value, str):
            raise _refused(word, f"{group} takes one option; allowed: {', '.join(own_options(group, config_name))}")
        _check_option(group, value, config_name)
    return values


def _check_launcher(override: Any, sweep: bool) -> None:
    """Check that there is a sweep for a launcher, and the plugin that it needs."""
    if override.key_or_group != "hydra/launcher" or (plugin := PLUGINS.get(str(override.value()))) is None:
        return
    if not sweep:
        raise _refused(override.input_line, "a launcher starts the jobs of a sweep; add -m")
    if not (find_spec("hydra_plugins") and find_spec(f"hydra_plugins.{plugin}")):
        raise _refused(override.input_line, "its package is not installed; install it by pip install -e '.[launchers]'")


def _check_option(group: str, option: str, config_name: str) -> None:
    """Check an experiment, or another file whose keys are those of the top level."""
    path = CONFIGS / group / f"{option}.yaml"
    if group not in ("experiment", "debug", "hparams_search") or not path.is_file():
        return
    if not re.match(r"\s*#\s*@package +_global_\s*$", path.read_text(encoding="utf-8"), re.MULTILINE):
        raise _refused(f"configs/{group}/{option}.yaml", "its first line must be '# @package _global_'")
    if option not in (allowed := own_options(group, config_name)):
        raise _refused(f"{group}={option}", f"that is not for {config_name}.py; allowed here: {', '.join(allowed)}")


def _foreign(group: str, option: str, groups: dict[str, str | None], config_name: str) -> str:
    """Return why a script does not take a group, and what it may be called there."""
    near = [own for own in groups if own.partition("@")[0] == group]
    near += [own for own in groups if (CONFIGS / own.partition("@")[0] / f"{option}.yaml").is_file()]
    hint = f" (did you mean {near[0]}={option}?)" if near else ""
    return f"{config_name}.py has no group {group}{hint}; allowed: {', '.join(groups)}"


def _check_groups(choices: Any, config_name: str) -> None:
    """Check that an experiment leaves one option of each group; Hydra does not list a choice of several, or of none."""
    for key in own_groups(config_name):
        if key not in choices:
            raise _refused(f"{key} is null or a list in the experiment", "a group takes one option; write one")


def _check_folder(config: Any) -> None:
    """Check what Hydra's folder is named by, before Hydra makes it."""
    from ddim.config import FilePath, check_name, config_context, convert

    try:
        name, folder = config.get("name"), config.get("output_dir")
    except OmegaConfBaseException:  # missing, which the job reports, or known to a running job only
        return
    if folder is not None:
        convert(folder, FilePath, "output_dir")
    if name is not None:
        with config_context(""):
            check_name(convert(name, str, "name"))


def _refused(what: str, why: str) -> Exception:
    from ddim.errors import UserError

    return UserError(f"{what}: {why}.")
