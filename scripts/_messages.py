"""One clear sentence for each user error."""

import difflib
import errno
import re
import sys
from pathlib import Path
from typing import Any

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
RENAMED_OPTIONS = {"digits_sweep": "table_digits"}
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
    if isinstance(error, PermissionError):
        return f"{error.filename} may not be used ({error.strerror}); change its permissions, or choose another path."
    if isinstance(error, UserError | OmegaConfBaseException):
        return " ".join(str(error).split())
    return None


def explain_hydra(error: Exception, config_name: str) -> str:
    """Return one line for an error before the first job: Hydra reads the command line and creates the run's folder."""
    from ddim.config import suggest

    message = " ".join(str(error).split())
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if option in RENAMED_OPTIONS:
            return f"{group}={option} is called {group}={RENAMED_OPTIONS[option]} now."
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


def explain_any(error: Exception, config_name: str) -> str | None:
    """Return one line for an error of Hydra's or of a job."""
    return explain_hydra(error, config_name) if isinstance(error, HydraException) else explain(error)


def _unknown_key(key: str, config_name: str) -> str:
    from ddim.config import suggest

    # The group options of the command line decide which keys there are.
    given = [argument.split(",")[0] for argument in sys.argv[1:] if (CONFIGS / argument.split("=")[0]).is_dir()]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose(config_name, given))
    if new := RENAMED_KEYS.get(config_name, {}).get(key):
        return f"{key} is called {new} now; write {new}=...{' with a folder' * (key == 'out')}"
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
