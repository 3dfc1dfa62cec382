"""Train a network.

python scripts/train.py experiment=cifar10          # any file of configs/experiment, or groups and keys one by one
python scripts/train.py experiment=cifar10 checkpoint=last       # resume
python scripts/train.py --help
"""

import math
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import entry, pick_device
from _start import rank
from compare import write_table
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

if TYPE_CHECKING:
    from ddim.training.spec import TrainerSpec

# Environment variable with the folder of a sweep's comparison, also for the processes that a launcher starts.
COMPARISON = "DDIM_COMPARISON"
RUNS = "runs.txt"  # in it: the folder of each run, a line each


def main(config: dict[str, Any]) -> float | None:
    """Train as `config` says and print the path of the checkpoint; return what a sweeper such as Optuna minimises.

    That is the best value of the validation metric, and the last training loss where there is no validation; None
    where it is not finite, which Optuna takes for a failed trial.
    """
    from ddim.config import build
    from ddim.results.compare import last_loss
    from ddim.training.dry_run import dry_run
    from ddim.training.run import train
    from ddim.training.spec import TrainSpec

    pick_device(config.get("trainer"), "accelerator")
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    if sweep:
        group_runs(config)
        if not config["dry_run"]:
            list_run(str(config["output_dir"]))
    spec = build(TrainSpec, config, "")
    if sweep:
        check_processes(spec.trainer)
    if spec.dry_run:
        print("\n".join(dry_run(spec)))
        return None
    trained = train(spec, config)
    print(f"checkpoint: {trained.checkpoint}")
    value = last_loss(spec.folder) if trained.metric is None else trained.metric
    return value if value is not None and math.isfinite(value) else None


def list_run(folder: str) -> None:
    """Add a run of a sweep to those that are compared at its end; before it starts, so that it is there if it fails."""
    if rank() == 0 and COMPARISON in os.environ:  # SLURM may be told to pass no variables on
        path = Path(os.environ[COMPARISON], RUNS)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{Path(folder).expanduser()}\n")


def compare_runs() -> None:
    """Compare the runs of the sweep that ends, if this was one."""
    listed = Path(os.environ[COMPARISON], RUNS)
    if rank() == 0 and listed.exists():
        write_table(map(Path, listed.read_text(encoding="utf-8").splitlines()), listed.parent)


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
    os.environ[COMPARISON] = f"outputs/compare/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    entry(main, "train", finish=compare_runs)
