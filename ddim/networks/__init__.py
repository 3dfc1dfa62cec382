"""Networks by name, and the adapter between the paper's times and theirs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ddim.config import choose
from ddim.networks.tuning import tune_network
from ddim.networks.unet import UNet, UNetSpec

__all__ = ["NETWORKS", "UNet", "UNetSpec", "build_network", "tune_network", "zero_based"]


def build_network(name: str, spec: Any) -> nn.Module:
    """Return the network `name` of NETWORKS, initialised, for a spec of the type that is registered with it.

    Raises:
        UserError: the name is not registered; the message lists those that are.
        TypeError: the spec belongs to another network.
    """
    spec_type, network_type = choose("network", name, NETWORKS)
    if not isinstance(spec, spec_type):
        raise TypeError(f"network {name!r} takes a {spec_type.__name__}, not a {type(spec).__name__}.")
    return network_type(spec)


def zero_based(network: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Let a network that was trained on the times 0..T-1 be called with the paper's times 1..T.

    This is the one place of that shift. The paper's time 0 is data, which no network is asked about: trajectories feed
    t >= 1 only.

    Args:
        network: (x (B, C, H, W), zero-based t (B,)) -> (B, C, H, W).

    Returns:
        model(x, t) = network(x, t - 1), with t (B,) the paper's times.
    """

    def model(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t - 1)

    return model


NETWORKS: dict[str, tuple[type, type[nn.Module]]] = {"unet": (UNetSpec, UNet)}
