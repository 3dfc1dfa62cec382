"""Plan the paper's tables and trainings on 1, 8 and 64 GPUs: hours, dollars, what limits.

    python scripts/benchmark/scale.py outputs/benchmark/speed.jsonl    # at the rates of a record of speed.py
    python scripts/benchmark/scale.py --tflops 40                      # at an assumed rate, that of the README's hours

The arithmetic, and what it assumes, is in tables.py.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tables import plan, rates

from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.errors import UserError
from ddim.inference.auto import flops
from ddim.networks import UNetSpec, build_network
from ddim.results.records import RecordFile, provenance

N = 50_000  # images of an evaluation in Tables 1 and 3
TABLE_1 = 5 * (10 + 20 + 50 + 100 + 1000)  # network evaluations of an image: five rows
TABLE_2 = 2 * (10 + 20 + 50 + 100 + 200 + 500 + 1000)  # encoded and decoded
TABLE_3 = 2 * (10 + 20 + 50 + 100)  # two rows
WORKS: dict[str, tuple[str, dict[str, int]]] = {
    "Table 1, CIFAR-10": ("cifar10", {"evaluations": TABLE_1 * N, "jobs": 25, "images": N}),
    "Table 1, CelebA": ("celeba", {"evaluations": TABLE_1 * N, "jobs": 25, "images": N}),
    "Table 2": ("cifar10", {"evaluations": TABLE_2 * 10_000, "jobs": 0, "images": 0}),  # of the test set, no features
    "Table 3, church": ("lsun", {"evaluations": TABLE_3 * N, "jobs": 8, "images": N}),
    "Table 3, bedroom": ("lsun", {"evaluations": TABLE_3 * N, "jobs": 8, "images": N}),
    "train CIFAR-10": ("cifar10", {"steps": 800_000, "batch": 128}),
    "train CelebA": ("celeba", {"steps": 500_000, "batch": 128}),
}


def main() -> None:
    """Write a record of each work and print their table."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # any terminal can show that
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("record", nargs="?", type=Path, help="of speed.py, with sampling and training of ours")
    add("--tflops", type=float, default=40.0, help="of a GPU, without a record")
    add("--dollars", type=float, default=3.0, help="for an hour of a GPU; 3 is about the price of an H100 on demand")
    add("--out", type=Path, default=Path("outputs/benchmark/scale.jsonl"), help="the record; lines are appended")
    try:
        print(plan(write(parser.parse_args())))
    except UserError as error:
        sys.exit(f"error: {error}")


def write(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a record for each work, appended to the file."""
    if not (options.tflops > 0 and options.dollars >= 0):
        raise UserError(f"--tflops={options.tflops:g} must be above 0, and --dollars={options.dollars:g} at least 0.")
    rate = {"rate": 1e12 * options.tflops, "training_rate": 1e12 * options.tflops, "rate_from": "assumed"}
    if options.record is not None:
        records = RecordFile(options.record).read()
        if {"sampling", "training"} - {record.get("what") for record in records if record.get("peer") == "ours"}:
            raise UserError(
                f"{options.record} lacks sampling or training of ours; make it with scripts/benchmark/speed.py, "
                "or give --tflops."
            )
        rate = {**rates(records), "rate_from": f"measured, {records[0]['processor']}, {records[0]['device']}"}
    common = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), **provenance(), **rate, "dollars": options.dollars}
    plans = [{**common, "plan": name, **work, **size(PRESETS[network])} for name, (network, work) in WORKS.items()]
    for record in plans:
        RecordFile(options.out).append(record)
    return plans


def size(spec: UNetSpec) -> dict[str, int]:
    """Return the parameters of a network, and its operations for an image."""
    with torch.device("meta"):
        network = build_network("unet", spec)
    shape = (spec.channels, *spec.image_size)
    return {"parameters": sum(p.numel() for p in network.parameters()), "flops": flops(network, shape)}


if __name__ == "__main__":
    main()
