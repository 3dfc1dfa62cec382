"""Time a training step: through Lightning against the same step in a plain loop, and each option for speed by itself.

    python scripts/benchmark_training.py
    python scripts/benchmark_training.py --batch 128 --steps 20 --rounds 5 --compile
    python scripts/benchmark_training.py --only Lightning --rounds 20            # and the plain loop
    python scripts/benchmark_training.py --only "*Adam*"

The full CIFAR-10 U-Net on random images, on the accelerator if there is one. Rounds are interleaved: each of them times
every variant once, so that a machine that gets slower meanwhile slows all of them down. Each variant is compared with
its base of the same round. Every call appends a record for each variant to OUT/records.jsonl.
"""

import argparse
import fnmatch
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _benchmark import synchronise, this_device
from _cli import silence
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddim.data.batches import MicroBatches, finish
from ddim.data.datamodule import ImageDataModule
from ddim.data.datasets import DataSpec
from ddim.data.images import MemoryImages
from ddim.diffusion.objective import TIME_SAMPLERS, per_sample_loss, training_noise
from ddim.results.records import RecordFile, provenance
from ddim.training.callbacks import DivergenceGuard, Progress
from ddim.training.dry_run import Stopwatch
from ddim.training.ema import EMA
from ddim.training.run import build_module, build_trainer
from ddim.training.spec import TrainerSpec, TrainSpec

WARM_UP = 2  # steps that are not timed
NETWORK = {"name": "unet", "image_size": [32, 32], "channels": 3, "ch_mult": [1, 2, 2, 2], "dropout": 0.1}
PLAIN, LIGHTNING = "plain loop", "Lightning"
ADAM: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
}

Clock = Callable[[], float]


class Variant(NamedTuple):
    """What is timed, and the name of what it is compared with."""

    base: str
    seconds: Callable[[], float]


def main() -> None:
    """Time everything, print a table, and keep the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images in a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each variant in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile, which takes minutes to begin")
    parser.add_argument(
        "--processor", action="store_true", help="count processor time: for a CPU with other work to do"
    )
    parser.add_argument("--only", default="*", help="a pattern of names; what they are compared with is timed as well")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"))
    arguments = parser.parse_args()
    silence()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = this_device()
    common = provenance() | {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "clock": "processor" if arguments.processor else "wall",
    }
    base = TrainerSpec(
        max_steps=WARM_UP + arguments.steps, batch_size=arguments.batch, accelerator=device.type, devices=1
    )
    clock = time.process_time if arguments.processor else time.perf_counter
    every = variants(base, device, clock, arguments.compile)
    wanted = set(fnmatch.filter(every, arguments.only))
    wanted |= {every[name].base for name in wanted} | {PLAIN}
    seconds: dict[str, list[float]] = {name: [] for name in every if name in wanted}
    for number in range(arguments.rounds):
        for name in seconds:
            seconds[name].append(every[name].seconds())
            print(f"round {number + 1}: {name}: {seconds[name][-1]:.4f} s a step", flush=True)
    records = RecordFile(arguments.out / "records.jsonl")
    for name, values in seconds.items():
        settings = {"batch": arguments.batch, "steps": arguments.steps, "base": every[name].base}
        times = {"seconds": values, "base_seconds": seconds[every[name].base]}
        record = common | settings | {"variant": name} | times
        records.append(record)
        ratio = statistics.median(v / b for v, b in zip(values, record["base_seconds"], strict=True))
        print(f"{name}: {statistics.median(values):.4f} s, {ratio:.3f} of {record['base']}")
    print(f"\n{records.path}")


def variants(trainer: TrainerSpec, device: torch.device, clock: Clock, compiled: bool) -> dict[str, Variant]:
    """Return what can be timed, by name."""
    images = MemoryImages("random", torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8))

    def lightning(device_resident: bool | None = None, **options: Any) -> Variant:
        spec = train_spec(replace(trainer, **options))
        plainest = not options and device_resident is None
        return Variant(
            PLAIN if plainest else LIGHTNING, partial(through_lightning, spec, images, clock, device_resident)
        )

    def plain(**options: Any) -> Variant:
        return Variant(PLAIN, partial(plain_loop, train_spec(trainer), images, device, clock, **options))

    bf16: dict[str, Any] = {"precision": "bf16-mixed"}
    all_of_them = {
        PLAIN: plain(),
        LIGHTNING: lightning(),
        f"{PLAIN}, Adam tensor by tensor": plain(adam="single"),
        f"{PLAIN}, Adam with foreach": plain(adam="foreach"),
        f"{PLAIN}, average tensor by tensor": plain(foreach_average=False),
        f"{PLAIN}, attention without a kernel of its own": plain(attention=SDPBackend.MATH),
        f"{LIGHTNING}, images not on the device": lightning(device_resident=False),
        f"{LIGHTNING}, channels_last": lightning(channels_last=True),
        f"{LIGHTNING}, bf16": lightning(**bf16),
        f"{LIGHTNING}, bf16 and channels_last": lightning(**bf16, channels_last=True),
        f"{LIGHTNING}, compiled": lightning(compile=True),
        f"{LIGHTNING}, bf16 and channels_last, compiled": lightning(**bf16, channels_last=True, compile=True),
    }
    return {name: variant for name, variant in all_of_them.items() if compiled or "compiled" not in name}


def train_spec(trainer: TrainerSpec) -> TrainSpec:
    """Return the spec of the CIFAR-10 training."""
    data = DataSpec(name="cifar10", size=(32, 32), channels=3)
    return TrainSpec("benchmark", "outputs/benchmark", data, NETWORK, trainer=trainer)


def through_lightning(
    spec: TrainSpec, images: MemoryImages, clock: Clock, device_resident: bool | None = None
) -> float:
    """Return seconds for a step as `scripts/train.py` does it, without checkpoints and grids."""
    t = spec.trainer
    torch.compiler.reset()  # else a later round has used up the recompilations that torch allows
    assert spec.ema is not None
    stopwatch = Stopwatch(WARM_UP, clock)
    callbacks = [
        EMA(spec.ema),
        Progress(t.batch_size, t.log_every),
        DivergenceGuard(t.log_every, t.max_skipped),
        stopwatch,
    ]
    trainer = build_trainer(spec, Path(spec.output_dir), callbacks, loggers=[], max_steps=t.max_steps)
    data = ImageDataModule(images, t.batch_size, spec.seed, t.max_steps, flip=True, device_resident=device_resident)
    trainer.fit(build_module(spec, spec.model_spec()), data)
    return stopwatch.seconds_per_step


def plain_loop(
    spec: TrainSpec,
    images: MemoryImages,
    device: torch.device,
    clock: Clock,
    adam: str = "fused",
    foreach_average: bool = True,
    attention: SDPBackend | None = None,
) -> float:
    """Return seconds for the same step without Lightning, by default with the same kernels."""
    module = build_module(spec, spec.model_spec()).to(device)
    network, o, T = module.network, spec.optim, module.spec.schedule.T
    alpha_bar: Any = module.alpha_bar
    optimizer = torch.optim.Adam(network.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, **ADAM[adam])
    average = [p.detach().clone() for p in network.parameters()]
    steps = spec.trainer.max_steps
    resident = images.images.to(device)
    data = MicroBatches(images, spec.trainer.batch_size, spec.seed, steps, with_images=False)
    start = 0.0
    with sdpa_kernel(attention) if attention is not None else nullcontext():
        for k in range(steps):
            if k == WARM_UP:
                synchronise(device)
                start = clock()
            batch = data[k]
            positions, indices = batch["positions"].to(device), batch["indices"].to(device)
            x0 = finish(resident[indices], k, positions, spec.seed, flip=True)["images"]
            t = TIME_SAMPLERS[spec.objective.times](T, spec.seed, k, positions)
            eps = training_noise(spec.seed, k, positions, x0.shape[1:])
            loss = per_sample_loss(module.model, alpha_bar, x0, t, eps).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), o.grad_clip or float("inf"))
            optimizer.step()
            weights = [p.detach() for p in network.parameters()]
            if foreach_average:
                torch._foreach_lerp_(average, weights, 1 - 0.9999)
            else:
                for mean, weight in zip(average, weights, strict=True):
                    mean.lerp_(weight, 1 - 0.9999)
    synchronise(device)
    return (clock() - start) / (steps - WARM_UP)


def device_name(device: torch.device) -> str:
    """Return what people call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "cpu")
    return device.type


if __name__ == "__main__":
    main()
