"""Timing for the benchmarks: settings, interleaved rounds, peak memory, operations, the machine."""

import ctypes
import math
import platform
import re
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddim.config import choose
from ddim.networks import accelerate
from ddim.networks.acceleration import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory
from ddim.results.records import provenance

Variant = Callable[[], float]  # runs a unit of work and returns its seconds
AT_LEAST = 0.3  # seconds of one measurement on an accelerator, where the clock is imprecise below
WORDS = ("bf16", "channels_last", "compile", "graphs", "winograd")  # of a setting, joined by +
N = TypeVar("N", bound=nn.Module)


def words(setting: str) -> set[str]:
    """Return the words of a setting such as bf16+channels_last; `default` has none.

    Raises:
        UserError: an unknown word.
    """
    found = set() if setting == "default" else set(setting.split("+"))
    for word in found:
        choose("word of a setting", word, dict.fromkeys(WORDS))
    return found


def apply(setting: str, network: N, device: torch.device) -> N:
    """Move a network to the device and accelerate it, in place."""
    accelerate(network.to(device), device, **dict.fromkeys(words(setting) - {"bf16"}, True))
    return network


def autocast(setting: str, device: torch.device) -> torch.autocast:
    """Return the context in which the network runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled="bf16" in setting)


def this_device() -> torch.device:
    """Return the accelerator, or the CPU; not Apple's GPUs, which have no float64."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if device is None or device.type == "mps" else device


def clock() -> float:
    """Return seconds, after waiting for the accelerator; torch.utils.benchmark's prints a warning when imported."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def repeated(call: Callable[[], Any], device: torch.device, at_least: float | None = None) -> Variant:
    """Return a variant that runs `call` once at first, then as often as fills `at_least` seconds."""
    least = (AT_LEAST if device.type != "cpu" else 0.0) if at_least is None else at_least
    number = 1

    def run() -> float:
        nonlocal number
        seconds = timeit.Timer(call, timer=clock).timeit(number) / number
        number = max(1, math.ceil(least / seconds))
        return seconds

    return run


def with_memory(variant: Variant, keep: bool) -> Variant:
    """Let a variant run with freed memory kept, as our code does on CPUs, or with glibc's thresholds as for others."""

    def run() -> float:
        if keep_freed_memory() and not keep:
            mmap_threshold = -3  # of glibc's malloc.h
            values = {M_MMAP_MAX: 65536, mmap_threshold: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
            for parameter, value in values.items():
                ctypes.CDLL(None).mallopt(parameter, value)
        return variant()

    return run


class Timing(NamedTuple):
    """Seconds to build a variant and run it once; bytes that its second run takes; seconds of each round."""

    first: float
    peak: int | None
    seconds: list[float]


def interleave(
    variants: Mapping[str, Callable[[], Variant]],
    rounds: int,
    device: torch.device,
    minutes: float = math.inf,
    log: Callable[[str], None] = print,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time every variant once in each round, so that a machine that becomes slower slows all of them down.

    Args:
        variants: name -> what builds it. Each is built and run twice before the first round.
        rounds: at most; at least one.
        minutes: for everything. Variants not built after two thirds of it are left out.

    Returns:
        The timings, and the reason for each variant that is missing: it raised, or there was no time.
    """
    start, timings, missing = time.monotonic(), {}, {}
    built: dict[str, Variant] = {}
    for name, build in variants.items():
        if time.monotonic() - start > minutes * 40:
            missing[name] = f"no time left of {minutes:.1f} minutes"
            continue
        before = time.perf_counter()
        try:
            variant = build()
            variant()
            first = time.perf_counter() - before
            timings[name] = Timing(first, peak_memory(variant, device), [])
            built[name] = variant
            log(f"{name}: ready after {first:.1f} s")
        except Exception as error:  # one that fails must not end the measurement of the others
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            log(f"{name}: {missing[name]}")
    ready = time.monotonic()
    for number in range(rounds):
        now = time.monotonic()
        if number and now + (now - ready) / number > start + minutes * 60:
            break  # another round would not fit
        for name, variant in built.items():
            timings[name].seconds.append(variant())
        log(f"round {number + 1} of {rounds} done after {time.monotonic() - start:.0f} s")
    return timings, missing


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call takes in addition: of torch's allocator, on CPUs of the process (Linux only)."""
    if device.type != "cpu":
        memory: Any = torch.get_device_module(device)
        memory.reset_peak_memory_stats(device)
        allocated = memory.memory_allocated(device)
        call()
        memory.synchronize(device)
        return int(memory.max_memory_allocated(device) - allocated)

    def kilobytes(name: str) -> int:
        match = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(match[1]) if match else 0

    try:
        if keep_freed_memory():
            ctypes.CDLL(None).malloc_trim(0)  # kept memory would not be counted
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        call()
        return None
    resident = kilobytes("VmRSS")
    call()
    return max(0, kilobytes("VmHWM") - resident) * 1024


def flops(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Return the floating-point operations of an evaluation of one image: two per multiply-add."""
    device = next(network.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *image_shape, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    return counter.get_total_flops()


def matmul(device: torch.device, dtype: torch.dtype, size: int) -> Variant:
    """Return a variant that multiplies square matrices; its seconds are those of one floating-point operation."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    run = repeated(lambda: a @ b, device, 0.2)
    return lambda: run() / (2 * size**3)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what decides a time besides the code measured."""
    path = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": model[1] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **provenance(),
    }
