import os
from unittest import mock

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors on many threads are slower, and far slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_environment():
    """What a test, or a library in it, sets in the environment ends with it.

    Lightning writes the address of a SLURM job's first machine there, and later processes would wait for that machine.
    """
    with mock.patch.dict(os.environ):
        yield
