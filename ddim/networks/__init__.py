"""Networks by name, and the adapter between the paper's times and theirs."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.config import choose
from ddim.networks.unet import UNet, UNetSpec

__all__ = ["NETWORKS", "UNet", "UNetSpec", "build_network", "compile_network", "zero_based"]

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's variable: where it keeps what it compiled


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


def compile_network(network: nn.Module) -> None:
    """Let torch compile a network when it is first called, with a cache that the next process finds again.

    torch keeps what it compiled below the temporary folder, which clusters empty after each job. Here it lies beside
    torch's other downloads, `~/.cache/torch/inductor` (TORCH_HOME moves that), unless TORCHINDUCTOR_CACHE_DIR names
    another folder or that one cannot be written.
    """
    folder = Path(torch.hub.get_dir()).parent / "inductor"
    there = next(path for path in (folder, *folder.parents) if path.exists())
    # Parts of torch set it to the temporary folder as soon as they are imported.
    named = os.environ.get(CACHE)
    chosen = named is not None and not named.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_"))
    if not chosen and os.access(there, os.W_OK):
        os.environ[CACHE] = str(folder)
    network.compile()


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
