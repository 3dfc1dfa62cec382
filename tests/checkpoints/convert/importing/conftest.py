"""Weights in files of other code bases; small networks in place of the published ones."""

from dataclasses import replace

import pytest
import torch
from foreign import NETWORK, SMALLEST, foreign_folder, weights

from ddim import linear_schedule
from ddim.checkpoints import ModelSpec, StoredModel
from ddim.checkpoints.convert.model_zoo import PRESETS


@pytest.fixture(scope="module")
def state():
    return weights(SMALLEST)


@pytest.fixture(scope="module")
def model(state):
    return StoredModel(ModelSpec("unet", SMALLEST, linear_schedule(10)), state, "ema", 3)


@pytest.fixture
def flat(state, tmp_path):
    torch.save(state, tmp_path / "flat.ckpt")
    return tmp_path / "flat.ckpt"


@pytest.fixture
def folder(state, tmp_path):
    return foreign_folder(state, tmp_path)


@pytest.fixture
def presets(monkeypatch):
    """Three small networks in place of the published ones, which the slow tests take."""
    small = {
        "cifar10": NETWORK,
        "celeba": replace(NETWORK, ch_mult=(1, 2, 2), dropout=0.2),
        "lsun": replace(NETWORK, ch=16, channels=3),
    }
    for name, network in small.items():
        monkeypatch.setitem(PRESETS, name, network)
    return small
