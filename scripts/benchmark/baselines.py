"""Three other code bases, each used as its users do."""

import importlib
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ours import EMA_RATE, Baseline, Call, Ours, T, Training
from torch import Tensor, nn

from ddim.checkpoints import StoredModel
from ddim.checkpoints.convert.exporting import write_diffusers
from ddim.errors import UserError

LEARNING_RATE = 2e-4


class Official(Baseline):
    """The official implementation: its model, `generalized_steps`, loss, optimiser and average."""

    about = "its sampler copies every step to the host; its PNG files are not written"
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
        network = self.load("models.diffusion").Model(self.config)
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
        adam = self.load("functions").get_optimizer(self.config, model.parameters())
        betas = self.betas.to(device)

        def loss(images: Tensor) -> Tensor:
            x = 2 * images - 1
            t = torch.randint(low=0, high=T, size=(batch // 2 + 1,)).to(device)
            t = torch.cat([t, T - t - 1], dim=0)[:batch]
            return noise_estimation_loss(model, x, t, torch.randn_like(x), betas)

        return (model, loss, adam, lambda: average.update(model))


class Diffusers(Baseline):
    """diffusers: UNet2DModel, `DDIMPipeline`, and the step of its unconditional training example."""

    about = "pixels as float32 arrays"

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
    """denoising-diffusion-pytorch with its own U-Net: linear attention, RMS norms, 7x7 first convolution."""

    about, same_network = "another U-Net: compare images/s together with its operations", False

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


BASELINES: dict[str, type[Baseline]] = {
    "ours": Ours,
    "official": Official,
    "diffusers": Diffusers,
    "ddpm_pytorch": DenoisingDiffusionPytorch,
}
