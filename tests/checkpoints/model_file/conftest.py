"""A model and a path for it."""

import pytest
from stored import NETWORK, ORIGIN, SCHEDULES, state_of

from ddim.checkpoints import ModelSpec, StoredModel


@pytest.fixture(scope="module")
def state():
    return state_of(1)


@pytest.fixture
def model(state):
    return StoredModel(ModelSpec("unet", NETWORK, SCHEDULES["linear"], "v", "digits"), state, "ema", 790_000, ORIGIN)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"
