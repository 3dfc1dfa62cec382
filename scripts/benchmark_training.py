"""Time a training step: through Lightning against the same step in a plain loop, and with each option for speed.

    python scripts/benchmark_training.py
    python scripts/benchmark_training.py --batch 128 --steps 20 --rounds 5

The full CIFAR-10 U-Net on random images, on the accelerator if there is one. Rounds are interleaved: each of them times
every variant once, so that a machine that gets slower meanwhile slows all of them down. Ratios are medians over rounds.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _cli import silence

from ddim.data.datamodule import ImageDataModule
from ddim.data.datasets import DataSpec
from ddim.data.images import MemoryImages
from ddim.data.order import MicroBatches, finish
from ddim.diffusion.objective import TIME_SAMPLERS, per_sample_loss, training_noise
from ddim.training.ema import EMA
from ddim.training.module import DiffusionModule
from ddim.training.plan import Stopwatch
from ddim.training.run import TrainerSpec, TrainSpec, build_trainer

WARM_UP = 2  # steps that are not timed
NETWORK = {"name": "unet", "image_size": [32, 32], "channels": 3, "ch_mult": [1, 2, 2, 2], "dropout": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"precision": "bf16-mixed"},
    "bf16, channels_last": {"precision": "bf16-mixed", "channels_last": True},
    "bf16, channels_last, compile": {"precision": "bf16-mixed", "channels_last": True, "compile": True},
}


def main() -> None:
    """Time everything, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images in a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each variant in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also time torch.compile, which takes minutes to begin")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark/training.json"))
    arguments = parser.parse_args()
    silence()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    images = MemoryImages("random", torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8))

    def spec(options: dict[str, Any]) -> TrainSpec:
        trainer = TrainerSpec(
            max_steps=WARM_UP + arguments.steps,
            batch_size=arguments.batch,
            accelerator=device.type,
            devices=1,
            **options,
        )
        data = DataSpec(name="cifar10", size=(32, 32), channels=3)
        return TrainSpec("benchmark", str(arguments.out.parent), data, NETWORK, trainer=trainer)

    plain = partial(plain_loop, spec({}), images, device)
    variants: dict[str, Callable[[], float]] = {
        "plain loop, float32": plain,
        "plain loop, Adam and average one tensor after the other": partial(plain, one_by_one=True),
    }
    for name, options in OPTIONS.items():
        if "compile" not in name or arguments.compile:
            variants[f"Lightning, {name}"] = partial(through_lightning, spec(options), images)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(arguments.rounds):
        for name, variant in variants.items():
            seconds[name].append(variant())
            print(f"round {number + 1}: {name}: {seconds[name][-1]:.4f} s a step", flush=True)
    first = next(iter(seconds))
    print(f"\n| step of {arguments.batch} images on {device.type} | seconds | ratio to the plain loop |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(v / base for v, base in zip(values, seconds[first], strict=True))
        print(f"| {name} | {statistics.median(values):.4f} | {ratio:.3f} |")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"device": device.type, "threads": torch.get_num_threads(), "batch": arguments.batch, "seconds": seconds}
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{arguments.out}")


def through_lightning(spec: TrainSpec, images: MemoryImages) -> float:
    """Return seconds for a step as `scripts/train.py` does it, without checkpoints and grids."""
    t = spec.trainer
    module = DiffusionModule(spec.model_spec(), spec.objective, spec.optim, spec.seed)
    if t.channels_last:
        module.network.to(memory_format=torch.channels_last)
    if t.compile:
        module.network.compile()
    assert spec.ema is not None
    stopwatch = Stopwatch(WARM_UP)
    trainer = build_trainer(spec, Path(spec.output_dir), [EMA(spec.ema), stopwatch], loggers=[], max_steps=t.max_steps)
    trainer.fit(module, ImageDataModule(images, t.batch_size, spec.seed, t.max_steps, flip=True))
    return stopwatch.seconds_per_step


def plain_loop(spec: TrainSpec, images: MemoryImages, device: torch.device, one_by_one: bool = False) -> float:
    """Return seconds for the same step without Lightning; `one_by_one` without kernels for all tensors at once."""
    module = DiffusionModule(spec.model_spec(), spec.objective, spec.optim, spec.seed).to(device)
    network, o, T = module.network, spec.optim, module.spec.schedule.T
    alpha_bar: Any = module.alpha_bar
    kernels = {"foreach": False} if one_by_one else {"fused": True}
    adam = torch.optim.Adam(network.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, **kernels)
    average = [p.detach().clone() for p in network.parameters()]
    steps = spec.trainer.max_steps
    data = MicroBatches(images, spec.trainer.batch_size, spec.seed, steps)
    start = 0.0
    for k in range(steps):
        if k == WARM_UP:
            synchronise(device)
            start = time.perf_counter()
        batch = data[k]
        positions = batch["positions"].to(device)
        x0 = finish(batch["images"].to(device), k, positions, spec.seed, flip=True)["images"]
        t = TIME_SAMPLERS[spec.objective.times](T, spec.seed, k, positions)
        eps = training_noise(spec.seed, k, positions, x0.shape[1:])
        loss = per_sample_loss(module.model, alpha_bar, x0, t, eps).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), o.grad_clip or float("inf"))
        adam.step()
        weights = [p.detach() for p in network.parameters()]
        if one_by_one:
            for mean, weight in zip(average, weights, strict=True):
                mean.lerp_(weight, 1 - 0.9999)
        else:
            torch._foreach_lerp_(average, weights, 1 - 0.9999)
    synchronise(device)
    return (time.perf_counter() - start) / (steps - WARM_UP)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    main()
