"""Measure what a lower precision costs: the same images in float32, TF32, bfloat16 and float16, side by side.

    python scripts/precision.py outputs/train/digits/checkpoints/last.ckpt --extractor digits_classifier --n 1000
    python scripts/precision.py CHECKPOINT --extractor efficientnet --n 2000 --steps 20
    python scripts/precision.py --table outputs/benchmark/precision.jsonl

Images 0 .. n - 1 are sampled at each precision, and n .. 2n - 1 once more in float32. Between images of the same number
the difference of the pixels is rounding. The Fréchet distance of the first set to the second, a distance between two
sets of one model, is what other noise does; a precision is harmless when it moves that distance by much less than
it is. TF32 and float16 are for GPUs.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm

ON_ACCELERATORS = ("float32", "tf32", "bf16", "fp16")
ON_CPUS = ("float32", "bf16", "winograd")
PRECISIONS = tuple(dict.fromkeys(ON_ACCELERATORS + ON_CPUS))


def main() -> None:
    """Sample, compare, append the record, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="of the model")
    parser.add_argument("--extractor", default="efficientnet", help="features of the distance, as in configs/metric")
    parser.add_argument("--n", type=int, default=1000, help="images of a set")
    parser.add_argument("--steps", type=int, default=20, help="S")
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, metavar="NAME", help="float32 always runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark/precision.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RECORD", help="only print the table of a record")
    options = parser.parse_args()
    from ddim.errors import UserError
    from ddim.results.records import RecordFile

    try:
        if options.table is None and options.checkpoint is None:
            raise UserError("name a checkpoint to sample from, or --table RECORD.")
        run = None if options.table else measure(options)
        file = RecordFile(options.table or options.out)
        print(table([record for record in file.read() if run in (None, record["run"])]))
    except UserError as error:
        sys.exit(f"error: {error}")


def measure(options: argparse.Namespace) -> str:
    """Write a line for each precision; return the name of the run."""
    import torch
    from _benchmark import machine, this_device

    from ddim.checkpoints import load_model
    from ddim.config import choose
    from ddim.diffusion.spec import SamplerSpec
    from ddim.evaluation.feature_stats import FeatureSet, feature_set
    from ddim.evaluation.metrics import EXTRACTORS, FeatureExtractor, MetricSpec, compute_metrics
    from ddim.inference.compute import ComputeSpec, evaluate_zeros
    from ddim.inference.generate import generate
    from ddim.networks import tune_network
    from ddim.results.records import RecordFile

    device = this_device()
    choose("extractor", options.extractor, EXTRACTORS)
    metric: Any = MetricSpec(options.extractor)
    model = load_model(options.checkpoint)
    tune_network(model.network.to(device), device)
    extractor = FeatureExtractor(metric, device)
    sampler = SamplerSpec(S=options.steps, eta=options.eta)
    file, n = RecordFile(options.out), options.n
    common = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), **machine(device)}
    common |= {"n": n, "S": options.steps, "eta": options.eta, "weights_hash": model.weights_hash}
    common |= {"extractor": options.extractor, "checkpoint": str(options.checkpoint)}

    def sample(first: int, name: str) -> Any:
        compute = ComputeSpec(str(device), options.batch)
        with at_precision(model.network, name, device) as network:
            at = replace(model, network=network)
            evaluate_zeros(at, compute, min(n, options.batch))  # compiles
            start = time.perf_counter()
            images = generate(at, sampler, range(first, first + n), 0, compute)
            return images, time.perf_counter() - start

    def features(images: Any) -> FeatureSet:
        return feature_set(extractor.extract(images), extractor.layers[0])

    def distance(one: FeatureSet, other: FeatureSet) -> float:
        return next(iter(compute_metrics(one, other, metric, n).values()))

    fresh = features(sample(n, "float32")[0])
    names = options.precisions or (ON_CPUS if device.type == "cpu" else ON_ACCELERATORS)
    exact: Any = None
    at_float32: Any = None
    for name in dict.fromkeys(("float32", *names)):
        images, seconds = sample(0, name)
        measured = features(images)
        if exact is None:
            exact, at_float32 = images, measured
        apart = (images.int() - exact.int()).abs()
        numbers = {"seconds": seconds, "largest": int(apart.max()), "mean": float(apart.float().mean())}
        numbers |= {"to_fresh": distance(measured, fresh), "to_float32": distance(measured, at_float32)}
        file.append({**common, "precision": name, **numbers})
        print(f"{name}: {seconds:.1f} s", flush=True)
    assert torch.isfinite(exact.float()).all()
    return str(common["run"])


@contextmanager
def at_precision(network: Any, name: str, device: Any) -> Iterator[Any]:
    """Give a network that computes at a precision: a copy, or the network itself with torch's switch turned."""
    import copy

    import torch

    from ddim.networks import tune_network

    class Cast(torch.nn.Module):
        """A network under autocast."""

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            """Return float32, as the network does without it."""
            with torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[name]):
                return network(x, t).float()

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        if name == "winograd":
            network = copy.deepcopy(network)
            tune_network(network, device, winograd=True)
        yield Cast() if name in ("bf16", "fp16") else network
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def table(records: list[dict[str, Any]]) -> str:
    """Return Markdown; differences of pixels in 0 .. 255, the effect on the distance relative to seed noise."""
    lines = []
    for r in records:
        if r["precision"] == "float32":
            base = r
            lines += [
                f"\n{r['n']:,} images, S={r['S']}, η={r['eta']}, {r['extractor']}, weights {r['weights_hash'][:8]}, "
                f"{r['device']}, code {r['revision']}:\n",
                "| precision | seconds | largest difference | mean difference | distance to float32 | to other seeds | "
                "moved by, of it |",
                "|---|---|---|---|---|---|---|",
            ]
        moved = abs(r["to_fresh"] - base["to_fresh"]) / base["to_fresh"]
        lines.append(
            f"| {r['precision']} | {r['seconds']:.1f} | {r['largest']} | {r['mean']:.4f} | {r['to_float32']:.2e} | "
            f"{r['to_fresh']:.4f} | {moved:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
