"""Time sampling and training of our code, the official implementation, diffusers and denoising-diffusion-pytorch.

    python scripts/benchmark/speed.py --official PATH
    python scripts/benchmark/speed.py --official PATH --parts sampling --batch 4 16 --settings default best
    python scripts/benchmark/speed.py --network tiny --minutes 1                       # to try the command
    python scripts/benchmark/speed.py --table outputs/benchmark/speed.jsonl            # the tables of a record

PATH is a checkout of ermongroup/ddim. All have the CIFAR-10 network of 35.7 M parameters, on the accelerator if there
is one. First the outputs on the same weights are compared. Rounds are interleaved: each times every variant once. A
setting is `default`, `best`, or words of bf16, channels_last, compile, graphs and winograd (ours only) joined by +;
`best` is bf16+channels_last+compile where bf16 is faster than float32 here, elsewhere channels_last+compile, and for
ours channels_last+winograd. On CPUs all keep the memory that they free, as our commands do.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm
import torch
from baselines import BASELINES, Baseline, random_weights
from tables import report
from timing import Build, Variant, autocast, flops, interleave, machine, matmul, repeated, resolve, this_device, words
from torch.profiler import profile

from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.config import choose
from ddim.diffusion.noise import initial_noise, step_noise
from ddim.diffusion.prediction import x0_and_eps
from ddim.diffusion.rules import DDIM
from ddim.diffusion.sampling import step
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.features import FeatureExtractor
from ddim.inference.generate import generate, to_pixels
from ddim.networks import UNetSpec
from ddim.results.records import RecordFile

TINY = UNetSpec((8, 8), ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,))
NETWORKS = {"cifar10": PRESETS["cifar10"], "tiny": TINY}
PARTS = {"sampling": 4.0, "training": 4.0, "scaling": 1.0, "steps": 1.0, "profile": 1.0}  # shares of the time


def main() -> None:
    """Measure, append to the record, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_cpu = parser.add_argument, this_device().type == "cpu"
    add("--official", metavar="PATH", help="checkout of ermongroup/ddim")
    add("--baselines", nargs="+", default=list(BASELINES), metavar="NAME", help=", ".join(BASELINES))
    add("--settings", nargs="+", default=["default", "best"], metavar="NAME")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    add("--batch", nargs="+", type=int, default=[4] if on_cpu else [500, 64], help="batch sizes of sampling")
    add("--train-batch", type=int, default=8 if on_cpu else 128, help="images in a training step")
    add("--steps", type=int, default=10, help="S, the steps of sampling; divides 1000")
    add("--rounds", type=int, default=5, help="at most; fewer when the time is up")
    add("--minutes", type=float, default=9.0, help="for everything")
    add("--network", choices=NETWORKS, default="cifar10")
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


def output_difference(name: str, code: Baseline) -> float | None:
    """Return the largest difference of its output to ours on the same weights, relative to our largest value.

    None for a code base with another network.

    Raises:
        UserError: a difference above 1e-4.
    """
    if not code.same_network:
        return None
    x, t = torch.randn(2, *code.image_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with torch.no_grad():
        ours, output = (network.eval()(x, t) for network in (Baseline.network(code), code.network()))
    difference = float((output - ours).abs().max() / ours.abs().max())
    if not difference <= 1e-4:  # nor NaN
        raise UserError(f"{name} has another output than ours on the same weights ({difference:.1e} of its range).")
    return difference


class Benchmark:
    """One run of the benchmark: `run`, and a method for each of PARTS, which take minutes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.bf16_is_faster = options, this_device(), False
        self.common = {**machine(self.device), "network": options.network}
        self.baselines: dict[str, Baseline] = {}

    def run(self) -> str:
        """Measure the parts; return the name of the run, which all of its lines in the record have."""
        end = time.monotonic() + 60 * self.options.minutes
        for setting in set(self.options.settings) - {"best"}:
            words(setting)
        codes = {name: choose("baseline", name, BASELINES) for name in self.options.baselines}
        network = NETWORKS[self.options.network]
        weights = random_weights(network)
        for name, code in codes.items():
            self.compare(name, code(network, weights, self.options.official))
        self.measure_ceiling()
        for i, part in enumerate(self.options.parts):
            minutes = (end - time.monotonic()) / 60 * PARTS[part] / sum(PARTS[p] for p in self.options.parts[i:])
            print(f"\n{part}: {minutes:.1f} minutes", flush=True)
            try:
                if minutes <= 0:
                    raise UserError(f"no time left of {self.options.minutes:g} minutes")
                getattr(self, part)(minutes)
            except UserError as error:  # such as a setting that this device does not have
                self.write("missing", peer=part, reason=str(error))
        return str(self.common["run"])

    def write(self, what: str, **fields: Any) -> None:
        """Append a line to the record."""
        RecordFile(self.options.out).append({**self.common, "what": what, **fields})
        if what == "missing":
            print(f"{fields['peer']} is left out: {fields['reason']}", flush=True)

    def time(self, what: str, variants: Mapping[str, Build], minutes: float, **fields: Any) -> dict[str, Any]:
        """Time variants named "NAME SETTING", and write a line for each."""
        timings, missing = interleave(variants, self.options.rounds, minutes)
        for name, timing in timings.items():
            peer, setting = name.rsplit(" ", 1)
            self.write(what, peer=peer, setting=setting, **timing, **fields)
        for name, reason in missing.items():
            self.write("missing", peer=name, reason=f"{what}: {reason}")
        return timings

    def compare(self, name: str, code: Baseline) -> None:
        """Take a code base into the benchmark if it is here; write its network, and how far its output is from ours."""
        if name == "official" and self.options.official is None:
            return self.write("missing", peer=name, reason="give --official PATH of a checkout of ermongroup/ddim")
        try:
            network = code.network().eval()
        except ImportError as error:
            return self.write("missing", peer=name, reason=f"not installed ({error})")
        apart = output_difference(name, code)
        print(f"{name}: difference of its output to ours on the same weights: {apart}", flush=True)
        size = {"parameters": sum(p.numel() for p in network.parameters()), "flops": flops(network, code.image_shape)}
        self.write("peer", peer=name, about=code.about, apart=apart, **size)
        self.baselines[name] = code

    def measure_ceiling(self) -> None:
        """Measure what the device can multiply, which decides what `best` is."""
        sizes = {"float32": 1024, "bf16": 512} if self.device.type == "cpu" else {"float32": 8192, "bf16": 8192}
        dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
        products = {f"matmul {k}": partial(matmul, self.device, dtypes[k], sizes[k]) for k in sizes}
        float32, bf16 = (min(timing["seconds"]) for timing in self.time("ceiling", products, 1.0).values())
        self.bf16_is_faster = bf16 < float32

    def ours(self) -> tuple[Any, str, int]:
        """Return our code, its last setting, and the first batch size of sampling."""
        if "ours" not in self.baselines:
            raise UserError("scaling, steps and profile measure ours; add it to --baselines.")
        setting = resolve(self.options.settings[-1], True, self.bf16_is_faster)
        return self.baselines["ours"], setting, self.options.batch[0]

    def variants(self, build: Any) -> Mapping[str, Build]:
        """Return a variant for each setting of each code base: build(code, setting, device)."""
        variants = {}
        for setting in self.options.settings:
            for name, code in self.baselines.items():
                resolved = resolve(setting, name == "ours", self.bf16_is_faster)
                variants[f"{name} {resolved}"] = partial(build, code, resolved, self.device)
        return variants

    def sampling(self, minutes: float) -> None:
        """Time S steps from noise to pixels in the host's memory."""
        S = self.options.steps
        for batch in self.options.batch:
            variants = self.variants(lambda code, *on, batch=batch: code.sampler(*on, batch, S))
            self.time("sampling", variants, minutes / len(self.options.batch), batch=batch, S=S)

    def training(self, minutes: float) -> None:
        """Time a training step."""
        batch = self.options.train_batch
        self.time("training", self.variants(lambda code, *on: code.trainer(*on, batch)), minutes, batch=batch)

    def scaling(self, minutes: float) -> None:
        """Time our sampling over the number of steps, and over the number of images at one batch size."""
        ours, setting, batch = self.ours()
        model, compute = ours.loaded(setting, self.device, batch)

        def build(n: int, S: int) -> Variant:
            sampler = SamplerSpec(S=S, spacing="uniform")
            return repeated(lambda: generate(model, sampler, range(n), 0, compute))

        points = [(batch, S) for S in (1, 2, 5, 10)] + [(batches * batch, 2) for batches in (2, 3, 4)]
        variants = {f"n={n},S={S} {setting}": partial(build, n, S) for n, S in points}
        self.time("scaling", variants, minutes, batch=batch)

    def steps(self, minutes: float) -> None:
        """Time the pieces of one stochastic step, the copy of pixels to the host, and their features."""
        (ours, setting, batch), device = self.ours(), self.device
        x, indices = initial_noise(range(batch), ours.image_shape, 0, device=device), torch.arange(batch, device=device)
        model, t = ours.loaded(setting, device, batch)[0], torch.full((batch,), 500, device=device)
        calls: dict[str, Any] = {
            "network": torch.inference_mode()(autocast(setting, device)(lambda: model(x, t))),
            "arithmetic": lambda: step(DDIM(1.0), *x0_and_eps("eps", "none", x, x, 0.08), 0.08, 0.19, x),
            "noise": lambda: step_noise(indices, ours.image_shape, 0, 1),
            "copy": lambda: to_pixels(x),
        }
        variants: dict[str, Build] = {f"{name} {setting}": partial(repeated, call) for name, call in calls.items()}
        variants[f"features {setting}"] = lambda: repeated(
            partial(FeatureExtractor("efficientnet", device, batch_size=batch).extract, to_pixels(x))
        )
        self.time("step", variants, minutes, batch=batch)

    def profile(self, minutes: float) -> None:
        """Write the ten operations that take most of an evaluation's time."""
        (ours, setting, batch), device = self.ours(), self.device
        kind = f"self_{'cpu' if device.type == 'cpu' else 'device'}_time_total"
        x, t = initial_noise(range(batch), ours.image_shape, 0, device=device), torch.full((batch,), 500, device=device)
        model, _ = ours.loaded(setting, device, batch)
        with torch.inference_mode(), autocast(setting, device):
            model(x, t)
            with profile() as profiler:
                model(x, t)
        times = {event: getattr(event, kind) for event in profiler.key_averages()}
        top = sorted(times, key=lambda event: times[event], reverse=True)[:10]
        rows = [[event.key, event.count, times[event] / sum(times.values())] for event in top]
        self.write("profile", peer="ours", setting=setting, batch=batch, rows=rows)


if __name__ == "__main__":
    main()
