"""The measurements of the speed benchmark; each writes lines of the record."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from _benchmark import Setting, Timing, Variant, ceilings, clocked, flops, interleave, with_memory
from _peers import Ours, Peer

from ddim.checkpoints import LoadedModel, ModelSpec
from ddim.diffusion.noise import initial_noise, step_noise
from ddim.diffusion.prediction import x0_and_eps
from ddim.diffusion.sampling import DDIM, step
from ddim.diffusion.schedule import linear_schedule
from ddim.errors import UserError

Build = Callable[[], Variant]


@dataclass
class Bench:
    """What is measured, how, and where it is written."""

    peers: dict[str, Peer]
    settings: list[tuple[Setting, Setting]]  # for ours, and for the others
    device: torch.device
    sampling_batches: list[int]
    training_batch: int
    S: int
    rounds: int
    write: Callable[..., None]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the images."""
        spec = self.ours.spec
        return spec.channels, *spec.image_size

    @property
    def ours(self) -> Ours:
        """Our own code, which some measurements are of alone."""
        ours = self.peers.get("ours")
        if not isinstance(ours, Ours):
            raise UserError("the parts scaling, steps and profile are of ours; name ours among the --peers.")
        return ours

    def describe(self, missing: Mapping[str, str], apart: Mapping[str, float]) -> None:
        """Write what each peer's network is."""
        for name, peer in self.peers.items():
            network = peer.network().eval()
            parameters = sum(p.numel() for p in network.parameters())
            shape = (3, *_size(peer))
            self.write(
                "peer",
                peer=name,
                about=peer.about,
                parameters=parameters,
                flops=flops(network, shape),
                apart=apart.get(name),
            )
        for name, reason in missing.items():
            self.write("missing", peer=name, reason=reason)

    def variants(self, build: Callable[[Peer, Setting], Variant]) -> dict[str, Build]:
        """One variant for each setting of each peer; the first setting of all peers comes first."""
        found: dict[str, Build] = {}
        for ours, others in self.settings:
            for name in self.peers:
                setting = ours if name == "ours" else others
                found[f"{name} {setting}"] = partial(self._build, build, name, setting)
        return found

    def _build(self, build: Callable[[Peer, Setting], Variant], name: str, setting: Setting) -> Variant:
        return with_memory(build(self.peers[name], setting), kept=name == "ours")

    def time(self, what: str, variants: dict[str, Build], minutes: float, **fields: Any) -> dict[str, Timing]:
        """Time variants and write a line for each."""
        timings, missing = interleave(variants, self.rounds, self.device, minutes, say)
        for name, timing in timings.items():
            peer, setting = name.split(" ", 1)
            self.write(what, peer=peer, setting=setting, **timing._asdict(), **fields)
        for name, reason in missing.items():
            self.write("missing", peer=name, reason=f"{what}: {reason}")
        return timings


def say(text: str) -> None:
    """Tell where the run is."""
    print(text, flush=True)


def _size(peer: Peer) -> tuple[int, int]:
    return peer.spec.image_size  # type: ignore[attr-defined]


def add_ceiling(bench: Bench, size: int) -> dict[str, float]:
    """Measure and write what the device multiplies at most; return seconds for one operation, by dtype."""
    variants: dict[str, Build] = {f"matmul {name}": build for name, build in ceilings(bench.device, size).items()}
    timings = bench.time("ceiling", variants, 1.0, size=size)
    return {name.split()[1]: min(timing.seconds) for name, timing in timings.items()}


def resolve(names: Iterable[str], ceiling: Mapping[str, float]) -> list[tuple[Setting, Setting]]:
    """Return the settings by these names, for ours and for the others.

    `best` compiles, with bf16 where the ceiling is higher with it; where it is not, ours takes winograd instead.
    """
    bf16 = ceiling["bf16"] < ceiling["float32"]
    others = Setting(bf16=bf16, channels_last=True, compile=True)
    best = others if bf16 else Setting(channels_last=True, winograd=True)
    pairs = []
    for name in names:
        setting = best if name == "best" else Setting.parse(name)
        pairs.append((setting, others if name == "best" else replace(setting, winograd=False)))
    return pairs


def sampling(bench: Bench, minutes: float) -> None:
    """Time S steps from noise to pixels in the host's memory."""
    for batch in bench.sampling_batches:

        def build(peer: Peer, setting: Setting, batch: int = batch) -> Variant:
            return peer.sampler(setting, bench.device, batch, bench.S)

        variants = bench.variants(build)
        bench.time("sampling", variants, minutes / len(bench.sampling_batches), batch=batch, S=bench.S)


def training(bench: Bench, minutes: float) -> None:
    """Time a training step."""
    batch = bench.training_batch
    variants = bench.variants(lambda peer, setting: peer.trainer(setting, bench.device, batch))
    bench.time("training", variants, minutes, batch=batch)


def scaling(bench: Bench, minutes: float) -> None:
    """Time ours over the number of steps, and over the number of images at one batch size."""
    from ddim.diffusion.spec import SamplerSpec
    from ddim.inference.compute import ComputeSpec
    from ddim.inference.generate import generate

    setting, batch = bench.settings[-1][0], bench.sampling_batches[0]
    model = _loaded(bench, setting)
    compute = ComputeSpec(str(bench.device), batch, bf16=setting.bf16)
    points = [(batch, S) for S in (1, 2, 5, 10)] + [(batches * batch, 2) for batches in (2, 3, 4)]

    def build(n: int, S: int) -> Variant:
        sampler = SamplerSpec(S=S, spacing="uniform")
        return clocked(lambda: generate(model, sampler, range(n), 0, compute), bench.device)

    variants: dict[str, Build] = {f"n={n},S={S} {setting}": partial(build, n, S) for n, S in points}
    bench.time("scaling", variants, minutes, batch=batch)


def steps(bench: Bench, minutes: float) -> None:
    """Time the parts of one stochastic step, and what follows the last: pixels to the host, and their features."""
    from ddim.inference.generate import to_pixels

    device, batch, schedule = bench.device, bench.sampling_batches[0], linear_schedule()
    setting = bench.settings[-1][0]
    model = _loaded(bench, setting)
    x = initial_noise(range(batch), bench.image_shape, 0, device=device)
    t = torch.full((batch,), 500, device=device)
    indices = torch.arange(batch, device=device)
    a_t, a_s = schedule[500], schedule[400]

    def network() -> torch.Tensor:
        with torch.inference_mode(), setting.autocast(device):
            return model(x, t)

    def arithmetic() -> torch.Tensor:
        with torch.inference_mode():
            x0, eps = x0_and_eps("eps", "none", x, x, a_t)
            return step(DDIM(1.0), x0, eps, a_t, a_s, x)

    calls: dict[str, Callable[[], Any]] = {
        "network": network,
        "arithmetic": arithmetic,
        "noise": lambda: step_noise(indices, bench.image_shape, 0, 1),
        "copy": lambda: to_pixels(x),
    }
    pixels = to_pixels(x)
    for name in ("efficientnet", "inception"):
        try:
            extractor = _extractor(name, device, batch)
        except (UserError, ModuleNotFoundError) as error:
            bench.write("missing", peer=f"features {name}", reason=str(error))
        else:
            calls[f"features_{name}"] = lambda extractor=extractor: extractor.extract(pixels)  # type: ignore[misc]
    variants: dict[str, Build] = {
        f"{name} {setting}": lambda call=call: clocked(call, device, 0.1)  # type: ignore[misc]
        for name, call in calls.items()
    }
    bench.time("step", variants, minutes, batch=batch)


def profile(bench: Bench, minutes: float) -> None:
    """Write the ten operations that take most of an evaluation's time, in the first and in the last setting."""
    device, batch = bench.device, bench.sampling_batches[0]
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    x, t = initial_noise(range(batch), bench.image_shape, 0, device=device), torch.full((batch,), 500, device=device)
    for setting in dict.fromkeys((bench.settings[0][0], bench.settings[-1][0])):
        model = _loaded(bench, setting)
        with torch.inference_mode(), setting.autocast(device):
            model(x, t)
            with torch.profiler.profile(activities=activities) as profiler:
                for _ in range(3):
                    model(x, t)
        events = profiler.key_averages()
        kind = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
        total = sum(getattr(event, kind) for event in events)
        top = sorted(events, key=lambda event: getattr(event, kind), reverse=True)[:10]
        rows = [[event.key, event.count // 3, getattr(event, kind) / total] for event in top]
        bench.write("profile", peer="ours", setting=str(setting), batch=batch, rows=rows)


def _loaded(bench: Bench, setting: Setting) -> LoadedModel:
    network = setting.apply(bench.ours.network().eval().requires_grad_(False), bench.device)
    return LoadedModel(ModelSpec("unet", bench.ours.spec, linear_schedule()), network, "online", "", None)


def _extractor(name: Any, device: torch.device, batch: int) -> Any:
    """An extractor of ours; Inception with random weights, which take the same time and need no download."""
    from ddim.evaluation.features import fold_normalisation
    from ddim.evaluation.metrics import EXTRACTORS, FeatureExtractor, MetricSpec

    if name != "inception":
        return FeatureExtractor(MetricSpec(name, batch_size=batch), device)
    import torch_fidelity

    class Random(torch_fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **options: Any) -> None:
            """Keep the random weights."""

    class Extractor(FeatureExtractor):
        def __init__(self) -> None:
            with tempfile.NamedTemporaryFile() as nothing:
                torch.save({}, nothing.name)
                network = Random("random", ["2048"], feature_extractor_weights_path=nothing.name)
            fold_normalisation(network)
            self.spec = MetricSpec("inception", batch_size=batch)
            self.device, self.facts, self.network = device, EXTRACTORS["inception"], network.to(device)

    return Extractor()


MEASURES: dict[str, Callable[[Bench, float], None]] = {
    "sampling": sampling,
    "training": training,
    "scaling": scaling,
    "steps": steps,
    "profile": profile,
}
