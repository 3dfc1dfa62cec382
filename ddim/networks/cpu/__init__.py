"""C++ loops that make a U-Net faster on CPUs (`winograd=true`); see README.md in this folder."""

from torch import nn

from ddim.networks.cpu import native, norm_silu, winograd
from ddim.networks.cpu.norm_silu import fuse_norms
from ddim.networks.cpu.winograd import use_winograd


def use_cpp_loops(network: nn.Module) -> None:
    """Use both kinds of loops in a network, in place; see `use_winograd` and `fuse_norms`."""
    use_winograd(network)
    fuse_norms(network)


def load_cpp_loops() -> None:
    """Load both kinds of loops, compiled now if they never were; errors are those of `native.load`."""
    for source in (winograd.SOURCE, norm_silu.SOURCE):
        native.load(source)
