"""What `compute=auto` and `trainer=auto` take: the fastest settings whose effect is expected to be below seed noise.

`choose_settings` is a pure function of the device, the work and the settings that are given; docs/performance.md has
the measurements that it rests on, as far as records of them were kept.
"""

import json
import logging
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddim.checkpoints import ModelSpec
from ddim.io import atomic_write
from ddim.networks import accelerate, build_network, has_cpp_loops
from ddim.networks.compiler import compiler_command, is_private
from ddim.results.records import record_key

log = logging.getLogger(__name__)

SETTINGS = ("bf16", "tf32", "channels_last", "compile", "graphs", "winograd")
COMPILE = 120.0  # seconds, the longest that compiling a network was seen to take
LONG = 5 * COMPILE  # seconds of work for which a network is compiled, which saves a fifth or more
GPU_RATE, CPU_RATE = 4e13, 1e11  # operations per second of a network that is not compiled; estimates
LAUNCH = 0.01  # seconds in which the host launches the kernels of a network; an estimate
SMALL = 2e11  # operations that a GPU has done before their kernels are launched
GPU_MOST = 1024  # images at once
CPU_BATCH, CPU_MOST = 4e11, 250  # operations and images at once, from where on larger batches are no faster
TIMED = 8  # images, in a timing
BF16_FLAGS = r"\b(avx512_bf16|amx_bf16|bf16)\b"  # of /proc/cpuinfo: x86's and ARM's


@dataclass(frozen=True)
class Hardware:
    """A device, as far as the choice depends on it.

    Attributes:
        type: torch's.
        name: of the model.
        bf16: whether it has instructions for products in bfloat16.
        compiler: whether torch.compile can be used.
        cpp_loops: whether it is a CPU for which the C++ loops can be loaded.
    """

    type: str
    name: str
    bf16: bool = False
    compiler: bool = False
    cpp_loops: bool = False


@dataclass(frozen=True)
class Work:
    """What a network is run for.

    Attributes:
        flops: operations of one evaluation of one image.
        evaluations: of the network for single images; a training step counts as three of each image.
        images: that can be computed at once.
        training: whether the weights are trained.
    """

    flops: int
    evaluations: int
    images: int
    training: bool = False


class Seconds(NamedTuple):
    """Seconds of one evaluation of one image on a CPU: in float32 by the C++ loops, and in bfloat16."""

    cpp_loops: float
    bf16: float


class Choice(NamedTuple):
    """A value for each of SETTINGS, a batch size (0 for a search), and the reason in a few words."""

    settings: dict[str, bool]
    batch_size: int
    reason: str


def choose_settings(
    hardware: Hardware, work: Work, given: Mapping[str, bool] | None = None, seconds: Seconds | None = None
) -> Choice:
    """Return the settings for some work on a device.

    On GPUs the precision does not depend on the amount of work, so neither do the keys of records.

    Args:
        given: settings that are not to be chosen.
        seconds: of a timing, where `needs_timing` asks for one.
    """
    given = given or {}
    if hardware.type == "cuda":
        choice = _for_gpu(hardware, work, given)
    elif hardware.type == "cpu":
        choice = _for_cpu(hardware, work, given, seconds)
    else:
        choice = Choice({}, 0, "nothing was measured on such a device")
    stated = "".join(f"; {name}={str(value).lower()} as given" for name, value in given.items())
    settings = dict.fromkeys(SETTINGS, False) | choice.settings | dict(given)
    return Choice(settings, choice.batch_size, f"{hardware.name}: {choice.reason}{stated}")


def needs_timing(hardware: Hardware, work: Work, given: Mapping[str, bool]) -> bool:
    """Return whether a timing decides between float32 and bfloat16, as it does on some CPUs for long work."""
    if hardware.type != "cpu" or not (hardware.bf16 and hardware.compiler) or given.get("winograd") or "bf16" in given:
        return False
    return work.evaluations * work.flops > LONG * CPU_RATE


def words(settings: Mapping[str, bool]) -> str:
    """Return settings as text, such as bf16+channels_last; float32 first where no other precision is used."""
    names = [name for name in SETTINGS if settings[name]]
    return "+".join(names if {"bf16", "tf32"} & set(names) else ["float32", *names])


def _for_gpu(hardware: Hardware, work: Work, given: Mapping[str, bool]) -> Choice:
    at_once = min(work.images, GPU_MOST)
    small = at_once * work.flops <= SMALL
    expected = work.evaluations * max(work.flops / GPU_RATE, LAUNCH / at_once)
    long = expected > LONG
    reason = f"about {expected:,.0f} s of work"
    if not (long or given.get("graphs")):
        reason += f", too short to compile for (below {LONG:.0f} s)"
    if long and not hardware.compiler:
        reason += ", and triton or a C compiler is missing to compile it"
    compiled = given.get("compile", given.get("graphs", False) or (long and hardware.compiler))
    graphs = compiled and small and not work.training
    bf16 = given.get("bf16", hardware.bf16 and not given.get("winograd"))  # which is refused: it is for CPUs
    settings = {
        "bf16": bf16,
        "tf32": hardware.bf16 and not bf16,
        "channels_last": True,
        "compile": compiled,
        "graphs": graphs,
    }
    return Choice(settings, at_once if small else 0, reason)


def _for_cpu(hardware: Hardware, work: Work, given: Mapping[str, bool], seconds: Seconds | None) -> Choice:
    saved = work.evaluations * (seconds.cpp_loops - seconds.bf16) if seconds else 0.0
    pays = saved > COMPILE and given.get("bf16", True) and not given.get("winograd")
    bf16 = given.get("bf16", pays)
    compiled = given.get("compile", pays)
    winograd = given.get("winograd", hardware.cpp_loops and not bf16)
    if pays:
        reason = f"bfloat16 saves about {saved:,.0f} s, by a timing"
    elif winograd:
        reason = "C++ loops in float32" + (", which a timing finds faster than bfloat16" if seconds else "")
    else:
        reason = "no C++ loops" + ("" if hardware.cpp_loops else ": they need a compiler")
    settings = {"bf16": bf16, "channels_last": compiled or winograd, "compile": compiled, "winograd": winograd}
    return Choice(settings, max(1, min(CPU_MOST, work.images, int(CPU_BATCH / max(1, work.flops)))), reason)


def choose_for(
    model: ModelSpec,
    network: nn.Module,
    device: torch.device,
    evaluations: int,
    images: int,
    given: Mapping[str, bool],
    training: bool = False,
    alone: bool = True,
) -> Choice:
    """Return the settings for a model on a device of this machine; log them and the reason in one line.

    Args:
        network: that of the model, as it is built.
        evaluations, images, training: see `Work`.
        given: settings that are not to be chosen.
        alone: whether this is the only process; several do not time, since they could come to different choices.
    """
    hardware = this_hardware(device)
    work = Work(rough_flops(network, model.image_shape, model.num_classes), evaluations, images, training)
    seconds = timing(hardware, model, work) if alone and needs_timing(hardware, work, given) else None
    choice = choose_settings(hardware, work, given, seconds)
    log.info("chosen: %s on %s", words(choice.settings), choice.reason)
    return choice


def flops(network: nn.Module, image_shape: tuple[int, ...], num_classes: int | None = None) -> int:
    """Return the floating-point operations of an evaluation of one image: two per multiply-add.

    Args:
        network: in eval mode, since some layers take no single image in training.
        image_shape: (C, H, W).
        num_classes: of a conditional network, which takes labels too.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*_inputs(network, 1, image_shape, num_classes))
    return counter.get_total_flops()


@torch.no_grad()
def rough_flops(network: nn.Module, image_shape: tuple[int, ...], num_classes: int | None = None) -> int:
    """Return `flops` without the products of attention, a few percent: what counts all takes seconds to import."""
    count = 0

    def add(module: nn.Conv2d | nn.Linear, inputs: object, output: Tensor) -> None:
        nonlocal count
        count += 2 * output.numel() * module.weight[0].numel()

    handles = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    network(*_inputs(network, 1, image_shape, num_classes))
    for handle in handles:
        handle.remove()
    return count


def _inputs(network: nn.Module, count: int, image_shape: tuple[int, ...], num_classes: int | None) -> list[Tensor]:
    """Return zeros as the inputs for `count` images: x, t, and labels for a conditional network."""
    device = next(network.parameters()).device
    indices = torch.zeros(count, dtype=torch.int64, device=device)
    return [torch.zeros(count, *image_shape, device=device), indices, *[indices] * (num_classes is not None)]


def this_hardware(device: torch.device) -> Hardware:
    """Return what a device of this machine is."""
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        compilers = filter(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))  # which triton calls
        compiler = find_spec("triton") is not None and any(compilers)
        return Hardware(device.type, torch.cuda.get_device_name(device), ampere, compiler)
    if device.type != "cpu":
        return Hardware(device.type, device.type)
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    model = re.search(r"model name\s*: (.*)", text)
    name = model[1] if model else platform.processor() or platform.machine()
    compiler = shutil.which(compiler_command()[0]) is not None
    return Hardware(device.type, name, re.search(BF16_FLAGS, text) is not None, compiler, has_cpp_loops())


def timing(hardware: Hardware, model: ModelSpec, work: Work) -> Seconds:
    """Return the seconds of this processor, kept in `~/.cache/torch/ddim` (TORCH_HOME moves it) from the first time on.

    Measured is a forward pass, in training a third of it and the backward pass, of as many images as `work` has, up to
    TIMED.
    """
    count = min(TIMED, work.images)
    key = record_key(
        {
            "processor": hardware.name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "network": [model.network, repr(model.network_spec)],
            "batch": count,
            "training": work.training,
        }
    )
    path = Path(torch.hub.get_dir()).parent / "ddim" / f"timing-{key}.json"
    if is_private(path) and path.exists():
        try:
            return Seconds(**{name: float(s) for name, s in json.loads(path.read_text(encoding="utf-8")).items()})
        except (ValueError, TypeError, AttributeError, OSError) as error:
            log.debug("%s is damaged (%s), so it is made again.", path, error)
    log.info("timing float32 and bfloat16 on %s, for a few seconds.", hardware.name)
    with torch.random.fork_rng(devices=[]):
        loops, bf16 = ({"winograd": hardware.cpp_loops}, {"bf16": True})
        times = Seconds(*(_time_network(model, count, work.training, **options) for options in (loops, bf16)))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(times._asdict()), encoding="utf-8")
    except OSError as error:
        log.debug("%s cannot be written (%s), so the next process times again.", path, error)
    return times


def _time_network(model: ModelSpec, count: int, training: bool, winograd: bool = False, bf16: bool = False) -> float:
    """Return the seconds for one image of the second of two evaluations on the CPU, of `count` images at once."""
    network = build_network(model.network, model.network_spec).train(training).requires_grad_(training)
    inputs = _inputs(network, count, model.image_shape, model.num_classes)
    accelerate(network, inputs[0].device, channels_last=True, winograd=winograd)
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.set_grad_enabled(training), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=bf16):
            output = network(*inputs)
        if training:
            output.float().square().mean().backward()
    return (time.perf_counter() - start) / count / (3 if training else 1)
