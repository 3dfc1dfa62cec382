"""Evaluate a checkpoint: one cell, or with -m a sweep over numbers of steps and samplers.

    python scripts/evaluate.py checkpoint=PATH sampler.S=50
    python scripts/evaluate.py -m checkpoint=PATH sampler.S=10,20,50,100 sampler.eta=0.0,0.5,1.0
    python scripts/evaluate.py -m checkpoint=PATH sampler=ddim,ddpm,sigma_hat sampler.S=10,20
    python scripts/evaluate.py -m experiment=table1_cifar10 checkpoint=PATH
    python scripts/evaluate.py --help

Cells whose record is already in the output folder are not computed again.
"""

from pathlib import Path
from typing import Any

from _cli import entry, pick_device

folders: set[Path] = set()  # that got a record


def main(config: dict[str, Any]) -> dict[str, float]:
    """Compute one cell and print its numbers."""
    from ddim.config import build
    from ddim.evaluation.cells import EvaluateSpec, evaluate_cell, label

    pick_device(config.get("compute"), "device")
    spec = build(EvaluateSpec, config, "")
    name = label(spec.sampler)
    try:
        record, new = evaluate_cell(spec)
    except Exception:
        print(f"{name}: failed", flush=True)
        raise
    values = ", ".join(f"{key} {value:.4g}" for key, value in record["metrics"].items())
    seconds = f"{record['seconds_sampling']:.1f} s sampling, {record['seconds_metrics']:.1f} s metrics"
    print(f"{name}: {values} ({seconds if new else 'already in the records'})", flush=True)
    folders.add(Path(spec.output_dir))
    return record["metrics"]


def report() -> None:
    """Write the tables and plots of all records in each folder and print where they are."""
    if not folders:
        return
    from ddim.evaluation.cells import RECORDS
    from ddim.evaluation.records import RecordFile
    from ddim.evaluation.tables import write_report

    for folder in sorted(folders):
        records = RecordFile(folder / RECORDS).read()
        paths = write_report(records, folder)
        print(f"\n{paths[0].read_text()}")
        grids = sorted({r["grid"] for r in records if "grid" in r})
        for path in [*paths, *[folder / grid for grid in grids[-1:]]]:
            print(path)


if __name__ == "__main__":
    entry(main, "evaluate", finish=report)
