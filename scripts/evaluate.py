"""Evaluate a checkpoint: one cell, or with -m a sweep over numbers of steps and samplers.

    python scripts/evaluate.py checkpoint=PATH sampler.S=50
    python scripts/evaluate.py -m checkpoint=PATH sampler.S=10,20,50,100 sampler.eta=0.0,0.5,1.0
    python scripts/evaluate.py -m checkpoint=PATH sampler=ddim,ddpm,sigma_hat sampler.S=10,20
    python scripts/evaluate.py -m experiment=table1_cifar10 checkpoint=PATH
    python scripts/evaluate.py --help

Cells whose record is already in the output folder are not computed again.
"""

import sys
import traceback
from typing import Any

from _cli import entry, explain, pick_device
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

failures: dict[str, list[str]] = {}  # reason -> cells


def main(config: dict[str, Any]) -> dict[str, float] | None:
    """Compute one cell; in a sweep a cell that fails does not take the others down."""
    from ddim.config import build
    from ddim.evaluation.cells import EvaluateSpec, evaluate_cell, label

    config["compute"]["device"] = pick_device(config["compute"]["device"])
    name = " ".join(f"{key}={config['sampler'][key]}" for key in ("rule", "eta", "S"))
    try:
        spec = build(EvaluateSpec, config, "")
        name = label(spec.sampler)
        record, new = evaluate_cell(spec)
    except Exception as error:
        message = explain(error, "evaluate")
        if message is None:
            traceback.print_exc()
        failures.setdefault(message or repr(error), []).append(name)
        print(f"{name}: failed", flush=True)
        return None
    values = ", ".join(f"{key} {value:.4g}" for key, value in record["metrics"].items())
    seconds = f"{record['seconds_sampling']:.1f} s sampling, {record['seconds_metrics']:.1f} s metrics"
    print(f"{name}: {values} ({seconds if new else 'already in the records'})", flush=True)
    return record["metrics"]


class Report(Callback):
    """Writes and prints the table when all cells are done; configs/evaluate.yaml names it."""

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After a single cell."""
        report(config.output_dir)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """After a sweep."""
        report(config.output_dir)


def report(output_dir: str) -> None:
    """Write the tables and plots of all records in `output_dir` and print where they are."""
    from pathlib import Path

    from ddim.evaluation.cells import RECORDS
    from ddim.evaluation.records import RecordFile
    from ddim.evaluation.tables import write_report

    folder = Path(output_dir)
    records = RecordFile(folder / RECORDS).read()
    if not records:
        return
    paths = write_report(records, folder)
    print(f"\n{paths[0].read_text()}")
    grids = sorted({r["grid"] for r in records if "grid" in r})
    for path in [*paths, *[folder / grid for grid in grids[-1:]]]:
        print(path)


if __name__ == "__main__":
    entry(main, "evaluate")
    if failures:
        for reason, cells in failures.items():
            print(
                f"error: {reason} ({len(cells)} cells: {'; '.join(cells)})" if cells[1:] else f"error: {reason}",
                file=sys.stderr,
            )
        sys.exit(2)
