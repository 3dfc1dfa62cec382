"""What the scripts share: Hydra's door, and one clear sentence for each mistake.

Together with the scripts themselves this is the only file that knows Hydra.
"""

import importlib.util
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Task = Callable[[dict[str, Any]], Any]


def entry(task: Task, config_name: str) -> None:
    """Run `task` on the composed configuration as plain values; exit with status 2 on a mistake of the user's.

    Args:
        task: gets the configuration without Hydra's own part; called once for each job of a sweep.
        config_name: of a file in configs/.
    """
    if importlib.util.find_spec("ddim") is None:
        sys.exit("error: the package ddim is not installed; run bash scripts/quickstart.sh, or pip install -e .")
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra then hands its exceptions on instead of printing its own summary of them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Third-party noise at every start: torch's deprecation inside Lightning, and Lightning's advertisements.
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    main = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    try:
        main(lambda config: task(_plain(config)))()
    except Exception as error:
        message = explain(error, config_name)
        if wants_traceback or message is None:
            traceback.print_exc()
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(1 if message is None else 2)


def pick_device(name: str) -> str:
    """Return `name`, or for "auto" the accelerator of this machine, or cpu."""
    if name != "auto":
        return name
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def explain(error: BaseException, config_name: str) -> str | None:
    """Return one sentence for an error that the user can put right, None for a defect of ours."""
    from ddim.errors import UserError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingMandatoryValue):
        key = str(error).split(":")[-1].split()[0]
        return f"{key} is required; add {key}=... to the command."
    if isinstance(error, HydraException | OmegaConfBaseException):
        unknown = re.search(r"Could not override '([^']+)'", str(error))
        return _unknown_key(unknown[1], config_name) if unknown else " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename and "outputs" in _frames(error):
        return f"cannot write to {error.filename} ({error.strerror}); choose another output_dir=..."
    return None


def _frames(error: BaseException) -> str:
    """Return "outputs" when the error came from Hydra making a run's folder or its log file."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return "outputs" if any("hydra" in Path(name).parts for name in files[-6:]) else ""


def _unknown_key(key: str, config_name: str) -> str:
    from ddim.config import suggest

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = hydra.compose(config_name)
    parent = key.rpartition(".")[0]
    node = OmegaConf.select(config, parent) if parent else config
    allowed = [str(k) for k in node] if isinstance(node, DictConfig) else []
    names = [f"{parent}.{name}" if parent else name for name in allowed]
    return f"unknown key {key}{suggest(key, names)}; allowed: {', '.join(names)}."


def _plain(config: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
