"""Our code and three others behind one interface, each used as its users do.

All have DDPM's U-Net with the same weights; denoising-diffusion-pytorch has its own, at the nearest size. Training
steps start from a batch in the host's memory, samples end as pixels there. Nothing is written to disk.
"""

import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ours import Baseline, Ours, State, T, Training
from timing import apply
from torch import Tensor, nn

from ddim.checkpoints import ModelSpec, StoredModel
from ddim.diffusion.schedule import linear_schedule
from ddim.errors import UserError
from ddim.networks import UNetSpec, build_network

RATE, LEARNING_RATE = 0.9999, 2e-4


class Official(Baseline):
    """The official implementation: its model, `generalized_steps`, loss, optimiser and average."""

    about = "its sampler copies every step to the host; its PNG files are not written"
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64).float()

    def load(self, module: str) -> Any:
        """Import one file of the checkout."""
        path = self.checkout / f"{module}.py"
        if not path.is_file():
            raise UserError(f"{path} does not exist; --official takes the folder of a checkout of ermongroup/ddim.")
        spec: Any = importlib.util.spec_from_file_location(f"official_{module.replace('/', '_')}", path)
        sys.modules[spec.name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    @property
    def config(self) -> SimpleNamespace:
        """The configuration that its files expect."""
        if self.spec.num_groups != 32 or len({*self.spec.image_size}) > 1:
            raise UserError("the official implementation has 32 groups in every norm and square images only.")
        channels = {"in_channels": self.spec.channels, "out_ch": self.spec.channels}
        optim = {"optimizer": "Adam", "weight_decay": 0.0, "beta1": 0.9, "amsgrad": False, "eps": 1e-8}
        return SimpleNamespace(
            model=SimpleNamespace(type="simple", resamp_with_conv=True, **channels, **vars(self.spec)),
            data=SimpleNamespace(image_size=self.spec.image_size[0]),
            diffusion=SimpleNamespace(num_diffusion_timesteps=T),
            optim=SimpleNamespace(lr=LEARNING_RATE, **optim),
        )

    def network(self) -> nn.Module:
        """See `Baseline`."""
        network = self.load("models/diffusion").Model(self.config)
        network.load_state_dict(self.state)
        return network

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Callable[[], Any]:
        steps, move = self.load("functions/denoising").generalized_steps, Tensor.to
        model = nn.DataParallel(apply(setting, self.network().eval(), device))
        betas, times = self.betas.to(device), range(0, T, T // S)

        def to(x: Tensor, *args: Any, **options: Any) -> Tensor:  # its sampler says .to("cuda")
            return x if args == ("cuda",) and device.type != "cuda" else move(x, *args, **options)

        def sample() -> Tensor:
            with mock.patch.object(Tensor, "to", to):
                x = torch.randn(batch, *self.image_shape, device=device)
                images, _ = steps(x, times, model, betas, eta=0.0)
            return ((images[-1] + 1) / 2).clamp(0, 1)

        return sample

    def _training(self, setting: str, device: torch.device, batch: int) -> Training:
        noise_estimation_loss = self.load("functions/losses").noise_estimation_loss
        model = nn.DataParallel(apply(setting, self.network().train(), device))
        average = self.load("models/ema").EMAHelper(mu=RATE)
        average.register(model)
        adam = self.load("functions/__init__").get_optimizer(self.config, model.parameters())
        betas = self.betas.to(device)

        def loss(images: Tensor) -> Tensor:
            x = 2 * images - 1
            t = torch.randint(low=0, high=T, size=(batch // 2 + 1,)).to(device)
            t = torch.cat([t, T - t - 1], dim=0)[:batch]
            return noise_estimation_loss(model, x, t, torch.randn_like(x), betas)

        return Training(model, loss, adam, lambda: average.update(model))


class Diffusers(Baseline):
    """diffusers: UNet2DModel, `DDIMPipeline`, and the step of its unconditional training example."""

    about = "pixels as float32 arrays"

    def network(self) -> nn.Module:
        """See `Baseline`."""
        unet = self.unet()
        unet.register_forward_hook(lambda module, inputs, output: output.sample)
        return unet

    def unet(self) -> nn.Module:
        """Return its network, whose output has a field `sample`."""
        from diffusers import UNet2DModel

        from ddim.checkpoints.convert.exporting import write_diffusers

        stored = StoredModel(ModelSpec("unet", self.spec, linear_schedule(T)), self.state, "online", None)
        with tempfile.TemporaryDirectory() as folder:
            write_diffusers(stored, Path(folder), [], None)
            return UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)

    def scheduler(self) -> Any:
        """Return its noise schedule."""
        from diffusers import DDIMScheduler

        from ddim.checkpoints.convert.diffusers import scheduler_config

        return DDIMScheduler.from_config(scheduler_config(linear_schedule(T), "eps"))

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Callable[[], Any]:
        from diffusers import DDIMPipeline

        pipeline: Any = DDIMPipeline(apply(setting, self.unet().eval(), device), self.scheduler())
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)
        return lambda: pipeline(batch, num_inference_steps=S, output_type="np").images

    def _training(self, setting: str, device: torch.device, batch: int) -> Training:
        from diffusers.training_utils import EMAModel

        unet, scheduler = apply(setting, self.unet().train(), device), self.scheduler()
        average = EMAModel(unet.parameters(), decay=RATE)
        average.to(device)

        def loss(images: Tensor) -> Tensor:
            x = 2 * images - 1
            noise, t = torch.randn_like(x), torch.randint(0, T, (batch,), device=device)
            return F.mse_loss(unet(scheduler.add_noise(x, noise, t), t).sample.float(), noise)

        adam = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
        return Training(unet, loss, adam, lambda: average.step(unet.parameters()), log_first=False)


class DenoisingDiffusionPytorch(Baseline):
    """denoising-diffusion-pytorch with its own U-Net: linear attention, RMS norms, 7x7 first convolution."""

    same_network = False
    about = "another U-Net: compare images/s together with its operations"

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
        network = apply(setting, self.network(), device)
        return GaussianDiffusion(network, image_size=self.spec.image_size, **options).to(device)

    def _sampling(self, setting: str, device: torch.device, batch: int, S: int) -> Callable[[], Any]:
        diffusion = self.diffusion(setting, device, S).eval()
        return lambda: diffusion.sample(batch_size=batch).cpu()

    def _training(self, setting: str, device: torch.device, batch: int) -> Training:
        from ema_pytorch import EMA as Average

        diffusion = self.diffusion(setting, device).train()
        plain = self.diffusion("default", device)  # a compiled module cannot be copied
        average = Average(diffusion, ema_model=plain, beta=RATE, update_every=10).to(device)
        adam = torch.optim.Adam(diffusion.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
        return Training(diffusion, diffusion, adam, average.update)


def random_weights(spec: UNetSpec) -> State:
    """Return weights that give outputs of order 1, unlike a freshly initialised network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network("unet", UNetSpec(**{**vars(spec), "init": "torch"}))
        return {name: value + 0.05 * torch.randn_like(value) for name, value in network.state_dict().items()}


def build_baselines(
    names: list[str], spec: UNetSpec, official: str | None
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Return the code bases that are installed, and the reasons for those that are missing."""
    state, built, missing = random_weights(spec), {}, {}
    for name in names:
        if name == "official" and official is None:
            missing[name] = "give --official PATH of a checkout of ermongroup/ddim"
        elif name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            missing[name] = f"the package {PACKAGES[name]} is not installed; --path FOLDER adds a folder that holds it"
        else:
            built[name] = BASELINES[name](spec, state, Path(official or ""))
    return built, missing


def output_differences(baselines: dict[str, Baseline]) -> dict[str, float]:
    """Return the largest difference of each output to ours on the same weights, relative to our largest value.

    Raises:
        UserError: a difference above 1e-4.
    """
    outputs = {}
    for name, baseline in baselines.items():
        if baseline.same_network:
            x = torch.randn(2, *baseline.image_shape, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                outputs[name] = baseline.network().eval()(x, torch.tensor([10, 900]))
    ours = outputs.pop("ours", next(iter(outputs.values()), torch.ones(1)))
    differences = {name: float((output - ours).abs().max() / ours.abs().max()) for name, output in outputs.items()}
    for name, difference in differences.items():
        if not math.isfinite(difference) or difference > 1e-4:
            raise UserError(f"{name} has another output than ours on the same weights ({difference:.1e} of its range).")
    return differences


PACKAGES = {"diffusers": "diffusers", "ddpm_pytorch": "denoising_diffusion_pytorch"}
BASELINES: dict[str, type[Baseline]] = {
    "ours": Ours,
    "official": Official,
    "diffusers": Diffusers,
    "ddpm_pytorch": DenoisingDiffusionPytorch,
}
