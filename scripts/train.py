"""Train a network.

python scripts/train.py experiment=cifar10          # any file of configs/experiment, or groups and keys one by one
python scripts/train.py experiment=cifar10 checkpoint=last       # resume
python scripts/train.py --help
"""

import os
from typing import TYPE_CHECKING, Any

from _cli import entry, pick_device
from _last_words import command_line
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

if TYPE_CHECKING:
    from ddim.training.spec import TrainerSpec, TrainSpec

TABLES = {  # option of data -> experiment of evaluate.py
    "digits": "table_digits",
    "cifar10": "table1_cifar10",
    "celeba": "table1_celeba",
    "lsun_bedroom": "table3_bedroom",
    "lsun_church": "table3_church",
}


def main(config: dict[str, Any]) -> None:
    """Train as `config` says and print where the checkpoint is, and what to do with it."""
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
        print(f"checkpoint: {train(spec, config)}")
        if not sweep:
            print("\n".join(last_words(spec)))


def last_words(spec: "TrainSpec") -> list[str]:
    """Return where the files of a run are, and what to do with its checkpoint."""
    grids = sorted((spec.folder / "samples").glob("step_*.png"))
    metrics = sorted(spec.folder.glob("csv/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    checkpoint = f"checkpoint={spec.checkpoint_dir / 'last.ckpt'}"
    hydra = HydraConfig.get()
    data = hydra.runtime.choices["data"]
    own = [word for word in hydra.overrides.task if word.startswith("data.")]
    evaluation = ["-m", f"experiment={TABLES[data]}"] if data in TABLES else [f"data={data}", *own]
    return [
        *(f"samples: {path}" for path in grids[-1:]),
        *(f"metrics: {path}" for path in metrics[-1:]),
        command_line("sample", checkpoint),
        command_line("evaluate", *evaluation, checkpoint, *(["dry_run=true"] if data != "digits" else [])),
    ]


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
    if trainer.devices in (1, "1") or started or trainer.strategy.endswith(("spawn", "fork", "notebook")):
        return
    raise UserError(
        f"a sweep trains each run on one device, and trainer.devices={trainer.devices} may be more; choose "
        "trainer.devices=1, one command for each run, or torchrun."
    )


if __name__ == "__main__":
    entry(main, "train")
