"""A small network as a command names it, and weights for it."""

import torch

from ddim.networks import UNet, UNetSpec

State = dict[str, torch.Tensor]
# What is typed for a network that is none of the presets, and what it means.
NETWORK = (
    "network=unet_digits",
    "network.image_size=[8,8]",
    "network.channels=1",
    "network.ch=16",
    "network.num_groups=4",
)
SPEC = UNetSpec((8, 8), 1, 16, (1, 1), 1, (4,), 0.0, 4)


def weights(spec: UNetSpec, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in UNet(spec).state_dict().items()}
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
