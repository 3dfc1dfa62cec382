"""What samplers and training rely on, of every network in NETWORKS."""

import dataclasses

import pytest
import torch
from torch import nn

from ddim.networks import NETWORKS, build_network

SMALL = {"image_size": (8, 12), "channels": 2, "ch": 8, "ch_mult": (1, 2), "attn_resolutions": (4,), "num_groups": 4}


def small(name: str) -> nn.Module:
    """A small network in which no parameter is 0, with the options of SMALL that its spec has, else the defaults."""
    spec_type = NETWORKS[name][0]
    known = {field.name for field in dataclasses.fields(spec_type)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(name, spec_type(**{key: value for key, value in SMALL.items() if key in known}))
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(3, 2, 8, 12, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    return x, torch.tensor([0, 7, 999])


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_network_depends_on_image_and_time(name: str) -> None:
    network, (x, t) = small(name), inputs()
    output = network(x, t)
    assert output.shape[0] == 3
    assert output.shape[1] % 2 == 0  # so many numbers for each channel of the image
    assert output.shape[2:] == x.shape[2:]
    assert output.dtype == torch.float32
    for changed in (network(-x, t), network(x, (t + 500) % 1000)):
        assert (changed - output).abs().amax((1, 2, 3)).min() > 1e-3  # of each image


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_network_takes_images_one_by_one(name: str) -> None:
    network, (x, t) = small(name), inputs()
    together = network(x, t)
    for i in range(3):
        torch.testing.assert_close(network(x[i : i + 1], t[i : i + 1]), together[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_gradients_everywhere(name: str) -> None:
    network = small(name)
    network(*inputs()).square().sum().backward()
    without = {key for key, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert {key for key in without if not key.endswith(".k.bias")} == set()  # softmax does not see a bias of the keys
