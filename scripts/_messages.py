"""One clear sentence for each user error."""

import difflib
import errno
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Names of earlier versions: keys by script, and options.
RENAMED_KEYS = {
    "train": {"ckpt_path": "checkpoint"},
    "import_checkpoint": {"source": "checkpoint", "out": "output_dir"},
    "export_checkpoint": {"out": "output_dir"},
}
RENAMED_OPTIONS = {"experiment=digits_sweep": "experiment=table_digits"}
RENAMED_OPTIONS |= {f"{group}={old}": f"{group}=auto" for group in ("compute", "trainer") for old in ("cpu", "gpu")}
RENAMED_OPTIONS |= {f"{group}=default": f"{group}=exact" for group in ("compute", "trainer")}
# Names that other code bases have for a key.
OTHER_NAMES = dict.fromkeys(("steps", "step", "num_steps", "sampling_steps", "num_inference_steps", "ddim_steps"), "S")
# Hydra's plugins, by the extra of pyproject.toml that installs them.
EXTRAS = {
    "hydra/sweeper/optuna": "optuna",
    **dict.fromkeys(
        ("hydra/launcher/joblib", "hydra/launcher/submitit_slurm", "hydra/launcher/submitit_local"), "launchers"
    ),
}
# What can be done where a file cannot be written.
CANNOT_WRITE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    errno.EROFS: "choose another folder",
}


def explain(error: Exception) -> str | None:
    """Return one line for an error of a job that the user can fix, None for a bug."""
    from ddim.errors import UserError

    if isinstance(error, MissingMandatoryValue):
        key = str(error).split(":")[-1].split()[0]
        return f"{key} is required; add {key}=... to the command."
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        advice = CANNOT_WRITE[error.errno]
        return f"cannot write{f' to {error.filename}' if error.filename else ''} ({error.strerror}); {advice}."
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename} cannot be used ({error.strerror}); choose a shorter name."
    if isinstance(error, PermissionError):
        return f"{error.filename} may not be used ({error.strerror}); change its permissions, or choose another path."
    if isinstance(error, UserError | OmegaConfBaseException):
        return _in_one_line(error)
    return None


def explain_hydra(error: Exception, config_name: str) -> str:
    """Return one line for an error before the first job: Hydra reads the command line and creates the run's folder."""
    from ddim.config import suggest

    message = _in_one_line(error) or f"the configuration cannot be composed ({type(error).__name__})"
    if "HydraConfig was not set" in message:
        return (
            "only a running job knows ${hydra:...}, so no folder can be named by it; name runs by what differs, such "
            "as 'name=lr${optim.lr}'."
        )
    if "Record does not exist" in message or "No trials are completed yet" in message:  # Optuna's, of the best trial
        return "every trial failed: the study has no best one; see the reasons above, and run the command again."
    if type(error).__name__ == "UncompletedJobError":  # submitit's
        what = re.split(r" (?:Error stream|No error|No output)", message)[0]
        return (
            f"{what}; the other jobs go on: when they have ended, compare trainings by scripts/compare.py, and give a "
            "command of evaluations again."
        )
    if isinstance(error, yaml.YAMLError):
        return f"a configuration file is not valid YAML: {message}."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if extra := EXTRAS.get(error.missing_cfg_file):
            return f"{group}={option} is not installed; install it with pip install -e '.[{extra}]'."
        if new := RENAMED_OPTIONS.get(f"{group}={option}"):
            return f"{group}={option} is called {new} now."
        foreign = {path.stem for path in (CONFIGS / group).glob("*.yaml")} - {*own_options(group, config_name)}
        options = [option for option in error.options if option not in foreign]
        return f"unknown option {group}={option}{suggest(option, options)}; allowed: {', '.join(options)}."
    if isinstance(error, OverrideParseException):
        reason = message.partition(" See https")[0]
        return (
            f"the argument {error.override!r} cannot be read ({reason}); write key=value, and quote special characters."
        )
    if isinstance(error, OSError) and not isinstance(error, HydraException):  # of Hydra's folder, named or not
        where = error.filename or "the folder of the run"
        advice = f"{CANNOT_WRITE[error.errno]}." if error.errno in CANNOT_WRITE else "choose another output_dir=..."
        return f"cannot write to {where} ({error.strerror}); {advice}"
    if wrong := re.search(r"In '([^']+)': Could not override '([^']+)'", message):
        groups = own_groups(config_name)
        return (
            f"configs/{wrong[1]}.yaml overrides the group {wrong[2]}, which {config_name}.py does not have"
            f"{suggest(wrong[2], groups)}; allowed: {', '.join(groups)}."
        )
    if unknown := re.search(r"Could not override '([^']+)'", message):
        return _unknown_key(unknown[1], config_name)
    return message


def explain_any(error: Exception, config_name: str) -> str | None:
    """Return one line for an error of Hydra's or of a job."""
    return explain(error) or explain_hydra(error, config_name)


def own_groups(config_name: str) -> dict[str, str | None]:
    """Return the groups of a script and the option that each has by default, as in its defaults list."""
    defaults = OmegaConf.load(CONFIGS / f"{config_name}.yaml").defaults
    groups = {str(key): value for entry in defaults if OmegaConf.is_dict(entry) for key, value in entry.items()}
    return {key: value for key, value in groups.items() if not key.startswith("override ")}


def own_options(group: str, config_name: str) -> list[str]:
    """Return the options of a group; of the experiments those whose comment runs them with this script, or none."""
    options = {path.stem: path.read_text(encoding="utf-8") for path in (CONFIGS / group).glob("*.yaml")}
    runs = {name: set(re.findall(rf"scripts/(\w+)\.py .*{group}={name}\b", text)) for name, text in options.items()}
    return sorted(name for name, scripts in runs.items() if not scripts or config_name in scripts)


def _in_one_line(error: Exception) -> str:
    return re.sub(r" (full_key: )?object_type=\w+$", "", " ".join(str(error).split()))  # OmegaConf's last line


def _config_folders(words: list[str]) -> list[str]:
    """Return the folder of --config-dir in the words of a command, if there is one."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, _, folder = word.partition("=")
        if option in ("--config-dir", "-cd"):
            return [folder or following]
    return []


def _unknown_key(key: str, config_name: str) -> str:
    from ddim.config import suggest

    # The group options of the command line decide which keys there are.
    given = [argument.split(",")[0] for argument in sys.argv[1:] if (CONFIGS / argument.split("=")[0]).is_dir()]
    given += [f"hydra.searchpath=[file://{Path(folder).resolve()}]" for folder in _config_folders(sys.argv[1:])]
    hydra = key.startswith("hydra.")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            config: Any = OmegaConf.to_container(compose(config_name, given, return_hydra_config=hydra))
        except (HydraException, OmegaConfBaseException):  # the key is one of an experiment
            config = OmegaConf.to_container(compose(config_name, return_hydra_config=hydra))
    if new := RENAMED_KEYS.get(config_name, {}).get(key):
        return f"{key} is called {new} now; write {new}=...{' with a folder' * (key == 'out')}"
    node, path = config, ""
    for part in key.split("."):
        if not isinstance(node.get(part), dict):
            break
        node, path = node[part], f"{path}{part}."
    allowed = [f"{path}{name}" for name in node]
    inner = {name: f"{group}.{name}" for group, keys in config.items() if isinstance(keys, dict) for name in keys}
    last = key.rpartition(".")[2]
    elsewhere = [OTHER_NAMES[last]] if OTHER_NAMES.get(last) in inner else difflib.get_close_matches(last, inner, n=1)
    near = "" if last in OTHER_NAMES else suggest(key, allowed)
    near = near or (f" (did you mean {inner[elsewhere[0]]}?)" if elsewhere else "")
    return f"unknown key {key}{near}; allowed: {', '.join(allowed)}."
