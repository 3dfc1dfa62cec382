"""Our code and three others behind one interface, each used as its users do."""

import importlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from timing import Variant, autocast, clock, repeated, words
from torch import Tensor, nn

from ddim.checkpoints import LoadedModel, ModelSpec, StoredModel
from ddim.checkpoints.convert.exporting import write_diffusers
from ddim.data.datamodule import ImageDataModule
from ddim.data.datasets import DataSpec
from ddim.data.images import MemoryImages
from ddim.diffusion.schedule import linear_schedule
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference.auto import SETTINGS
from ddim.inference.compute import ComputeSpec, prepare_model
from ddim.inference.generate import generate
from ddim.networks import UNetSpec, accelerate, build_network, float32_products
from ddim.networks.cpu.norm_silu import fuse_norms
from ddim.networks.cpu.winograd import use_winograd
from ddim.training.dry_run import Stopwatch
from ddim.training.ema import EMA, EMASpec
from ddim.training.run import build_module, build_trainer, choose_trainer
from ddim.training.spec import TrainerSpec, TrainSpec

T, EMA_RATE, LEARNING_RATE = 1000, 0.9999, 2e-4
Call = Callable[[], Any]
# Of a training step: the module, the loss of images (B, C, H, W) in [0, 1], the optimiser, the update of the average.
Training = tuple[nn.Module, Callable[[Tensor], Tensor], Any, Call]
LOOPS = {"convolutions": use_winograd, "norms": fuse_norms}  # the parts of winograd, each alone


class Baseline:
    """A code base. Settings are words such as bf16+compile (`timing.words`)."""

    same_network = True  # it can have our weights, and then must return our output

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
    """This code base: `generate`, and training through Lightning with data, noise and averages as in train.py."""

    @staticmethod
    def split(setting: str) -> tuple[dict[str, Any], Callable[[nn.Module], None]]:
        """Return the options of a setting, and what lets a network use those of the C++ loops that it names alone."""
        options: dict[str, Any] = words(setting)
        if options.pop("auto", False):
            options = dict.fromkeys(SETTINGS) | options
        chosen = [use for name, use in LOOPS.items() if options.pop(name, False)]

        def use_loops(network: nn.Module) -> None:
            for use in chosen:
                use(network)

        return options, use_loops

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Call:
        options, use_loops = self.split(setting)
        compute, sampler = ComputeSpec(str(device), batch, **options), SamplerSpec(S=S, spacing="uniform")
        model = LoadedModel(self.model_spec, self.network().eval().requires_grad_(False), "online", "", None)
        compute = prepare_model(model, compute, S * batch, batch)
        use_loops(model.network)
        return lambda: generate(model, sampler, range(batch), 0, compute)

    def trainer(self, setting: str, device: torch.device, batch: int) -> Variant:
        """Return the timing of the steps of a short training, without the first."""
        warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        options, use_loops = self.split(setting)
        precision: Any = {True: "bf16-mixed", False: "32-true", None: None}[options.pop("bf16", False)]
        options.pop("graphs", None)  # not for training
        steps = 3 if device.type == "cpu" else 25
        trainer = TrainerSpec(steps, batch, accelerator=device.type, precision=precision, **options)
        data = DataSpec(name="cifar10", size=self.spec.image_size, channels=self.spec.channels)
        network = {"name": "unet", **vars(self.spec), "init": "torch"}
        spec = TrainSpec("benchmark", tempfile.gettempdir(), data, network, trainer=trainer)
        spec, _ = choose_trainer(spec, spec.model_spec())
        module = build_module(spec, spec.model_spec())
        use_loops(module.network)
        images = MemoryImages("random", torch.randint(256, (max(batch, 512), *self.image_shape), dtype=torch.uint8))

        def run() -> float:
            stopwatch = Stopwatch(1, clock)
            callbacks = [EMA(EMASpec(EMA_RATE)), stopwatch]
            lightning = build_trainer(spec, Path(spec.output_dir), callbacks, [], max_steps=steps)
            with float32_products(bool(spec.trainer.tf32)):  # as train.py
                lightning.fit(module, ImageDataModule(images, batch, spec.seed, steps, flip=True))
            return stopwatch.seconds_per_step

        return run


class Official(Baseline):
    """The official implementation: model, loss, average, and `generalized_steps`, which copies each step to the CPU."""

    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64).float()

    def load(self, module: str) -> Any:
        """Import a module of the checkout."""
        if not Path(str(self.checkout), "models", "diffusion.py").is_file():
            raise UserError(f"{self.checkout}: --official takes the folder of a checkout of ermongroup/ddim.")
        with mock.patch.object(sys, "path", [str(self.checkout), *sys.path]):
            return importlib.import_module(module)

    @property
    def config(self) -> SimpleNamespace:
        """The configuration that its files expect."""
        channels = {"in_channels": self.spec.channels, "out_ch": self.spec.channels}
        return SimpleNamespace(
            model=SimpleNamespace(type="simple", resamp_with_conv=True, **channels, **vars(self.spec)),
            data=SimpleNamespace(image_size=self.spec.image_size[0]),
            diffusion=SimpleNamespace(num_diffusion_timesteps=T),
        )

    def network(self) -> nn.Module:
        """See `Baseline`."""
        code = self.load("models.diffusion")
        code.Normalize = partial(nn.GroupNorm, self.spec.num_groups, eps=1e-6)  # its own has 32 groups
        network = code.Model(self.config)
        network.load_state_dict(self.weights)
        return network

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Call:
        steps, move = self.load("functions.denoising").generalized_steps, Tensor.to
        model = nn.DataParallel(self.prepare(setting, self.network().eval(), device))
        betas, times = self.betas.to(device), range(0, T, T // S)

        def to(x: Tensor, *args: Any, **options: Any) -> Tensor:  # its sampler calls .to("cuda")
            return x if args == ("cuda",) and device.type != "cuda" else move(x, *args, **options)

        def sample() -> Tensor:
            with mock.patch.object(Tensor, "to", to):
                images, _ = steps(torch.randn(batch, *self.image_shape, device=device), times, model, betas, eta=0.0)
            return ((images[-1] + 1) / 2).clamp(0, 1)

        return sample

    def _training(self, setting: str, device: torch.device, batch: int) -> Training:
        noise_estimation_loss = self.load("functions.losses").noise_estimation_loss
        model = nn.DataParallel(self.prepare(setting, self.network().train(), device))
        average = self.load("models.ema").EMAHelper(mu=EMA_RATE)
        average.register(model)
        adam, betas = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), self.betas.to(device)

        def loss(images: Tensor) -> Tensor:
            x = 2 * images - 1
            t = torch.randint(low=0, high=T, size=(batch // 2 + 1,)).to(device)
            t = torch.cat([t, T - t - 1], dim=0)[:batch]
            return noise_estimation_loss(model, x, t, torch.randn_like(x), betas)

        return (model, loss, adam, lambda: average.update(model))


class Diffusers(Baseline):
    """diffusers: UNet2DModel, `DDIMPipeline`, and the step of its unconditional training example."""

    def pipeline(self) -> Any:
        """Return its pipeline with our weights."""
        from diffusers import DDIMPipeline

        with tempfile.TemporaryDirectory() as folder:
            write_diffusers(StoredModel(self.model_spec, self.weights, "online", None), Path(folder), [], None)
            return DDIMPipeline.from_pretrained(folder, low_cpu_mem_usage=False)

    def network(self) -> nn.Module:
        """See `Baseline`."""
        unet = self.pipeline().unet
        unet.register_forward_hook(lambda module, inputs, output: output.sample)
        return unet

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Call:
        pipeline = self.pipeline().to(device)
        self.prepare(setting, pipeline.unet.eval(), device)
        pipeline.set_progress_bar_config(disable=True)
        return lambda: pipeline(batch, num_inference_steps=S, output_type="np").images

    def _training(self, setting: str, device: torch.device, batch: int) -> Training:
        from diffusers.training_utils import EMAModel

        pipeline = self.pipeline()
        unet, scheduler = self.prepare(setting, pipeline.unet.train(), device), pipeline.scheduler
        average = EMAModel(unet.parameters(), decay=EMA_RATE)
        average.to(device)

        def loss(images: Tensor) -> Tensor:
            x = 2 * images - 1
            noise, t = torch.randn_like(x), torch.randint(0, T, (batch,), device=device)
            return F.mse_loss(unet(scheduler.add_noise(x, noise, t), t).sample.float(), noise)

        adam = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
        return (unet, loss, adam, lambda: average.step(unet.parameters()))


class DenoisingDiffusionPytorch(Baseline):
    """denoising-diffusion-pytorch with its own U-Net: linear attention, RMS norms, fewer operations."""

    same_network = False

    def network(self) -> nn.Module:
        """See `Baseline`."""
        from denoising_diffusion_pytorch import Unet

        # For the CIFAR-10 network 144: 36.0 M parameters and 11.3 GFLOP, compared with 35.7 M and 12.4.
        dim = round(self.spec.ch * 1.125 / 8) * 8
        return Unet(dim, dim_mults=self.spec.ch_mult, channels=self.spec.channels, dropout=self.spec.dropout)

    def diffusion(self, setting: str, device: torch.device, S: int = 10) -> Any:
        """Return its model around a new network."""
        from denoising_diffusion_pytorch import GaussianDiffusion

        options = {"objective": "pred_noise", "beta_schedule": "linear", "sampling_timesteps": S, "timesteps": T}
        network = self.prepare(setting, self.network(), device)
        return GaussianDiffusion(network, image_size=self.spec.image_size, **options).to(device)

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Call:
        diffusion = self.diffusion(setting, device, S).eval()
        return lambda: diffusion.sample(batch_size=batch).cpu()

    def _training(self, setting: str, device: torch.device, batch: int) -> Training:
        from ema_pytorch import EMA

        diffusion, plain = self.diffusion(setting, device).train(), self.diffusion("default", device)
        average = EMA(diffusion, ema_model=plain, beta=EMA_RATE, update_every=10).to(device)  # compiled is not copied
        adam = torch.optim.Adam(diffusion.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
        return (diffusion, diffusion, adam, average.update)


def random_weights(spec: UNetSpec) -> dict[str, Tensor]:
    """Return weights that give outputs of order 1, unlike a freshly initialised network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network("unet", UNetSpec(**{**vars(spec), "init": "torch"}))
        return {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}


BASELINES: dict[str, type[Baseline]] = {
    "ours": Ours,
    "official": Official,
    "diffusers": Diffusers,
    "ddpm_pytorch": DenoisingDiffusionPytorch,
}
