"""Timing for the benchmarks: settings, interleaved rounds, operations, the machine."""

import math
import os
import platform
import re
import time
import timeit
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ddim.config import choose
from ddim.results.records import provenance

Variant = Callable[[], float]  # runs a unit of work and returns its seconds
Build = Callable[[], Variant]
AT_LEAST = 0.3  # seconds of one measurement; below, clocks are imprecise
# Words for ours alone: what compute=auto and trainer=auto choose; the C++ loops; each kind of these.
OURS = ("auto", "winograd", "convolutions", "norms")
WORDS = ("bf16", "channels_last", "compile", "graphs", *OURS)  # of a setting, joined by +


def words(setting: str) -> dict[str, bool]:
    """Return a setting such as bf16+channels_last as options, none for `default`; a UserError names unknown words."""
    names = [] if setting == "default" else setting.split("+")
    for name in names:
        choose("word of a setting", name, dict.fromkeys(WORDS))
    return dict.fromkeys(names, True)


def resolve(name: str, ours: bool, bf16_is_faster: bool) -> str:
    """Return the setting by this name, for ours or for another code base, which has none of our C++ loops."""
    if name == "best" and bf16_is_faster:
        return "bf16+channels_last+compile"
    if name == "best":
        return "channels_last+winograd" if ours else "channels_last+compile"
    return name if ours else "+".join(word for word in name.split("+") if word not in OURS) or "default"


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


def repeated(call: Callable[[], Any]) -> Variant:
    """Return a variant that runs `call` once at first, then as often as fills AT_LEAST seconds."""
    number = 1

    def run() -> float:
        nonlocal number
        seconds = timeit.Timer(call, timer=clock).timeit(number) / number
        number = max(1, math.ceil(AT_LEAST / seconds))
        return seconds

    return run


def interleave(
    variants: Mapping[str, Build], rounds: int, minutes: float = math.inf
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every variant once in each round, so that a machine that becomes slower slows all of them down.

    Args:
        variants: name -> what builds it. Each is built and run twice before the first round.
        rounds: at most; at least one.
        minutes: for everything. Variants not built after two thirds of it are left out.

    Returns:
        The seconds of each variant's rounds; the reasons why others are missing.
    """
    start = time.monotonic()
    built: dict[str, Variant] = {}
    missing = {}
    for name, build in variants.items():
        if time.monotonic() - start > minutes * 40:
            missing[name] = f"no time left of {minutes:.1f} minutes"
            continue
        try:
            variant = build()
            variant()
            variant()
        except Exception as error:  # one that fails must not end the measurement of the others
            missing[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
        else:
            built[name] = variant
            print(f"{name}: ready after {time.monotonic() - start:.0f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in built}
    ready = time.monotonic()
    for number in range(rounds):
        now = time.monotonic()
        if number and now + (now - ready) / number > start + minutes * 60:
            break  # another round would not fit
        for name, variant in built.items():
            seconds[name].append(variant())
        print(f"round {number + 1} of {rounds} done after {time.monotonic() - start:.0f} s", flush=True)
    return seconds, missing


def matmul(device: torch.device, dtype: torch.dtype, size: int) -> Variant:
    """Return a variant that multiplies square matrices; its seconds are those of one floating-point operation."""
    a, b = torch.randn(2, size, size).to(device, dtype)
    run = repeated(lambda: a @ b)
    return lambda: run() / (2 * size**3)


def machine(device: torch.device) -> dict[str, Any]:
    """Return what decides a time besides the code measured, and the name of a run that starts now."""
    path = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", path.read_text(encoding="utf-8")) if path.exists() else None
    return {
        "run": f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {os.getpid()}",  # several may start in one second
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": model[1] if model else platform.processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **provenance(),
    }
