"""A tiny untrained model in a checkpoint, as training writes it."""

from pathlib import Path

import torch

from ddim.checkpoints import ModelSpec
from ddim.checkpoints.model import EMA_STATE, NETWORK_PREFIX
from ddim.checkpoints.spec import KEY
from ddim.diffusion.schedule import linear_schedule
from ddim.networks import UNetSpec, build_network


def write_checkpoint(path: Path, seed: int = 0, step: int = 4, classes: tuple[str, ...] = ()) -> Path:
    """Write an 8x8 grey model of random weights, the averaged ones near the online ones; conditional with classes."""
    network_spec = UNetSpec(
        (8, 8),
        1,
        ch=8,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
        num_groups=4,
        init="torch",
        classes=len(classes) or None,
    )
    schedule = linear_schedule(50, 2e-3, 0.4)  # DDPM's, twenty times shorter
    spec = ModelSpec("unet", network_spec, schedule, data="digits", classes=classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_network("unet", network_spec).state_dict()
        shadow = {name: value + 0.05 * torch.randn_like(value) for name, value in state.items()}
    torch.save(
        {
            "global_step": step,
            "state_dict": {NETWORK_PREFIX + name: value for name, value in state.items()},
            "callbacks": {EMA_STATE: {"shadow": shadow, "updates": step, "decay": 0.9999}},
            KEY: spec.to_dict(),
        },
        path,
    )
    return path
