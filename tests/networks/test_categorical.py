"""The U-Net for pixels of K categories."""

import dataclasses

import pytest
import torch

from ddim.networks import build_network
from ddim.networks.categorical import CategoricalUNetSpec


def test_a_categorical_network_takes_categories_to_logits() -> None:
    spec = CategoricalUNetSpec(
        (8, 8), 2, ch=16, ch_mult=(1,), attn_resolutions=(), num_groups=4, init="torch", categories=3
    )
    with pytest.raises(ValueError, match="classes=3 is not for pixels of categories"):
        dataclasses.replace(spec, classes=3)
    network = build_network("categorical_unet", spec).eval()
    x, t = torch.tensor([-1.0, 0.0, 1.0]).repeat(128)[:128].reshape(1, 2, 8, 8), torch.tensor([5])
    output = network(x, t)
    assert output.shape == (1, 6, 8, 8)
    one_hot = torch.stack([x == value for value in (-1, 0, 1)], dim=2).flatten(1, 2).float()  # channel 3 c + k
    assert torch.equal(output, network.unet(one_hot, t))
    assert torch.equal(output, network(x + 0.4, t))  # the nearest category
