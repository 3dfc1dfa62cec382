import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_model import write_checkpoint

from ddim.checkpoints import LoadedModel, load_model
from ddim.data.datasets import DataSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.metrics import MetricSpec
from ddim.inference.compute import ComputeSpec, prepare_model
from ddim.networks import float32_products
from ddim.networks.compiler import find_compiler
from ddim.results import records


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


@pytest.fixture
def gpu():
    """The device of tests marked gpu, with products in float32: cuda, or what DDIM_GPU names (cpu, to try them)."""
    device = os.environ.get("DDIM_GPU", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with float32_products(tf32=False):
        yield device


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


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    return write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.ckpt")


@pytest.fixture(scope="session")
def conditional_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with ten classes."""
    return write_checkpoint(tmp_path_factory.mktemp("model") / "conditional.ckpt", classes=tuple("0123456789"))


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> LoadedModel:
    loaded = load_model(checkpoint)
    prepare_model(loaded, ComputeSpec("cpu"))
    return loaded


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> EvaluateSpec:
    return EvaluateSpec(
        checkpoint=str(checkpoint),
        name="tiny",
        output_dir=str(tmp_path / "out"),
        data=DataSpec("digits", (8, 8), 1, flip=False),
        metric=MetricSpec("digits_classifier", batch_size=1000),
        sampler=SamplerSpec(S=3, eta=0.5),
        compute=ComputeSpec("cpu", batch_size=8),
        n=20,
        grid=0,
        reference_dir=str(tmp_path / "reference"),
    )


@pytest.fixture
def another_commit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """another_commit(): commit bbb... is checked out from now on, where the code in memory is of aaa...."""
    records.code_revision.cache_clear()
    monkeypatch.setattr(records, "revision_of", lambda _: "a" * 40)
    yield lambda: monkeypatch.setattr(records, "revision_of", lambda _: "b" * 40)
    records.code_revision.cache_clear()
