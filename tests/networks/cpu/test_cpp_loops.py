"""What holds for both C++ loops: a network keeps its outputs and names, and images are independent of their batch."""

import copy

import pytest
import torch
from tensors import gaussian32
from torch import nn

from ddim.networks.cpu.norm_silu import FusedNormSiLU, fuse_norms
from ddim.networks.cpu.winograd import WinogradConv2d, use_winograd
from ddim.networks.unet import NormSiLU

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("replace", "kind", "tolerance"), [(use_winograd, WinogradConv2d, 5e-5), (fuse_norms, FusedNormSiLU, 1e-5)]
)
def test_a_network_keeps_its_outputs_and_names(replace, kind, tolerance, frozen, network):
    network.requires_grad_(not frozen)
    fast = copy.deepcopy(network)
    replace(fast)
    used = [name for name, module in fast.named_modules() if isinstance(module, kind)]
    assert (
        len(used) == 17
    )  # convolutions: not the first, the last, and that of stride 2; norms: two a block, and the last
    assert ("norm_out" in used) is (kind is FusedNormSiLU)
    assert fast.state_dict().keys() == network.state_dict().keys()
    x, t = gaussian32(2, 3, 16, 32), torch.tensor([3, 800])
    with torch.no_grad():
        expected, got = network(x, t), fast(x, t)
    assert (got - expected).abs().max() < tolerance * expected.abs().max()
    assert kind is FusedNormSiLU or not torch.equal(got, expected)


@pytest.mark.parametrize(
    ("replace", "layer", "sides"),
    [
        (use_winograd, lambda: nn.Conv2d(64, 96, 3, padding=1), (8, 8)),  # 4 tiles an image; 6, 4 or 1 at a time
        (fuse_norms, lambda: NormSiLU(8, 64, eps=1e-6), (8, 12)),
    ],
)
def test_an_image_is_independent_of_its_batch(replace, layer, sides, threads):
    layer = layer().requires_grad_(False)
    for parameter in layer.parameters():  # away from 0 and 1
        parameter.copy_(gaussian32(*parameter.shape))
    replace(layer)
    x = gaussian32(13, 64, *sides)
    expected = layer(x)
    for size in (1, 2, 7):
        assert torch.equal(torch.cat([layer(batch) for batch in x.split(size)]), expected)
