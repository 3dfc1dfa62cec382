"""C++ loops that make a U-Net faster on CPUs (`winograd=true`); see README.md in this folder."""

import logging

from torch import nn

from ddim.errors import UserError
from ddim.networks.cpu import native, norm_silu, winograd
from ddim.networks.cpu.norm_silu import fuse_norms
from ddim.networks.cpu.winograd import use_winograd

log = logging.getLogger(__name__)


def use_cpp_loops(network: nn.Module) -> None:
    """Use both kinds of loops in a network, in place; see `use_winograd` and `fuse_norms`."""
    use_winograd(network)
    fuse_norms(network)


def can_load_cpp_loops() -> bool:
    """Return whether there are compiled loops for this processor; they are compiled now, in seconds, if need be."""
    try:
        for source in (winograd.SOURCE, norm_silu.SOURCE):
            native.load(source)
    except UserError as error:
        log.debug("no C++ loops: %s", error)
        return False
    return True
