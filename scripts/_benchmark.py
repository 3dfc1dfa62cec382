"""What the benchmarks share: rounds that interleave, medians and ratios, the settings, the ceiling, peak memory."""

import contextlib
import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddim.errors import UserError
from ddim.networks import tune_network
from ddim.networks.acceleration import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory

Variant = Callable[[], float]  # runs once and returns the seconds of one unit of work
AT_LEAST = 0.3  # seconds that one measurement lasts on an accelerator, where a clock reads badly below
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """How to run a network; written as its words joined by +, or `default` for none of them.

    Attributes:
        bf16: autocast to bfloat16.
        channels_last, compile: of the network.
        graphs: compile with CUDA graphs (torch's mode reduce-overhead).
        winograd: our 3x3 convolutions and normalisations; other code bases have none, and the word is left out.
    """

    bf16: bool = False
    channels_last: bool = False
    compile: bool = False
    graphs: bool = False
    winograd: bool = False

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Read a name such as `bf16+channels_last`.

        Raises:
            UserError: a word that is no field.
        """
        words = [] if text == "default" else text.split("+")
        allowed = [field.name for field in fields(cls)]
        if unknown := [word for word in words if word not in allowed]:
            raise UserError(
                f"setting {unknown[0]!r} is not known; write default, best, or {', '.join(allowed)} joined by +."
            )
        return cls(**dict.fromkeys(words, True))

    def __str__(self) -> str:
        return "+".join(field.name for field in fields(self) if getattr(self, field.name)) or "default"

    def apply(self, network: N, device: torch.device) -> N:
        """Move a network to the device, lay its weights out, and compile it, in place."""
        ways = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "bf16"}
        tune_network(network.to(device), device, **ways)
        return network

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context in which the network runs."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


def with_memory(variant: Variant, kept: bool) -> Variant:
    """Let a variant run with memory as we leave it on CPUs (`keep_freed_memory`), or as the C library has it."""

    def run() -> float:
        if kept:
            keep_freed_memory()
        else:
            leave_memory()
        return variant()

    return run


def leave_memory() -> None:
    """Undo `keep_freed_memory`: glibc's own thresholds as they are after the first large tensors, 32 and 64 MiB."""
    if keep_freed_memory():
        m_mmap_threshold, c = -3, ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_MAX, 65536), (m_mmap_threshold, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20)):
            c.mallopt(parameter, value)


class Timing(NamedTuple):
    """What was measured of a variant.

    Attributes:
        first: seconds to build it and to run it the first time; compiling is in there.
        peak: bytes that the second run took beyond what was there; None where that cannot be read.
        seconds: of one unit of work, one for each round.
    """

    first: float
    peak: int | None
    seconds: list[float]


def this_device() -> torch.device:
    """The accelerator of this machine, or its CPU; Apple's GPUs have no float64 and are passed over."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type == "mps" else found


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clocked(call: Callable[[], Any], device: torch.device, at_least: float | None = None) -> Variant:
    """Return a variant that runs `call` as often as it takes to fill `at_least` seconds."""
    least = (AT_LEAST if device.type != "cpu" else 0.0) if at_least is None else at_least
    repeat = 1

    def run() -> float:
        nonlocal repeat
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        synchronise(device)
        seconds = (time.perf_counter() - start) / repeat
        repeat = max(1, math.ceil(least / seconds))
        return seconds

    return run


def interleave(
    variants: Mapping[str, Callable[[], Variant]],
    rounds: int,
    device: torch.device,
    minutes: float = math.inf,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time every variant once in each round, so that a machine that gets slower meanwhile slows all of them down.

    Args:
        variants: name -> what builds it. Building, a first and a second run come before the first round.
        rounds: how many, at most; never fewer than one.
        minutes: for all of it. A variant whose turn to be built comes after two thirds of it is left out.

    Returns:
        What was measured, and why a variant is missing: it raised, or its turn did not come.
    """
    start, timings, missing = time.monotonic(), {}, {}
    built: dict[str, Variant] = {}
    for name, build in variants.items():
        if time.monotonic() - start > minutes * 40:
            missing[name] = f"no time left of {minutes:.1f} minutes"
            continue
        began = time.perf_counter()
        try:
            variant = build()
            variant()
            first = time.perf_counter() - began
            peak = peak_memory(variant, device)
        except Exception as error:  # a peer that a setting breaks must not end the others' measurement
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            say(f"{name}: {missing[name]}")
            continue
        built[name], timings[name] = variant, Timing(first, peak, [])
        say(f"{name}: ready after {first:.1f} s")
    ready = time.monotonic()
    for number in range(rounds):
        now = time.monotonic()
        if number and now + (now - ready) / number > start + minutes * 60:
            break  # a round more would take as long as the mean of those before
        for name, variant in built.items():
            timings[name].seconds.append(variant())
        say(f"round {number + 1} of {rounds} done after {time.monotonic() - start:.0f} s")
    return timings, missing


class Ratio(NamedTuple):
    """The median over rounds, the least and the greatest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def speed_up(base: Sequence[float], seconds: Sequence[float]) -> Ratio:
    """How many times faster than `base`: one ratio for each round, in which both were measured side by side."""
    ratios = [b / s for b, s in zip(base, seconds, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call takes beyond those that are taken when it starts.

    On an accelerator those of torch's allocator. On a CPU those of the process, which only Linux tells.
    """
    if device.type != "cpu":
        memory: Any = torch.get_device_module(device)
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        call()
        synchronise(device)
        return memory.max_memory_allocated(device) - before
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        if keep_freed_memory():
            ctypes.CDLL(None).malloc_trim(0)  # what was kept would not count
        refs.write_text("5")  # the peak begins anew
        before = _kilobytes(status, "VmRSS")
        call()
        return max(0, _kilobytes(status, "VmHWM") - before) * 1024
    except OSError:
        call()
        return None


def _kilobytes(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


def flops(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Return the floating-point operations of one evaluation of one image: two for each multiply-add."""
    parameter = next(network.parameters())
    x = torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, torch.zeros(1, dtype=torch.int64, device=parameter.device))
    return counter.get_total_flops()


def ceilings(device: torch.device, size: int) -> dict[str, Callable[[], Variant]]:
    """Variants that multiply square matrices of random numbers: the most FLOP/s to be had at a dtype.

    On a CPU those of bfloat16 are smaller: without units for it one product takes seconds.

    The unit of work is one floating-point operation, so that 1 / seconds is FLOP/s.
    """

    def build(dtype: torch.dtype, size: int) -> Variant:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
        run = clocked(lambda: a @ b, device, 0.2)
        return lambda: run() / (2 * size**3)

    smaller = size // 2 if device.type == "cpu" else size
    return {"float32": lambda: build(torch.float32, size), "bf16": lambda: build(torch.bfloat16, smaller)}


def machine(device: torch.device) -> dict[str, Any]:
    """What decides a time besides the code: the processor, the device, threads, versions, revision."""
    from ddim.results.records import provenance

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **provenance(),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


@contextlib.contextmanager
def without_cuda_calls(device: torch.device) -> Iterator[None]:
    """Let code that says .to("cuda") run where there is none."""
    move = torch.Tensor.to
    if device.type != "cuda":
        torch.Tensor.to = lambda x, *to, **more: x if to == ("cuda",) else move(x, *to, **more)  # type: ignore
    try:
        yield
    finally:
        torch.Tensor.to = move  # type: ignore[method-assign]
