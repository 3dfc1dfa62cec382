"""Models and specs for the tests of exports and of diffusers."""

from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ddim.checkpoints import ModelSpec, StoredModel
from ddim.checkpoints.convert.exporting import write_diffusers
from ddim.checkpoints.convert.model_card import Result
from ddim.diffusion.schedule import linear_schedule
from ddim.networks import UNet, UNetSpec

SMALL = UNetSpec((8, 8), channels=1, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_groups=4)
SPECS = {
    "small": SMALL,
    "oblong": UNetSpec((8, 12), 2, ch=8, ch_mult=(1, 2, 2), attn_resolutions=(8, 2), dropout=0.0, num_groups=2),
    "upright": UNetSpec((16, 8), 3, ch=4, ch_mult=(1, 1, 3), num_res_blocks=3, attn_resolutions=(4,), num_groups=2),
    "flat": UNetSpec((4, 6), 4, ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), dropout=0.5, num_groups=4),
}
HERE = Path("folder/config.json")


def randomised(spec, seed=0):
    """A network in which no weight is 0 or 1, norms and biases included, with outputs of order 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(replace(spec, init="torch")).eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    network.conv_out.weight.mul_(1.5)
    return network


def write(network, spec, folder, schedule=None, prediction="eps"):
    model = ModelSpec("unet", spec, schedule or linear_schedule(), prediction)
    write_diffusers(StoredModel(model, network.state_dict(), "ema", None), folder, [], None)


def gaussian(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MODEL = ModelSpec("unet", SMALL, linear_schedule(), "eps", "digits")
FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "README.md",
    "model_index.json",
)
RESULTS = (
    Result("fid_50k", "cifar10/train", "ddim eta=0 S=50", 4.6712345, "fid_50k: 50,000 images, tau quad, seed 0"),
    Result("fid_50k", "cifar10/train", "σ̂ S=1000", 3.0, "fid_50k: 50,000 images, tau full, seed 0"),
)


def weights(seed=0, spec=SMALL):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: torch.randn_like(value) for name, value in UNet(spec).state_dict().items()}


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def card_of(folder):
    """Return the front matter, read as the hub does, and the text after it."""
    empty, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), text
