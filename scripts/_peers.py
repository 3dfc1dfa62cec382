"""Ours and three other code bases behind one interface: a training step and a batch of samples, as a user has them.

All train and sample DDPM's CIFAR-10 U-Net; denoising-diffusion-pytorch has another one and gets the configuration that
is nearest in parameters and operations. Training steps start from a batch in the host's memory, in the form in which
each one's loader hands it over; samples end as pixels in the host's memory. Nothing is written to disk.
"""

import importlib.util
import logging
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from _benchmark import Setting, Variant, clocked
from _foreign import DenoisingDiffusionPytorch, Diffusers, Official, State, T
from torch import nn

from ddim.checkpoints import LoadedModel, ModelSpec
from ddim.diffusion.schedule import linear_schedule
from ddim.errors import UserError
from ddim.networks import UNetSpec, build_network


class Peer(Protocol):
    """A code base.

    Attributes:
        same_network: its network has our weights and must give our output.
        about: what to know of its numbers.
    """

    same_network: bool
    about: str

    def network(self) -> nn.Module:
        """Return a new network on the CPU, called with (x, zero-based times); with our weights if it can have them."""

    def sampler(self, setting: Setting, device: torch.device, batch: int, S: int) -> Variant:
        """Return what makes `batch` images in S deterministic steps."""

    def trainer(self, setting: Setting, device: torch.device, batch: int) -> Variant:
        """Return what takes one training step: loss, gradient, clipping, Adam, average."""


def random_weights(spec: UNetSpec) -> State:
    """Weights that make outputs of order 1, as a fresh network of ours does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network("unet", UNetSpec(**{**vars(spec), "init": "torch"}))
        return {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}


class Ours:
    """This code base: `generate`, and Lightning's loop."""

    same_network = True
    about = "pixels as bytes; training through Lightning, with data, noise and averages as in scripts/train.py"

    def __init__(self, spec: UNetSpec, state: State) -> None:
        self.spec, self.state = spec, state

    def network(self) -> nn.Module:
        """See `Peer`."""
        network = build_network("unet", self.spec)
        network.load_state_dict(self.state)
        return network

    def sampler(self, setting: Setting, device: torch.device, batch: int, S: int) -> Variant:
        """See `Peer`."""
        from ddim.diffusion.spec import SamplerSpec
        from ddim.inference.compute import ComputeSpec
        from ddim.inference.generate import generate

        network = setting.apply(self.network().eval().requires_grad_(False), device)
        model = LoadedModel(ModelSpec("unet", self.spec, linear_schedule(T)), network, "online", "", None)
        compute = ComputeSpec(str(device), batch, bf16=setting.bf16)
        return clocked(lambda: generate(model, SamplerSpec(S=S, spacing="uniform"), range(batch), 0, compute), device)

    def trainer(self, setting: Setting, device: torch.device, batch: int) -> Variant:
        """See `Peer`."""
        from ddim.data.datamodule import ImageDataModule
        from ddim.data.datasets import DataSpec
        from ddim.data.images import MemoryImages
        from ddim.training.dry_run import Stopwatch
        from ddim.training.ema import EMA
        from ddim.training.run import build_module, build_trainer
        from ddim.training.spec import TrainerSpec, TrainSpec

        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        if setting.graphs:
            raise UserError("our training has no CUDA graphs")
        steps = 3 if device.type == "cpu" else 25
        options = TrainerSpec(
            max_steps=steps,
            batch_size=batch,
            accelerator=device.type,
            devices=1,
            precision="bf16-mixed" if setting.bf16 else "32-true",
            channels_last=setting.channels_last,
            compile=setting.compile,
            winograd=setting.winograd,
        )
        data = DataSpec(name="cifar10", size=self.spec.image_size, channels=self.spec.channels)
        fields = {"name": "unet", **vars(self.spec), "init": "torch"}
        spec = TrainSpec("benchmark", tempfile.gettempdir(), data, fields, trainer=options)
        generator = torch.Generator().manual_seed(0)
        shape = (max(batch, 512), self.spec.channels, *self.spec.image_size)
        images = MemoryImages("random", torch.randint(256, shape, generator=generator, dtype=torch.uint8))
        module = build_module(spec, spec.model_spec())

        def run() -> float:
            assert spec.ema is not None
            stopwatch = Stopwatch(1)
            callbacks = [EMA(spec.ema), stopwatch]
            trainer = build_trainer(spec, Path(spec.output_dir), callbacks, loggers=[], max_steps=steps)
            trainer.fit(module, ImageDataModule(images, batch, spec.seed, steps, flip=True))
            return stopwatch.seconds_per_step

        return run


def build_peers(names: list[str], spec: UNetSpec, official: str | None) -> tuple[dict[str, Peer], dict[str, str]]:
    """Return the peers that are here, and why the others are not."""
    state = random_weights(spec)
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name in names:
        if name == "official" and official is None:
            missing[name] = "give --official PATH of a checkout of ermongroup/ddim"
        elif name == "official":
            found[name] = Official(spec, state, Path(str(official)))
        elif name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            missing[name] = f"the package {PACKAGES[name]} is not installed; --path FOLDER adds a folder that holds it"
        else:
            found[name] = PEERS[name](spec, state)
    return found, missing


def check_same_work(peers: dict[str, Peer], image_shape: tuple[int, ...]) -> dict[str, float]:
    """Return how far each peer's output is from ours on the same weights, relative to the largest of ours.

    Raises:
        UserError: a peer that should compute the same does not.
    """
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *image_shape, generator=generator), torch.tensor([10, 900])
    outputs = {}
    for name, peer in peers.items():
        if peer.same_network:
            with torch.no_grad():
                outputs[name] = peer.network().eval()(x, t)
    ours = outputs.pop("ours", next(iter(outputs.values()), None))
    apart = {name: float((output - ours).abs().max() / ours.abs().max()) for name, output in outputs.items()}
    for name, distance in apart.items():
        if not math.isfinite(distance) or distance > 1e-4:
            raise UserError(f"{name} gives another output than ours on the same weights ({distance:.1e} of its range).")
    return apart


PACKAGES = {"diffusers": "diffusers", "ddpm_pytorch": "denoising_diffusion_pytorch"}
PEERS: dict[str, Callable[..., Peer]] = {
    "ours": Ours,
    "official": Official,
    "diffusers": Diffusers,
    "ddpm_pytorch": DenoisingDiffusionPytorch,
}
