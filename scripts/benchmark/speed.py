"""Time sampling and training of our code, the official implementation, diffusers and denoising-diffusion-pytorch.

    python scripts/benchmark/speed.py --official PATH
    python scripts/benchmark/speed.py --parts sampling --batch 4 16
    python scripts/benchmark/speed.py --network tiny --minutes 1                       # to try the command
    python scripts/benchmark/speed.py --table outputs/benchmark/speed.jsonl            # the tables of a record

PATH is a checkout of ermongroup/ddim. All have the same network, that of CIFAR-10 with 35.7 M parameters by default, on
the accelerator if there is one. First the outputs on the same weights are compared. Rounds are interleaved: each times
every variant once. A setting is `default`, `auto` (what our commands choose), `best`, or words of bf16, channels_last,
compile, graphs, winograd, and for each kind of its C++ loops alone convolutions and norms (these three and auto are
ours only), joined by +. `best` is bf16+channels_last+compile where bf16 is faster than float32 here, elsewhere
channels_last+compile, and for ours channels_last+winograd. On CPUs all keep the memory that they free, as our commands
do.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm
import torch
from baselines import BASELINES, Baseline, random_weights
from tables import report
from timing import Build, interleave, machine, matmul, resolve, this_device, words
from torch import nn

from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.config import choose
from ddim.errors import UserError
from ddim.inference.auto import flops
from ddim.networks import UNetSpec
from ddim.results.records import RecordFile

TINY = UNetSpec((8, 8), ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
PARTS = ("sampling", "training")
SMALL = UNetSpec((32, 32), ch=32, num_groups=16, dropout=0.0)  # experiment=cifar10_small
DIGITS = UNetSpec((8, 8), 1, 32, (1, 1), 1, (4,), 0.0, 8)  # the quickstart's
NETWORKS = {"cifar10": PRESETS["cifar10"], "small": SMALL, "digits": DIGITS, "tiny": TINY}


def main() -> None:
    """Measure, append to the record, and print its tables."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # any terminal can show that
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_cpu = parser.add_argument, this_device().type == "cpu"
    add("--official", metavar="PATH", help="checkout of ermongroup/ddim")
    add("--baselines", nargs="+", default=list(BASELINES), metavar="NAME", help=", ".join(BASELINES))
    add("--settings", nargs="+", default=["default", "best"], metavar="NAME")
    add("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    add("--batch", nargs="+", type=int, default=[4] if on_cpu else [500, 64], help="batch sizes of sampling")
    add("--train-batch", type=int, default=8 if on_cpu else 128, help="images in a training step")
    add("--steps", type=int, default=10, help="S, the steps of sampling; divides 1000")
    add("--rounds", type=int, default=5, help="at most; fewer when the time is up")
    add("--minutes", type=float, default=9.0, help="for everything")
    add("--network", choices=NETWORKS, default="cifar10")
    add("--processor-time", action="store_true", help="of one thread: for a machine that others use at the same time")
    add("--out", type=Path, default=Path("outputs/benchmark/speed.jsonl"), help="the record; lines are appended")
    add("--table", type=Path, metavar="RECORD", help="only print the tables of a record")
    options = parser.parse_args()
    try:
        run = None if options.table else Benchmark(options).run()
        path = options.table or options.out
        records = [record for record in RecordFile(path).read() if run in (None, record["run"])]
        if not records:
            raise UserError(f"{path} holds no records; make them with scripts/benchmark/speed.py --out {path}.")
        print(f"\n{report(records)}\n\n{path}")
    except UserError as error:
        sys.exit(f"error: {error}")


def output_difference(name: str, code: Baseline, network: nn.Module) -> float:
    """Return the largest difference of its output to ours on the same weights, relative to our largest value.

    Raises:
        UserError: a difference above 1e-4.
    """
    x, t = torch.randn(2, *code.image_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with torch.no_grad():
        ours, output = Baseline.network(code).eval()(x, t), network(x, t)
    difference = float((output - ours).abs().max() / ours.abs().max())
    if not difference <= 1e-4:  # nor NaN
        raise UserError(f"{name} has another output than ours on the same weights ({difference:.1e} of its range).")
    return difference


class Benchmark:
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, this_device()
        if options.processor_time:
            torch.set_num_threads(1)
            time.perf_counter = time.process_time
        clock = "processor" if options.processor_time else "wall"
        self.common = {**machine(self.device), "network": options.network, "clock": clock}
        self.baselines: dict[str, Baseline] = {}

    def run(self) -> str:
        """Measure; return the name of the run, which all of its lines in the record have."""
        options, end = self.options, time.monotonic() + 60 * self.options.minutes
        for setting in set(options.settings) - {"best"}:
            words(setting)
        codes = {name: choose("baseline", name, BASELINES) for name in options.baselines}
        network = NETWORKS[options.network]
        weights = random_weights(network)
        for name, code in codes.items():
            self.compare(name, code(network, weights, options.official))
        bf16_is_faster = self.measure_ceiling()
        variants = [
            (name, code, resolve(setting, name == "ours", bf16_is_faster))
            for setting in options.settings
            for name, code in self.baselines.items()
        ]
        batches = {"sampling": options.batch, "training": [options.train_batch]}
        jobs = [(part, batch) for part in options.parts for batch in batches[part]]
        for i, (part, batch) in enumerate(jobs):
            minutes = (end - time.monotonic()) / 60 / (len(jobs) - i)
            print(f"\n{part}, {batch} images at once: {minutes:.1f} minutes", flush=True)
            S = {"S": options.steps} if part == "sampling" else {}
            builds: dict[str, Build] = {
                f"{name} {setting}": partial(code.sampler if S else code.trainer, setting, self.device, batch, **S)
                for name, code, setting in variants
            }
            self.time(part, builds, minutes, batch=batch, **S)
        return str(self.common["run"])

    def write(self, what: str, **fields: Any) -> None:
        """Append a line to the record."""
        RecordFile(self.options.out).append({**self.common, "what": what, **fields})
        if what == "missing":
            print(f"{fields['peer']} is left out: {fields['reason']}", flush=True)

    def time(self, what: str, variants: dict[str, Build], minutes: float, **fields: Any) -> dict[str, list[float]]:
        """Time variants named "NAME SETTING", write a line for each, and return their seconds."""
        timings, missing = interleave(variants, self.options.rounds, minutes)
        for name, seconds in timings.items():
            peer, setting = name.rsplit(" ", 1)
            self.write(what, peer=peer, setting=setting, seconds=seconds, **fields)
        for name, reason in missing.items():
            self.write("missing", peer=name, reason=f"{what}: {reason}")
        return timings

    def compare(self, name: str, code: Baseline) -> None:
        """Take a code base into the benchmark if it is here; write its network, and how far its output is from ours."""
        if name == "official" and self.options.official is None:
            return self.write("missing", peer=name, reason="give --official PATH of a checkout of ermongroup/ddim")
        try:
            network = code.network().eval()
        except Exception as error:  # another package, perhaps beside versions that it does not know
            if name == "ours" or isinstance(error, UserError):
                raise
            return self.write("missing", peer=name, reason=f"cannot be used here ({error})")
        apart = output_difference(name, code, network) if code.same_network else None
        print(f"{name}: difference of its output to ours on the same weights: {apart}", flush=True)
        size = {"parameters": sum(p.numel() for p in network.parameters()), "flops": flops(network, code.image_shape)}
        self.write("peer", peer=name, apart=apart, **size)
        self.baselines[name] = code

    def measure_ceiling(self) -> bool:
        """Measure what the device can multiply; return whether it is faster in bf16, which decides what `best` is."""
        size, bf16_size = (1024, 512) if self.device.type == "cpu" else (8192, 8192)
        products: dict[str, Build] = {
            "matmul float32": partial(matmul, self.device, torch.float32, size),
            "matmul bf16": partial(matmul, self.device, torch.bfloat16, bf16_size),
        }
        float32, bf16 = (min(seconds) for seconds in self.time("ceiling", products, 1.0).values())
        return bf16 < float32


if __name__ == "__main__":
    main()
