"""Train a network.

python scripts/train.py experiment=cifar10          # any file of configs/experiment, or groups and keys one by one
python scripts/train.py experiment=cifar10 checkpoint=last       # resume
python scripts/train.py --help
"""

import math
import os
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import entry, pick_device
from _last_words import command_line
from _start import rank
from compare import write_table
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
GUIDANCE_TABLES = {"digits": "table_digits_guidance"}  # likewise, of conditional networks

# Environment variable with the folder of a sweep's comparison, also for the processes that a launcher starts.
COMPARISON = "DDIM_COMPARISON"
RUNS = "runs.txt"  # in it: the folder of each run, a line each


def main(config: dict[str, Any]) -> float | None:
    """Train as `config` says, print where the files are and what to type next, and return what a sweeper minimises.

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
        say(dry_run(spec))
        return None
    trained = train(spec, config)
    say([f"checkpoint: {trained.checkpoint}", *([] if sweep else last_words(spec))])
    value = last_loss(spec.folder) if trained.metric is None else trained.metric
    return value if value is not None and math.isfinite(value) else None


def say(lines: list[str]) -> None:
    """Print lines, once for all processes that started together."""
    if rank() == 0:
        print("\n".join(lines))


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


def last_words(spec: "TrainSpec") -> list[str]:
    """Return where the files of a run are, and what to do with its checkpoint."""
    grids = sorted((spec.folder / "samples").glob("step_*.png"))
    metrics = sorted(spec.folder.glob("csv/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    checkpoint = f"checkpoint={spec.checkpoint_dir / 'last.ckpt'}"
    hydra = HydraConfig.get()
    data = hydra.runtime.choices["data"]
    own = [word for word in hydra.overrides.task if word.startswith("data.")]
    labelled = [] if spec.data.labels is None else ["label=all"]
    table = (TABLES | GUIDANCE_TABLES if labelled else TABLES).get(data)
    evaluation = ["-m", f"experiment={table}"] if table else [f"data={data}", *own]
    dry_run = ["dry_run=true"] if data != "digits" else []
    return [
        *(f"samples: {path}" for path in grids[-1:]),
        *(f"metrics: {path}" for path in metrics[-1:]),
        command_line("sample", checkpoint, *labelled, f"output_dir=outputs/samples/{spec.name}"),
        command_line("evaluate", checkpoint, *labelled, *dry_run, typed_words=evaluation),
    ]


def group_runs(config: dict[str, Any]) -> None:
    """Let W&B show the runs of a sweep as one group, of the experiment's name unless another is given."""
    logger = config.get("logger")
    if isinstance(logger, dict) and logger.get("group") is None:
        logger["group"] = HydraConfig.get().runtime.choices.get("experiment") or config["data"]["name"]


def check_folders(configs: list[dict[str, Any]], here: bool) -> bool:
    """Refuse a sweep in which runs have the same folder: the first would train to its end before the next is refused.

    Returns:
        False, since each run is left to do.

    Raises:
        UserError: they have.
    """
    from ddim.errors import UserError

    folders = Counter(str(config["output_dir"]) for config in configs if not config["dry_run"])
    folder, count = max(folders.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise UserError(
            f"{count} runs of this sweep have the same folder {folder}; name them by what differs, such as "
            "'name=lr${optim.lr}'."
        )
    return False


def check_processes(trainer: "TrainerSpec") -> None:
    """Refuse a run of a sweep for which Lightning would start further processes.

    Raises:
        UserError: it would start them with the command of this one, so each would run the complete sweep again.
    """
    from ddim.distributed import launched_processes
    from ddim.errors import UserError

    started = "LOCAL_RANK" in os.environ or launched_processes().world_size > 1  # all of them, by torchrun or srun
    devices = list(trainer.devices) if isinstance(trainer.devices, tuple) else trainer.devices
    one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    if one or started or trainer.strategy.endswith(("spawn", "fork", "notebook")):
        return
    raise UserError(
        f"a sweep trains each run on one device, and trainer.devices={devices} may be more; choose "
        "trainer.devices=1, one command for each run, or torchrun."
    )


if __name__ == "__main__":
    # With the number of this process, since two sweeps may start in the same second.
    os.environ[COMPARISON] = f"outputs/compare/{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
    entry(main, "train", finish=compare_runs, plan=check_folders)
