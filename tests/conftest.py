import os
from unittest import mock

import pytest
import torch

from ddim.errors import UserError
from ddim.networks.cpu.native import find_compiler


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors on many threads are slower, and far slower on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def compiler():
    """For tests whose loops in C++ must be compiled."""
    try:
        find_compiler()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    """Fewer than images, as many, and more."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_environment():
    """What a test, or a library in it, sets in the environment ends with it.

    Lightning writes the address of a SLURM job's first machine there, and later processes would wait for that machine.
    """
    with mock.patch.dict(os.environ):
        yield
