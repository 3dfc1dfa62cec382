"""A small network as a command names it, and weights for it."""

from layouts import gaussian_weights

from ddim.networks import UNetSpec

# What is typed for a network that is none of the presets, and what it means.
NETWORK = (
    "network=unet_digits",
    "network.image_size=[8,8]",
    "network.channels=1",
    "network.ch=16",
    "network.num_groups=4",
)
SPEC = UNetSpec((8, 8), 1, 16, (1, 1), 1, (4,), 0.0, 4)


def weights(spec: UNetSpec, seed: int = 0):
    return gaussian_weights(spec, seed, 0.05)
