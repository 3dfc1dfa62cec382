"""Measure what a lower precision changes: the same images in float32, TF32, bfloat16, float16 and by Winograd.

    python scripts/benchmark/precision.py outputs/train/digits/checkpoints/last.ckpt --extractor digits_classifier
    python scripts/benchmark/precision.py CHECKPOINT --extractor efficientnet --n 2000 --steps 20
    python scripts/benchmark/precision.py --table outputs/benchmark/precision.jsonl

Images 0 .. n - 1 are sampled at each precision, and n .. 2n - 1 once in float32. Pixels of images of the same number
differ by rounding. The Fréchet distance of the first set to the second shows the effect of other noise; a precision is
harmless when it changes that distance by a small part. TF32 and float16 are for GPUs.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm
import torch
from tables import precision_tables
from timing import machine, this_device

from ddim.checkpoints import load_model
from ddim.config import choose
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.feature_stats import FeatureSet, feature_set
from ddim.evaluation.features import EXTRACTORS
from ddim.evaluation.metrics import MetricSpec, compute_metrics
from ddim.inference.compute import ComputeSpec, evaluate_zeros
from ddim.inference.generate import generate
from ddim.networks import accelerate
from ddim.results.records import RecordFile

ON_ACCELERATORS, ON_CPUS = ("float32", "tf32", "bf16", "fp16"), ("float32", "bf16", "winograd")
PRECISIONS = tuple(dict.fromkeys(ON_ACCELERATORS + ON_CPUS))


def main() -> None:
    """Sample, compare, append to the record, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="of the model")
    add("--extractor", default="efficientnet", help="features of the distance, as in configs/metric")
    add("--n", type=int, default=1000, help="images of a set")
    add("--steps", type=int, default=20, help="S")
    add("--eta", type=float, default=0.0)
    add("--batch", type=int, default=250)
    add("--precisions", nargs="+", choices=PRECISIONS, metavar="NAME", help="float32 always runs")
    add("--out", type=Path, default=Path("outputs/benchmark/precision.jsonl"))
    add("--table", type=Path, metavar="RECORD", help="only print the table of a record")
    options = parser.parse_args()
    try:
        if options.table is None and options.checkpoint is None:
            raise UserError("name a checkpoint to sample from, or --table RECORD.")
        run = None if options.table else measure(options)
        records = RecordFile(options.table or options.out).read()
        print(precision_tables([record for record in records if run in (None, record["run"])]))
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(options: argparse.Namespace) -> str:
    """Write a line for each precision; return the name of the run."""
    device, n = this_device(), options.n
    choose("extractor", options.extractor, EXTRACTORS)
    metric = MetricSpec(options.extractor)
    model = load_model(options.checkpoint)
    accelerate(model.network.to(device), device)
    extractor, compute = metric.build_extractor(device), ComputeSpec(str(device), options.batch)
    sampler = SamplerSpec(S=options.steps, eta=options.eta)
    common = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), **machine(device)}
    common |= {"n": n, "S": options.steps, "eta": options.eta, "weights_hash": model.weights_hash}
    common |= {"extractor": options.extractor, "checkpoint": str(options.checkpoint)}

    def sample(first: int, precision: str) -> tuple[torch.Tensor, FeatureSet, float]:
        with at_precision(model.network, precision, device) as network:
            loaded = replace(model, network=network)
            evaluate_zeros(loaded, compute, min(n, options.batch))  # compiles
            start = time.perf_counter()
            images = generate(loaded, sampler, range(first, first + n), 0, compute)
            seconds = time.perf_counter() - start
        return images, feature_set(extractor.extract(images), extractor.layers[0]), seconds

    def distance(one: FeatureSet, other: FeatureSet) -> float:
        return next(iter(compute_metrics(one, other, metric, n).values()))

    _, other_seeds, _ = sample(n, "float32")
    exact, at_float32, seconds = sample(0, "float32")
    names = options.precisions or (ON_CPUS if device.type == "cpu" else ON_ACCELERATORS)
    for name in dict.fromkeys(("float32", *names)):
        images, features, seconds = (exact, at_float32, seconds) if name == "float32" else sample(0, name)
        difference = (images.int() - exact.int()).abs()
        numbers = {"seconds": seconds, "largest": int(difference.max()), "mean": float(difference.float().mean())}
        numbers |= {"to_fresh": distance(features, other_seeds), "to_float32": distance(features, at_float32)}
        RecordFile(options.out).append({**common, "precision": name, **numbers})
        print(f"{name}: {seconds:.1f} s", flush=True)
    return str(common["run"])


class Cast(torch.nn.Module):
    """A network under autocast, whose output is float32."""

    def __init__(self, network: torch.nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.device_type, self.dtype = network, device_type, dtype

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device_type, self.dtype):
            return self.network(x, t).float()


@contextmanager
def at_precision(network: Any, name: str, device: torch.device) -> Iterator[Any]:
    """Yield a network that computes at a precision: a copy, or the network itself with torch's switches set."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        if name == "winograd":
            network = copy.deepcopy(network)
            accelerate(network, device, winograd=True)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
        yield network if dtype is None else Cast(network, device.type, dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


if __name__ == "__main__":
    main()
