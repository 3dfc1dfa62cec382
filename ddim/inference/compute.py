"""How a model is run: its device, its precision, and how many images at once."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddim.checkpoints import LoadedModel
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.inference.batching import map_batches
from ddim.networks import accelerate

log = logging.getLogger(__name__)
LONG = 5.0  # seconds, for one network evaluation of a search


@dataclass(frozen=True)
class ComputeSpec:
    """How to compute; what is computed does not depend on it, but for rounding.

    Attributes:
        device: a torch device, such as cuda or cpu; auto until a script has chosen one.
        batch_size: images in one network evaluation; 0 asks `with_batch_size` for a short search.
        bf16: run the network in bfloat16 under autocast; the state of the sampler stays float32.
        channels_last, compile, graphs, winograd: see `ddim.networks.accelerate`.

    Raises:
        ValueError: an unknown device, or meta, which has no numbers; batch_size below 0, or 0 where each size would be
            compiled again; bf16 with winograd, which is for float32.
    """

    device: str
    batch_size: int = 250
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    graphs: bool = False
    winograd: bool = False

    def __post_init__(self) -> None:
        try:
            kind = self.device if self.device == "auto" else torch.device(self.device).type
        except RuntimeError:
            kind = "meta"
        if kind == "meta":
            raise ValueError(f"device={self.device} is none that can compute; choose cpu, cuda or another of torch.")
        if self.bf16 and self.winograd:
            raise ValueError("bf16 and winograd exclude each other: Winograd's algorithm needs float32.")
        if self.batch_size < 0:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1, or 0 for a search.")
        if self.batch_size == 0 and (self.compile or self.graphs):
            raise ValueError("batch_size=0 would compile the network for each size; give a number, or do not compile.")


def prepare_model(model: LoadedModel, compute: ComputeSpec) -> LoadedModel:
    """Move a model to its device and accelerate it as `compute` asks; returns the same model.

    Raises:
        UserError: the device does not exist, or does not support what `compute` asks for.
    """
    try:
        model.network.to(compute.device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise UserError(f"device={compute.device} cannot be used here ({reason}); cpu always can.") from error
    options = {name: getattr(compute, name) for name in ("channels_last", "compile", "graphs", "winograd")}
    accelerate(model.network, torch.device(compute.device), **options)
    return model


def with_batch_size(
    model: LoadedModel, compute: ComputeSpec, most: int = 1024, processes: Processes = SINGLE_PROCESS
) -> ComputeSpec:
    """Return `compute` with a batch size of at least 1: where it is 0, that of a search up to `most` images.

    Args:
        model: on its device (`prepare_model`).
        processes: the first one searches for all of them.
    """
    if compute.batch_size:
        return compute
    fastest = processes.run_on_main(lambda: find_batch_size(lambda count: evaluate_zeros(model, compute, count), most))
    log.info("compute.batch_size=%d is about the fastest here.", fastest)
    return replace(compute, batch_size=fastest)


def find_batch_size(evaluate: Callable[[int], object], most: int) -> int:
    """Return the smallest of 1, 2, 4, ... images with which one takes at most 5 % longer than with the best number.

    The search ends at `most`, where memory does, where one evaluation takes `LONG` seconds, and where two sizes in a
    row were no faster than those before.

    Args:
        evaluate: what is timed, with so many images at once.
    """
    seconds: dict[int, float] = {}  # for one image, by the number at once
    count, slower = 1, 0
    while count <= most and slower < 2:
        fitted, duration = time_after_warmup(evaluate, count)
        each = duration / fitted
        slower = slower + 1 if seconds and each >= min(seconds.values()) else 0
        seconds[fitted] = min(each, seconds.get(fitted, each))
        if fitted < count or duration > LONG:
            break
        count *= 2
    return min(size for size, each in seconds.items() if each <= 1.05 * min(seconds.values()))


def time_after_warmup(call: Callable[[int], object], count: int) -> tuple[int, float]:
    """Return the seconds of the second of two calls for `count` images, and for how many it was.

    The first one compiles, and allocates. What does not fit into memory is halved, as when images are generated.
    """

    def seconds(batch: range) -> float:
        call(len(batch))
        start = time.perf_counter()
        call(len(batch))
        return time.perf_counter() - start

    batch, took = next(map_batches([range(count)], seconds))
    return len(batch), took


@torch.inference_mode()
def evaluate_zeros(model: LoadedModel, compute: ComputeSpec, count: int) -> None:
    """Evaluate the network once, for timing, and wait for it."""
    x = torch.zeros(count, *model.spec.image_shape, device=compute.device)
    with autocast(compute):
        ones = torch.ones(count, dtype=torch.int64, device=compute.device)
        model(x, ones, *[ones - 1] * (model.spec.num_classes is not None)).cpu()


def flops(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Return the floating-point operations of an evaluation of one image: two per multiply-add."""
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        zeros = torch.zeros(1, dtype=torch.int64, device=device)
        labels = [zeros] * (getattr(getattr(network, "spec", None), "classes", None) is not None)
        network(torch.zeros(1, *image_shape, device=device), zeros, *labels)
    return counter.get_total_flops()


def autocast(compute: ComputeSpec) -> torch.autocast:
    """Return the context that gives the network the precision of `compute`."""
    return torch.autocast(torch.device(compute.device).type, torch.bfloat16, enabled=compute.bf16)
