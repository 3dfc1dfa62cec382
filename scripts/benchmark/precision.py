"""Measure what a lower precision changes: the same images in float32, TF32, bfloat16 and by Winograd's algorithm.

    python scripts/benchmark/precision.py outputs/train/digits/checkpoints/last.ckpt --extractor digits_classifier
    python scripts/benchmark/precision.py CHECKPOINT --extractor efficientnet --n 2000 --steps 20

Images 0 .. n - 1 are sampled at each precision, and n .. 2n - 1 once in float32. Pixels of images of the same number
differ by rounding. The Fréchet distance of the first set to the second shows the effect of other noise; a precision is
harmless when it changes that distance by a small part. TF32 is for GPUs, Winograd's algorithm for CPUs.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm
import torch
from tables import precision_tables
from timing import clock, machine, this_device

from ddim.checkpoints import load_model
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.feature_stats import FeatureSet, feature_set
from ddim.evaluation.metrics import MetricSpec, compute_metrics
from ddim.inference.compute import ComputeSpec, evaluate_zeros, prepare_model
from ddim.inference.generate import generate
from ddim.results.records import RecordFile


def main() -> None:
    """Sample, compare, append to the record, print its table."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # any terminal can show that
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="of the model")
    add("--extractor", default="efficientnet", help="features of the distance, as in configs/metric")
    add("--n", type=int, default=1000, help="images of a set")
    add("--steps", type=int, default=20, help="S")
    add("--batch", type=int, default=250)
    add("--out", type=Path, default=Path("outputs/benchmark/precision.jsonl"), help="the record; lines are appended")
    try:
        print(precision_tables(measure(parser.parse_args())))
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a record for each precision, appended to the file."""
    device, n, metric, S = this_device(), options.n, MetricSpec(options.extractor), options.steps
    extractor, weights_hash = metric.build_extractor(device), load_model(options.checkpoint).weights_hash
    common = {**machine(device), "n": n, "S": S, "eta": 0.0, "weights_hash": weights_hash}
    common |= {"extractor": options.extractor, "checkpoint": str(options.checkpoint)}

    def sample(first: int, precision: str) -> tuple[torch.Tensor, FeatureSet, float]:
        setting = {} if precision == "float32" else {precision: True}
        compute, model = ComputeSpec(str(device), options.batch, **setting), load_model(options.checkpoint)
        prepare_model(model, compute)
        evaluate_zeros(model, compute, min(n, options.batch))  # compiles
        start = clock()
        images = generate(model, SamplerSpec(S=S), range(first, first + n), 0, compute)
        seconds = clock() - start
        return images, feature_set(extractor.extract(images), extractor.layers[0]), seconds

    def distance(one: FeatureSet, other: FeatureSet) -> float:
        return next(iter(compute_metrics(one, other, metric, n).values()))

    _, other_seeds, _ = sample(n, "float32")
    records: list[dict[str, Any]] = []
    for name in ("float32", "bf16", "winograd") if device.type == "cpu" else ("float32", "tf32", "bf16"):
        images, features, seconds = sample(0, name)
        if not records:
            exact, at_float32 = images, features
        difference = (images.int() - exact.int()).abs()
        numbers = {"seconds": seconds, "largest": int(difference.max()), "mean": float(difference.float().mean())}
        numbers |= {"to_fresh": distance(features, other_seeds), "to_float32": distance(features, at_float32)}
        records.append({**common, "precision": name, **numbers})
        RecordFile(options.out).append(records[-1])
        print(f"{name}: {seconds:.1f} s", flush=True)
    return records


if __name__ == "__main__":
    main()
