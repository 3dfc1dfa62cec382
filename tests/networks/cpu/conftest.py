"""A small network for the C++ loops, and layers initialised from a fixed seed."""

import pytest
import torch

from ddim.networks import UNetSpec, build_network


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def network():
    spec = UNetSpec(
        (16, 32), ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), num_groups=8, init="torch"
    )
    return build_network("unet", spec).eval()
