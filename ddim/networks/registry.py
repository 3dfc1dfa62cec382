"""Networks by name."""

from typing import Any

import torch
from torch import nn

from ddim.config import choose
from ddim.networks.categorical import CategoricalUNet, CategoricalUNetSpec
from ddim.networks.unet import UNet, UNetSpec


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


def without_memory(name: str) -> torch.device:
    """Return the device for a network that is only looked at: "meta", but torch's default for one of a plugin.

    The constructor of a plugin may read values of tensors or make them with another library, which fails on "meta".
    """
    is_own = NETWORKS[name][1].__module__.startswith("ddim.")
    return torch.device("meta") if is_own else torch.get_default_device()


NETWORKS: dict[str, tuple[type, type[nn.Module]]] = {
    "unet": (UNetSpec, UNet),
    "categorical_unet": (CategoricalUNetSpec, CategoricalUNet),
}
