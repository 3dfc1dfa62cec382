import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors on many threads are slower, and far slower on a busy machine."""
    torch.set_num_threads(1)
