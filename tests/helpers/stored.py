"""A small model; comparison of weights; the message of a file that is refused."""

import math
import re

import pytest
import torch

from ddim import cosine_schedule, from_betas, linear_schedule
from ddim.checkpoints import load_model
from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec

NETWORK = UNetSpec(
    image_size=(8, 8),
    channels=1,
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    attn_resolutions=(4,),
    dropout=0.25,
    num_groups=4,
    init="torch",
)
SCHEDULES = {
    "linear": linear_schedule(1000),
    "cosine": cosine_schedule(50),
    "custom": from_betas([0.1, 1 / 3, 1e-9, 0.7, math.pi / 4]),
}
ORIGIN = {"file": "published.ckpt", "layout": "flat", "sha256": "0" * 64, "note": 'ü "quoted" \n é'}


def state_of(seed):
    torch.manual_seed(seed)
    return {name: value.clone() for name, value in UNet(NETWORK).state_dict().items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(mine, theirs):
    """Whether two state dicts hold the same bits under the same names."""
    return mine.keys() == theirs.keys() and all(
        (mine[name].dtype, mine[name].shape) == (theirs[name].dtype, theirs[name].shape)
        and torch.equal(bits(mine[name]), bits(theirs[name]))
        for name in mine
    )


def refusal(path, weights="ema"):
    """Return the one sentence with which a file is refused."""
    with pytest.raises(UserError) as caught:
        load_model(path, weights)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]*[^.\s]\.", message)
    return message
