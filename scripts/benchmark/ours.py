"""What the speed benchmark asks of a code base, and our own."""

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import Variant, apply, autocast, repeated, words
from torch import Tensor, nn

from ddim.checkpoints import LoadedModel, ModelSpec
from ddim.data.batches import MicroBatches, random_flip
from ddim.data.datamodule import ImageDataModule
from ddim.data.datasets import DataSpec
from ddim.data.images import MemoryImages, normalize
from ddim.diffusion.objective import TIME_SAMPLERS, per_sample_loss, training_noise
from ddim.diffusion.schedule import linear_schedule
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import generate
from ddim.networks import UNetSpec, build_network
from ddim.training.dry_run import Stopwatch
from ddim.training.ema import EMA
from ddim.training.run import build_module, build_trainer
from ddim.training.spec import TrainerSpec, TrainSpec

T = 1000
State = dict[str, Tensor]


class Training(NamedTuple):
    """What a training step of a plain loop needs; `loss` takes images (B, C, H, W) in [0, 1]."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    adam: Any
    average: Callable[[], Any]
    log_first: bool = True  # the loss is read for a log before the backward pass, not after the step


class Baseline:
    """A code base: `network` on the CPU, called with (x, zero-based times); one batch of samples; one training step.

    Attributes:
        same_network: it can have our weights, and then must return our output.
        about: what to know of its numbers.
    """

    same_network = True
    about = ""

    def __init__(self, spec: UNetSpec, state: State, checkout: Path) -> None:
        self.spec, self.state, self.checkout = spec, state, checkout
        self.image_shape = (spec.channels, *spec.image_size)

    def network(self) -> nn.Module:
        """Return a new network on the CPU, with our weights if it can have them."""
        raise NotImplementedError

    def sampler(self, setting: str, device: torch.device, batch: int, S: int) -> Variant:
        """Return what makes `batch` images in S deterministic steps."""
        sample = self._sampling(setting, device, batch, S)

        def call() -> Any:
            with autocast(setting, device):
                return sample()

        return repeated(call, device)

    def trainer(self, setting: str, device: torch.device, batch: int) -> Variant:
        """Return what takes one training step: loss, gradient, clipping, Adam, average."""
        model, loss_of, adam, average, log_first = self._training(setting, device, batch)
        images = torch.rand(batch, *self.image_shape)

        def call() -> None:
            with autocast(setting, device):
                loss = loss_of(images.to(device))
            if log_first:
                loss.item()
            training_step(loss, model, adam)
            average()
            if not log_first:
                loss.item()

        return repeated(call, device)

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Callable[[], Any]:
        raise NotImplementedError

    def _training(self, setting: str, device: torch.device, batch: int) -> Training:
        raise NotImplementedError


class Ours(Baseline):
    """This code base: `generate`, and training through Lightning."""

    about = "pixels as bytes; training through Lightning, with data, noise and averages as in scripts/train.py"

    def network(self) -> nn.Module:
        """See `Baseline`."""
        network = build_network("unet", self.spec)
        network.load_state_dict(self.state)
        return network

    def loaded(self, setting: str, device: torch.device) -> LoadedModel:
        """Return the model on the device, as for sampling."""
        network = apply(setting, self.network().eval().requires_grad_(False), device)
        return LoadedModel(ModelSpec("unet", self.spec, linear_schedule(T)), network, "online", "", None)

    def sampler(self, setting: str, device: torch.device, batch: int, S: int) -> Variant:
        """See `Baseline`."""
        model, sampler = self.loaded(setting, device), SamplerSpec(S=S, spacing="uniform")
        compute = ComputeSpec(str(device), batch, bf16="bf16" in setting)
        return repeated(lambda: generate(model, sampler, range(batch), 0, compute), device)

    def module(self, setting: str, device: torch.device, batch: int) -> tuple[TrainSpec, Any, MemoryImages]:
        """Return spec, module and random images of a training of a few steps."""
        if "graphs" in setting:
            raise UserError("our training has no CUDA graphs")
        options: Any = dict.fromkeys(words(setting) - {"bf16"}, True)
        options |= {"precision": "bf16-mixed" if "bf16" in setting else "32-true", "accelerator": device.type}
        trainer = TrainerSpec(max_steps=3 if device.type == "cpu" else 25, batch_size=batch, devices=1, **options)
        data = DataSpec(name="cifar10", size=self.spec.image_size, channels=self.spec.channels)
        network = {"name": "unet", **vars(self.spec), "init": "torch"}
        spec = TrainSpec("benchmark", tempfile.gettempdir(), data, network, trainer=trainer)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(256, (max(batch, 512), *self.image_shape), generator=generator, dtype=torch.uint8)
        return spec, build_module(spec, spec.model_spec()), MemoryImages("random", pixels)

    def trainer(self, setting: str, device: torch.device, batch: int, resident: bool | None = None) -> Variant:
        """See `Baseline`; resident=False leaves the images on the host."""
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        spec, module, images = self.module(setting, device, batch)
        steps = spec.trainer.max_steps

        def run() -> float:
            assert spec.ema is not None
            stopwatch = Stopwatch(1)
            trainer = build_trainer(spec, Path(spec.output_dir), [EMA(spec.ema), stopwatch], [], max_steps=steps)
            trainer.fit(module, ImageDataModule(images, batch, spec.seed, steps, flip=True, device_resident=resident))
            return stopwatch.seconds_per_step

        return run


def plain_loop(
    ours: Ours, setting: str, device: torch.device, batch: int, average_at_once: bool = True, **adam: bool
) -> Variant:
    """Return the step of our training without Lightning, with the same kernels by default."""
    spec, module, images = ours.module(setting, device, batch)
    module.to(device)
    parameters, o = list(module.network.parameters()), spec.optim
    optimizer: Any = torch.optim.Adam(parameters, lr=o.lr, betas=o.betas, eps=o.eps, **adam)
    average, weights = [p.detach().clone() for p in parameters], [p.detach() for p in parameters]
    data, resident = MicroBatches(len(images), batch, spec.seed, 100_000), images.images.to(device)
    steps = iter(range(100_000))

    def call() -> None:
        k = next(steps)
        positions, indices = (data[k][name].to(device) for name in ("positions", "indices"))
        x0 = normalize(random_flip(resident[indices], spec.seed, k, positions))
        t = TIME_SAMPLERS[spec.objective.times](module.spec.schedule.T, spec.seed, k, positions)
        eps = training_noise(spec.seed, k, positions, x0.shape[1:])
        with autocast(setting, device):
            loss = per_sample_loss(module.model, module.alpha_bar, x0, t, eps).mean()
        training_step(loss, module.network, optimizer, o.grad_clip or float("inf"))
        for i in [slice(None)] if average_at_once else [slice(i, i + 1) for i in range(len(average))]:
            torch._foreach_lerp_(average[i], weights[i], 1 - 0.9999)

    return repeated(call, device)


def training_step(loss: Tensor, model: nn.Module, adam: Any, clip: float = 1.0) -> None:
    """Take the gradient of the loss, clip it, and let Adam step."""
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    adam.step()
