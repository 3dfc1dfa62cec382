"""Networks by name, and the adapter between the paper's times and theirs."""

from ddim.networks.acceleration import tune_network
from ddim.networks.registry import NETWORKS, build_network
from ddim.networks.time_adapter import zero_based
from ddim.networks.unet import UNet, UNetSpec

__all__ = ["NETWORKS", "UNet", "UNetSpec", "build_network", "tune_network", "zero_based"]
