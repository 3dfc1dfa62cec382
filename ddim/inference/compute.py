"""How a model is run: its device, its precision, and how many images at once."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ddim.checkpoints import LoadedModel
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.inference.auto import SETTINGS, choose_for
from ddim.inference.batching import map_batches
from ddim.networks import accelerate, float32_products

log = logging.getLogger(__name__)
LONG = 5.0  # seconds, for one network evaluation of a search
C = TypeVar("C", bound="ComputeSpec")


@dataclass(frozen=True)
class ComputeSpec:
    """How to compute; what is computed does not depend on it, but for rounding.

    None leaves a setting to `prepare_model`, which chooses the fastest.

    Attributes:
        device: a torch device, such as cuda or cpu; auto until a script has chosen one.
        batch_size: images in one network evaluation; 0 is chosen like a setting that is None, or found by a search.
        bf16: run the network in bfloat16 under autocast; the state of the sampler stays float32.
        tf32: let GPUs multiply float32 numbers of 10 bits instead of 23.
        channels_last, compile, graphs, winograd: see `ddim.networks.accelerate`.

    Raises:
        ValueError: an unknown device, or meta, which has no numbers; batch_size below 0; bf16 with winograd, which is
            for float32.
    """

    device: str
    batch_size: int = 250
    bf16: bool | None = False
    tf32: bool | None = False
    channels_last: bool | None = False
    compile: bool | None = False
    graphs: bool | None = False
    winograd: bool | None = False

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

    @property
    def given(self) -> dict[str, bool]:
        """The settings that are not None."""
        return {name: value for name in SETTINGS if (value := getattr(self, name)) is not None}

    @property
    def state_device(self) -> str:
        """Where noise, the state of the sampler and features are: the CPU where the network's device has no float64."""
        return torch.get_default_device().type if torch.device(self.device).type == "mps" else self.device

    @property
    def uses_tf32(self) -> bool:
        """Whether products are in TF32: not those of bfloat16."""
        return bool(self.tf32 and not self.bf16)

    @property
    def precision(self) -> dict[str, bool | None]:
        """What a record states about the precision of the network: TF32 only where it is used, so that keys stay."""
        return {"bf16": self.bf16} | ({"tf32": True} if self.uses_tf32 else {})

    @property
    def compiles(self) -> bool:
        """Whether the network is compiled, for one batch size."""
        return bool(self.compile or self.graphs)


@dataclass(frozen=True)
class ChosenCompute(ComputeSpec):
    """One without None, as `prepare_model` returns it.

    Attributes:
        reason: why these settings.
    """

    reason: str = ""


def prepare_model(
    model: LoadedModel, compute: ComputeSpec, evaluations: int = 0, images: int = 1024, alone: bool = True
) -> ChosenCompute:
    """Choose the settings that are None, move a model to its device, and accelerate it, in place.

    Args:
        evaluations: of the network for single images, in all; it is compiled when there are many.
        images: that can be computed at once.
        alone: whether this is the only process.

    Returns:
        The settings; their batch size is still 0 where `with_batch_size` is to search for it.

    Raises:
        UserError: the device does not exist, or does not support what `compute` asks for.
    """
    try:
        model.network.to(compute.device)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise UserError(f"device={compute.device} cannot be used here ({reason}); cpu always can.") from error
    settings, batch_size, reason = compute.given, compute.batch_size, "as given"
    if len(settings) < len(SETTINGS):
        device = torch.device(compute.device)
        choice = choose_for(model.spec, model.network, device, evaluations, images, settings, alone=alone)
        settings, reason = choice.settings, choice.reason
        batch_size = compute.batch_size or choice.batch_size
    chosen = ChosenCompute(compute.device, batch_size, **settings, reason=reason)
    _accelerate(model, chosen if batch_size else replace(chosen, compile=False, graphs=False))
    return chosen


def _accelerate(model: LoadedModel, compute: ComputeSpec) -> None:
    options = {name: bool(getattr(compute, name)) for name in ("channels_last", "compile", "graphs", "winograd")}
    accelerate(model.network, torch.device(compute.device), **options)


def with_batch_size(model: LoadedModel, compute: C, most: int = 1024, processes: Processes = SINGLE_PROCESS) -> C:
    """Return `compute` with a batch size of at least 1: where it is 0, that of a search up to `most` images.

    A network that is to be compiled is so after the search, for that size.

    Args:
        model: on its device (`prepare_model`).
        processes: the first one searches for all of them; by default each process searches for itself.
    """
    if compute.batch_size:
        return compute
    fastest = processes.run_on_main(lambda: find_batch_size(lambda count: evaluate_zeros(model, compute, count), most))
    log.info("compute.batch_size=%d is about the fastest here.", fastest)
    compute = replace(compute, batch_size=fastest)
    if compute.compiles:
        _accelerate(model, compute)
    return compute


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
    x = torch.zeros(count, *model.spec.image_shape, device=compute.state_device)
    with autocast(compute):
        model(x, torch.ones(count, dtype=torch.int64, device=x.device)).cpu()


@contextmanager
def autocast(compute: ComputeSpec) -> Iterator[None]:
    """Give the network the precision of `compute` inside the block."""
    bf16 = torch.autocast(torch.device(compute.device).type, torch.bfloat16, enabled=bool(compute.bf16))
    with float32_products(compute.uses_tf32), bf16:
        yield
