"""Measure images that exist already: a folder, or the samples of another code base, against a reference set.

    python scripts/metrics.py images=FOLDER data=cifar10
    python scripts/metrics.py images=samples.npz reference=FOLDER metric=efficientnet 'metric.metrics=[fd,kd,is,prc]'
    python scripts/metrics.py reference=FOLDER out=statistics.npz
    python scripts/metrics.py --help

A comparison whose record is already in the output folder is not computed again; an interrupted one continues.
"""

from typing import Any

from _cli import entry, pick_device
from _sweep import Sweep, current_session

sweep = Sweep("ddim.evaluation.image_sets", "MetricsSpec")


def main(config: dict[str, Any]) -> None:
    """Measure the images, or write the statistics of the reference, as `config` says."""
    pick_device(config, "device")
    if config.get("out") is None:
        sweep.run(config)
        return
    from ddim.evaluation.image_sets import write_statistics

    session = current_session()
    path = write_statistics(sweep.build(config), session)
    if session.processes.is_main:
        print(path)


if __name__ == "__main__":
    entry(main, "metrics", finish=sweep.report)
