"""Networks by name, the adapter between the paper's times and theirs, and what makes them faster."""

from ddim.networks.acceleration import accelerate, float32_products, has_cpp_loops
from ddim.networks.registry import NETWORKS, build_network, without_memory
from ddim.networks.time_adapter import zero_based
from ddim.networks.unet import UNet, UNetSpec

__all__ = [
    "NETWORKS",
    "UNet",
    "UNetSpec",
    "accelerate",
    "build_network",
    "float32_products",
    "has_cpp_loops",
    "without_memory",
    "zero_based",
]
