"""What the benchmark asks of a code base, and our own."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import Variant, autocast, repeated, words
from torch import Tensor, nn

from ddim.checkpoints import LoadedModel, ModelSpec
from ddim.data.datamodule import ImageDataModule
from ddim.data.datasets import DataSpec
from ddim.data.images import MemoryImages
from ddim.diffusion.schedule import linear_schedule
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference.compute import ComputeSpec, prepare_model
from ddim.inference.generate import generate
from ddim.networks import UNetSpec, accelerate, build_network
from ddim.training.dry_run import Stopwatch
from ddim.training.ema import EMA, EMASpec
from ddim.training.run import build_module, build_trainer
from ddim.training.spec import TrainerSpec, TrainSpec

T, EMA_RATE = 1000, 0.9999
Call = Callable[[], Any]
# Of a training step: the module, the loss of images (B, C, H, W) in [0, 1], the optimiser, the update of the average.
Training = tuple[nn.Module, Callable[[Tensor], Tensor], Any, Call]


class Baseline:
    """A code base. Settings are words such as bf16+compile (`timing.words`).

    Attributes:
        about: what to know of its numbers.
        same_network: it can have our weights, and then must return our output.
    """

    about, same_network = "", True

    def __init__(self, spec: UNetSpec, weights: dict[str, Tensor], checkout: str | None) -> None:
        self.spec, self.weights, self.checkout = spec, weights, checkout
        self.image_shape = (spec.channels, *spec.image_size)
        self.model_spec = ModelSpec("unet", spec, linear_schedule(T))

    def network(self) -> nn.Module:
        """Return a new network on the CPU, called with (x, zero-based times), with our weights if it can have them."""
        network = build_network("unet", self.spec)
        network.load_state_dict(self.weights)
        return network

    @staticmethod
    def prepare(setting: str, network: nn.Module, device: torch.device) -> nn.Module:
        """Move a network to the device and accelerate it, in place; bf16 is the matter of `autocast`."""
        accelerate(network.to(device), device, **{word: True for word in words(setting) if word != "bf16"})
        return network

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Call:
        """Return what makes `batch` images in S deterministic steps, and ends with pixels on the CPU."""
        raise NotImplementedError

    def _training(self, setting: str, device: torch.device, batch: int) -> Training:
        raise NotImplementedError

    def sampler(self, setting: str, device: torch.device, batch: int, S: int) -> Variant:
        """Return the timing of a batch of samples."""
        return repeated(autocast(setting, device)(self._sampling(setting, device, batch, S)))

    def trainer(self, setting: str, device: torch.device, batch: int) -> Variant:
        """Return the timing of a training step from images on the CPU: loss, gradient, clipping, Adam, average."""
        model, loss_of, adam, update_ema = self._training(setting, device, batch)
        images = torch.rand(batch, *self.image_shape)

        def step() -> None:
            with autocast(setting, device):
                loss = loss_of(images.to(device))
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            update_ema()
            loss.item()  # for a log

        return repeated(step)


class Ours(Baseline):
    """This code base: `generate`, and training through Lightning."""

    about = "pixels as bytes; training through Lightning, with data, noise and averages as in scripts/train.py"

    def loaded(self, setting: str, device: torch.device, batch: int) -> tuple[LoadedModel, ComputeSpec]:
        """Return the model on the device, as for sampling, and how it is computed."""
        model = LoadedModel(self.model_spec, self.network().eval().requires_grad_(False), "online", "", None)
        compute = ComputeSpec(str(device), batch, **words(setting))
        return prepare_model(model, compute), compute

    def sampler(self, setting: str, device: torch.device, batch: int, S: int, batches: int = 1) -> Variant:
        """Return the timing of some batches of samples."""
        model, compute = self.loaded(setting, device, batch)
        sampler = SamplerSpec(S=S, spacing="uniform")
        return repeated(lambda: generate(model, sampler, range(batches * batch), 0, compute))

    def trainer(self, setting: str, device: torch.device, batch: int) -> Variant:
        """Return the timing of the steps of a short training, without the first."""
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        if "graphs" in setting:
            raise UserError("our training has no CUDA graphs")
        options: Any = words(setting)
        precision: Any = "bf16-mixed" if options.pop("bf16", False) else "32-true"
        steps = 3 if device.type == "cpu" else 25
        trainer = TrainerSpec(steps, batch, accelerator=device.type, precision=precision, **options)
        data = DataSpec(name="cifar10", size=self.spec.image_size, channels=self.spec.channels)
        network = {"name": "unet", **vars(self.spec), "init": "torch"}
        spec = TrainSpec("benchmark", tempfile.gettempdir(), data, network, trainer=trainer)
        module = build_module(spec, spec.model_spec())
        images = MemoryImages("random", torch.randint(256, (max(batch, 512), *self.image_shape), dtype=torch.uint8))

        def run() -> float:
            stopwatch = Stopwatch(1)
            callbacks = [EMA(EMASpec(EMA_RATE)), stopwatch]
            lightning = build_trainer(spec, Path(spec.output_dir), callbacks, [], max_steps=steps)
            lightning.fit(module, ImageDataModule(images, batch, spec.seed, steps, flip=True))
            return stopwatch.seconds_per_step

        return run


def random_weights(spec: UNetSpec) -> dict[str, Tensor]:
    """Return weights that give outputs of order 1, unlike a freshly initialised network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network("unet", UNetSpec(**{**vars(spec), "init": "torch"}))
        return {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}


def output_difference(name: str, code: Baseline) -> float | None:
    """Return the largest difference of its output to ours on the same weights, relative to our largest value.

    None for a code base with another network.

    Raises:
        UserError: a difference above 1e-4.
    """
    if not code.same_network:
        return None
    x, t = torch.randn(2, *code.image_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with torch.no_grad():
        ours, output = (network.eval()(x, t) for network in (Baseline.network(code), code.network()))
    difference = float((output - ours).abs().max() / ours.abs().max())
    if not difference <= 1e-4:  # nor NaN
        raise UserError(f"{name} has another output than ours on the same weights ({difference:.1e} of its range).")
    return difference
