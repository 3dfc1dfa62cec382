"""Other code bases, as their users have them: the official implementation, diffusers, denoising-diffusion-pytorch."""

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _benchmark import Setting, Variant, clocked, without_cuda_calls
from torch import Tensor, nn

from ddim.checkpoints import ModelSpec, StoredModel
from ddim.diffusion.schedule import linear_schedule
from ddim.errors import UserError
from ddim.networks import UNetSpec

State = dict[str, Tensor]
T, RATE, LEARNING_RATE = 1000, 0.9999, 2e-4


class Official:
    """The official implementation, from a checkout: its model, `generalized_steps`, loss, optimiser and average."""

    same_network = True
    about = "its sampler copies every step to the host; its PNG files are not written"

    def __init__(self, spec: UNetSpec, state: State, checkout: Path) -> None:
        self.spec, self.state, self.checkout = spec, state, checkout
        self.config = _official_config(spec)
        self.betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64).float()

    def load(self, module: str) -> ModuleType:
        """Import one file of the checkout under a name of its own."""
        path = self.checkout / f"{module}.py"
        if not path.is_file():
            raise UserError(f"{path} is not there; --official takes the folder of a checkout of ermongroup/ddim.")
        found = importlib.util.spec_from_file_location(f"official_{module.replace('/', '_')}", path)
        assert found is not None
        assert found.loader is not None
        loaded = importlib.util.module_from_spec(found)
        sys.modules[found.name] = loaded
        found.loader.exec_module(loaded)
        return loaded

    def network(self) -> nn.Module:
        """See `Peer`."""
        network = self.load("models/diffusion").Model(self.config)
        network.load_state_dict(self.state)
        return network

    def sampler(self, setting: Setting, device: torch.device, batch: int, S: int) -> Variant:
        """See `Peer`."""
        steps = self.load("functions/denoising").generalized_steps
        model = nn.DataParallel(setting.apply(self.network().eval(), device))
        betas, times = self.betas.to(device), range(0, T, T // S)
        shape = (batch, self.spec.channels, *self.spec.image_size)

        def call() -> Tensor:
            with setting.autocast(device), without_cuda_calls(device):
                images, _ = steps(torch.randn(shape, device=device), times, model, betas, eta=0.0)
            return ((images[-1] + 1) / 2).clamp(0, 1)

        return clocked(call, device)

    def trainer(self, setting: Setting, device: torch.device, batch: int) -> Variant:
        """See `Peer`."""
        loss_of = self.load("functions/losses").noise_estimation_loss
        network = setting.apply(self.network().train(), device)
        model, average = nn.DataParallel(network), self.load("models/ema").EMAHelper(mu=RATE)
        average.register(model)
        adam = self.load("functions/__init__").get_optimizer(self.config, model.parameters())
        betas, images = self.betas.to(device), _floats(self.spec, batch)

        def call() -> float:
            x = 2 * images.to(device) - 1
            t = torch.randint(low=0, high=T, size=(batch // 2 + 1,)).to(device)
            t = torch.cat([t, T - t - 1], dim=0)[:batch]
            with setting.autocast(device):
                loss = loss_of(model, x, t, torch.randn_like(x), betas)
            logged = loss.item()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            average.update(model)
            return logged

        return clocked(call, device)


class Diffusers:
    """Hugging Face's diffusers: UNet2DModel, `DDIMPipeline`, and the step of its unconditional training example."""

    same_network = True
    about = "pixels as float32 arrays"

    def __init__(self, spec: UNetSpec, state: State) -> None:
        self.spec, self.state = spec, state

    def network(self) -> nn.Module:
        """See `Peer`."""
        from diffusers import UNet2DModel

        from ddim.checkpoints.convert.exporting import write_diffusers

        class Plain(nn.Module):
            """Called as the others are."""

            def __init__(self, unet: nn.Module) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                return self.unet(x, t).sample

        stored = StoredModel(ModelSpec("unet", self.spec, linear_schedule(T)), self.state, "online", None)
        with tempfile.TemporaryDirectory() as folder:
            write_diffusers(stored, Path(folder), [], None)
            unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
        return Plain(unet)

    def _parts(self, setting: Setting, device: torch.device) -> tuple[Any, Any]:
        from diffusers import DDIMScheduler

        from ddim.checkpoints.convert.diffusers import scheduler_config

        network: Any = self.network()
        unet: Any = setting.apply(network.unet, device)
        return unet, DDIMScheduler.from_config(scheduler_config(linear_schedule(T), "eps"))

    def sampler(self, setting: Setting, device: torch.device, batch: int, S: int) -> Variant:
        """See `Peer`."""
        from diffusers import DDIMPipeline

        unet, scheduler = self._parts(setting, device)
        pipeline: Any = DDIMPipeline(unet.eval(), scheduler)
        pipeline.to(device)
        pipeline.set_progress_bar_config(disable=True)

        def call() -> Any:
            with setting.autocast(device):
                return pipeline(batch, num_inference_steps=S, output_type="np").images

        return clocked(call, device)

    def trainer(self, setting: Setting, device: torch.device, batch: int) -> Variant:
        """See `Peer`."""
        from diffusers.training_utils import EMAModel

        unet, scheduler = self._parts(setting, device)
        unet.train()
        adam = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
        average = EMAModel(unet.parameters(), decay=RATE)
        average.to(device)
        images = _floats(self.spec, batch)

        def call() -> float:
            x = 2 * images.to(device) - 1
            noise, t = torch.randn_like(x), torch.randint(0, T, (batch,), device=device)
            with setting.autocast(device):
                output = unet(scheduler.add_noise(x, noise, t), t).sample
                loss = F.mse_loss(output.float(), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            average.step(unet.parameters())
            return loss.item()

        return clocked(call, device)


class DenoisingDiffusionPytorch:
    """denoising-diffusion-pytorch with its own U-Net: linear attention, RMS norms, 7x7 first convolution."""

    same_network = False
    about = "another U-Net: compare images/s together with its operations"

    def __init__(self, spec: UNetSpec, state: State) -> None:
        self.spec = spec

    def network(self) -> nn.Module:
        """See `Peer`."""
        from denoising_diffusion_pytorch import Unet

        # 144 makes 36.0 M parameters and 11.3 GFLOP of the CIFAR-10 network's 35.7 M and 12.4.
        dim = round(self.spec.ch * 1.125 / 8) * 8
        return Unet(dim, dim_mults=self.spec.ch_mult, channels=self.spec.channels, dropout=self.spec.dropout)

    def _diffusion(self, setting: Setting, device: torch.device, S: int) -> Any:
        from denoising_diffusion_pytorch import GaussianDiffusion

        network = setting.apply(self.network(), device)
        options = {"objective": "pred_noise", "beta_schedule": "linear", "sampling_timesteps": S}
        return GaussianDiffusion(network, image_size=self.spec.image_size, timesteps=T, **options).to(device)

    def sampler(self, setting: Setting, device: torch.device, batch: int, S: int) -> Variant:
        """See `Peer`."""
        diffusion = self._diffusion(setting, device, S).eval()

        def call() -> Tensor:
            with setting.autocast(device):
                return diffusion.sample(batch_size=batch).cpu()

        return clocked(call, device)

    def trainer(self, setting: Setting, device: torch.device, batch: int) -> Variant:
        """See `Peer`."""
        from ema_pytorch import EMA

        diffusion = self._diffusion(setting, device, 10).train()
        adam = torch.optim.Adam(diffusion.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
        plain = Setting().apply(self._diffusion(Setting(), device, 10), device)  # a compiled module cannot be copied
        average = EMA(diffusion, ema_model=plain, beta=RATE, update_every=10).to(device)
        images = _floats(self.spec, batch)

        def call() -> float:
            with setting.autocast(device):
                loss = diffusion(images.to(device))
            logged = loss.item()
            loss.backward()
            nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            average.update()
            return logged

        return clocked(call, device)


def _official_config(spec: UNetSpec) -> SimpleNamespace:
    if spec.num_groups != 32 or spec.image_size[0] != spec.image_size[1]:
        raise UserError("the official implementation has 32 groups in every norm and square images only.")
    names = {"ch": spec.ch, "ch_mult": spec.ch_mult, "num_res_blocks": spec.num_res_blocks, "dropout": spec.dropout}
    model = {"type": "simple", "in_channels": spec.channels, "out_ch": spec.channels, "resamp_with_conv": True, **names}
    optim = {"optimizer": "Adam", "lr": LEARNING_RATE, "weight_decay": 0.0, "beta1": 0.9, "amsgrad": False, "eps": 1e-8}
    return SimpleNamespace(
        model=SimpleNamespace(attn_resolutions=list(spec.attn_resolutions), **model),
        data=SimpleNamespace(image_size=spec.image_size[0]),
        diffusion=SimpleNamespace(num_diffusion_timesteps=T),
        optim=SimpleNamespace(**optim),
    )


def _floats(spec: UNetSpec, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, spec.channels, *spec.image_size, generator=generator)
