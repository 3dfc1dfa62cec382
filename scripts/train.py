"""Train a network.

python scripts/train.py experiment=cifar10          # any file of configs/experiment, or groups and keys one by one
python scripts/train.py experiment=cifar10 ckpt_path=last        # go on where it stopped
python scripts/train.py --help
"""

from typing import Any

from _cli import entry, pick_device


def main(config: dict[str, Any]) -> None:
    """Train as `config` says and print the path of the checkpoint."""
    from ddim.config import build
    from ddim.training.run import TrainSpec, dry_run, train

    pick_device(config.get("trainer"), "accelerator")
    spec = build(TrainSpec, config, "")
    if spec.dry_run:
        print("\n".join(dry_run(spec)))
    else:
        print(f"checkpoint: {train(spec, config)}")


if __name__ == "__main__":
    entry(main, "train")
