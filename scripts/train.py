"""Train a network.

python scripts/train.py experiment=cifar10          # any file of configs/experiment, or groups and keys one by one
python scripts/train.py experiment=cifar10 checkpoint=last       # resume
python scripts/train.py --help
"""

import os
from typing import TYPE_CHECKING, Any

from _cli import entry, pick_device
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

if TYPE_CHECKING:
    from ddim.training.spec import TrainerSpec


def main(config: dict[str, Any]) -> None:
    """Train as `config` says and print the path of the checkpoint."""
    from ddim.config import build
    from ddim.training.dry_run import dry_run
    from ddim.training.run import train
    from ddim.training.spec import TrainSpec

    pick_device(config.get("trainer"), "accelerator")
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        group_runs(config)
    spec = build(TrainSpec, config, "")
    if sweep:
        check_processes(spec.trainer)
    if spec.dry_run:
        print("\n".join(dry_run(spec)))
    else:
        print(f"checkpoint: {train(spec, config).checkpoint}")


def group_runs(config: dict[str, Any]) -> None:
    """Let W&B show the runs of a sweep as one group, of the experiment's name unless another is given."""
    logger = config.get("logger")
    if isinstance(logger, dict) and logger.get("group") is None:
        logger["group"] = HydraConfig.get().runtime.choices.get("experiment") or config["data"]["name"]


def check_processes(trainer: "TrainerSpec") -> None:
    """Refuse a run of a sweep for which Lightning would start further processes.

    Raises:
        UserError: it would start them with the command of this one, so each would run the complete sweep again.
    """
    from ddim.errors import UserError

    started = "LOCAL_RANK" in os.environ or "SLURM_NTASKS" in os.environ  # all of them, by torchrun or SLURM
    devices = list(trainer.devices) if isinstance(trainer.devices, tuple) else trainer.devices
    one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    if one or started or trainer.strategy.endswith(("spawn", "fork", "notebook")):
        return
    raise UserError(
        f"a sweep trains each run on one device, and trainer.devices={devices} may be more; choose "
        "trainer.devices=1, one command for each run, or torchrun."
    )


if __name__ == "__main__":
    entry(main, "train")
