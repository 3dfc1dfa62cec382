"""The parts of the speed benchmark; each writes lines of the record."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ours import Baseline, Ours, plain_loop
from timing import Timing, Variant, autocast, flops, interleave, matmul, repeated, with_memory, words
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from ddim.diffusion.noise import initial_noise, step_noise
from ddim.diffusion.prediction import x0_and_eps
from ddim.diffusion.sampling import DDIM, step
from ddim.diffusion.schedule import linear_schedule
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import generate, to_pixels

Build = Callable[[], Variant]


@dataclass
class Bench:
    """What is measured, how, and how a line of the record is written."""

    baselines: dict[str, Baseline]
    settings: list[tuple[str, str]]  # for ours and for the others
    device: torch.device
    sampling_batches: list[int]
    training_batch: int
    S: int
    rounds: int
    write: Callable[..., None]

    @property
    def ours(self) -> Ours:
        """Our code, which some parts measure alone."""
        ours = self.baselines.get("ours")
        if not isinstance(ours, Ours):
            raise UserError("scaling, steps, profile and training_options measure ours; add it to --baselines.")
        return ours

    def variants(self, build: Callable[[Baseline, str], Variant]) -> dict[str, Build]:
        """Return a variant for each setting of each code base, setting by setting."""

        def built(name: str, setting: str) -> Variant:
            return with_memory(build(self.baselines[name], setting), keep=name == "ours")

        pairs = [(n, s[0] if n == "ours" else s[1]) for s in self.settings for n in self.baselines]
        return {f"{name} {setting}": partial(built, name, setting) for name, setting in pairs}

    def time(self, what: str, variants: dict[str, Build], minutes: float, **fields: Any) -> dict[str, Timing]:
        """Time variants named "NAME SETTING", and write a line for each."""
        timings, missing = interleave(variants, self.rounds, self.device, minutes, partial(print, flush=True))
        for name, timing in timings.items():
            peer, setting = name.rsplit(" ", 1)
            self.write(what, peer=peer, setting=setting, **timing._asdict(), **fields)
        for name, reason in missing.items():
            self.write("missing", peer=name, reason=f"{what}: {reason}")
        return timings

    def describe(self, missing: dict[str, str], differences: dict[str, float]) -> None:
        """Write what network each code base has, and which are missing."""
        for name, baseline in self.baselines.items():
            network = baseline.network().eval()
            size = {
                "parameters": sum(p.numel() for p in network.parameters()),
                "flops": flops(network, baseline.image_shape),
            }
            self.write("peer", peer=name, about=baseline.about, apart=differences.get(name), **size)
        for name, reason in missing.items():
            self.write("missing", peer=name, reason=reason)

    def choose_settings(self, names: list[str], size: int) -> None:
        """Measure what the device can multiply, and with it decide what `best` is."""
        dtypes = {"float32": torch.float32, "bf16": torch.bfloat16}
        sizes = {"float32": size, "bf16": size // 2 if self.device.type == "cpu" else size}  # bf16 may take seconds
        variants: dict[str, Build] = {
            f"matmul {name}": partial(matmul, self.device, dtypes[name], sizes[name]) for name in dtypes
        }
        timings = self.time("ceiling", variants, 1.0, size=size)
        float32, bf16 = (min(timing.seconds) for timing in timings.values())
        self.settings = resolve(names, bf16 < float32)


def resolve(names: list[str], bf16_is_faster: bool) -> list[tuple[str, str]]:
    """Return the settings by these names, for ours and for the others, which have no winograd."""
    others = "bf16+channels_last+compile" if bf16_is_faster else "channels_last+compile"
    best = (others if bf16_is_faster else "channels_last+winograd", others)

    def pair(name: str) -> tuple[str, str]:
        return name, "+".join(w for w in name.split("+") if w in words(name) - {"winograd"}) or "default"

    return [best if name == "best" else pair(name) for name in names]


def sampling(bench: Bench, minutes: float) -> None:
    """Time S steps from noise to pixels in the host's memory."""
    for batch in bench.sampling_batches:

        def build(baseline: Baseline, setting: str, batch: int = batch) -> Variant:
            return baseline.sampler(setting, bench.device, batch, bench.S)

        share = minutes / len(bench.sampling_batches)
        bench.time("sampling", bench.variants(build), share, batch=batch, S=bench.S)


def training(bench: Bench, minutes: float) -> None:
    """Time a training step."""
    batch = bench.training_batch
    variants = bench.variants(lambda baseline, setting: baseline.trainer(setting, bench.device, batch))
    bench.time("training", variants, minutes, batch=batch)


def training_options(bench: Bench, minutes: float) -> None:
    """Time our training step in a plain loop, with single changes to it, and through Lightning."""
    device, batch, setting = bench.device, bench.training_batch, bench.settings[0][0]

    def loop(**options: Any) -> Build:
        return lambda: plain_loop(bench.ours, setting, device, batch, **options)

    variants = {
        "plain loop": loop(fused=True),
        "Lightning": lambda: bench.ours.trainer(setting, device, batch),
        "Lightning, images not on the device": lambda: bench.ours.trainer(setting, device, batch, False),
        "plain loop, Adam tensor by tensor": loop(foreach=False),
        "plain loop, Adam with foreach": loop(foreach=True),
        "plain loop, average tensor by tensor": loop(fused=True, average_at_once=False),
    }
    bench.time("training_options", {f"{k} {setting}": v for k, v in variants.items()}, minutes, batch=batch)


def scaling(bench: Bench, minutes: float) -> None:
    """Time our sampling over the number of steps, and over the number of images at one batch size."""
    setting, batch = bench.settings[-1][0], bench.sampling_batches[0]
    model = bench.ours.loaded(setting, bench.device)
    compute = ComputeSpec(str(bench.device), batch, bf16="bf16" in setting)
    points = [(batch, S) for S in (1, 2, 5, 10)] + [(batches * batch, 2) for batches in (2, 3, 4)]

    def build(n: int, S: int) -> Variant:
        sampler = SamplerSpec(S=S, spacing="uniform")
        return repeated(lambda: generate(model, sampler, range(n), 0, compute), bench.device)

    variants: dict[str, Build] = {f"n={n},S={S} {setting}": partial(build, n, S) for n, S in points}
    bench.time("scaling", variants, minutes, batch=batch)


def steps(bench: Bench, minutes: float) -> None:
    """Time the parts of one stochastic step, the copy of pixels to the host, and their features."""
    device, batch, setting = bench.device, bench.sampling_batches[0], bench.settings[-1][0]
    shape, schedule = bench.ours.image_shape, linear_schedule()
    model = bench.ours.loaded(setting, device)
    x = initial_noise(range(batch), shape, 0, device=device)
    t, indices = torch.full((batch,), 500, device=device), torch.arange(batch, device=device)
    a_t, a_s = schedule[500], schedule[400]

    def network() -> torch.Tensor:
        with torch.inference_mode(), autocast(setting, device):
            return model(x, t)

    def arithmetic() -> torch.Tensor:
        with torch.inference_mode():
            return step(DDIM(1.0), *x0_and_eps("eps", "none", x, x, a_t), a_t, a_s, x)

    calls: dict[str, Callable[[], Any]] = {
        "network": network,
        "arithmetic": arithmetic,
        "noise": lambda: step_noise(indices, shape, 0, 1),
        "copy": lambda: to_pixels(x),
    }
    for name in ("efficientnet", "inception"):
        try:
            calls[f"features_{name}"] = partial(extractor(name, device, batch), to_pixels(x))
        except (UserError, ModuleNotFoundError) as error:
            bench.write("missing", peer=f"features {name}", reason=str(error))
    variants: dict[str, Build] = {f"{k} {setting}": partial(repeated, call, device, 0.1) for k, call in calls.items()}
    bench.time("step", variants, minutes, batch=batch)


def extractor(name: Any, device: torch.device, batch: int) -> Callable[[torch.Tensor], Any]:
    """Return what extracts features of uint8 images; Inception has random weights, so that nothing is downloaded."""
    import torch_fidelity

    from ddim.evaluation.extractor_networks import fold_normalisation
    from ddim.evaluation.features import FeatureExtractor

    if name != "inception":
        return FeatureExtractor(name, device, batch_size=batch).extract

    class RandomInception(torch_fidelity.FeatureExtractorInceptionV3):
        """Inception that keeps its random weights."""

        def load_state_dict(self, *args: Any, **options: Any) -> None:
            """Do nothing."""

    with tempfile.NamedTemporaryFile() as empty:
        torch.save({}, empty.name)
        inception = RandomInception("random", ["2048"], feature_extractor_weights_path=empty.name)
    fold_normalisation(inception)
    inception.to(device)
    return torch.inference_mode()(lambda pixels: inception(pixels.to(device))[0].cpu())


def profile(bench: Bench, minutes: float) -> None:
    """Write the ten operations that take most of an evaluation's time, in the first and in the last setting."""
    device, batch = bench.device, bench.sampling_batches[0]
    activities = [ProfilerActivity.CPU, *([] if device.type == "cpu" else [ProfilerActivity.CUDA])]
    kind = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    x = initial_noise(range(batch), bench.ours.image_shape, 0, device=device)
    t = torch.full((batch,), 500, device=device)
    for setting in dict.fromkeys((bench.settings[0][0], bench.settings[-1][0])):
        model = bench.ours.loaded(setting, device)
        with torch.inference_mode(), autocast(setting, device):
            model(x, t)
            with torch_profile(activities=activities) as profiler:
                for _ in range(3):
                    model(x, t)
        events = {event: getattr(event, kind) for event in profiler.key_averages()}
        total, top = sum(events.values()), sorted(events, key=lambda event: events[event], reverse=True)[:10]
        rows = [[event.key, event.count // 3, events[event] / total] for event in top]
        bench.write("profile", peer="ours", setting=setting, batch=batch, rows=rows)


PARTS: dict[str, tuple[Callable[[Bench, float], None], float]] = {  # with their shares of the time
    "sampling": (sampling, 4.0),
    "training": (training, 4.0),
    "training_options": (training_options, 2.0),
    "scaling": (scaling, 1.0),
    "steps": (steps, 1.0),
    "profile": (profile, 1.0),
}
