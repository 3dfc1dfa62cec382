"""A tiny untrained model in a checkpoint, laid out as training writes it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddim.checkpoints import LoadedModel, ModelSpec, load_model
from ddim.checkpoints.model import EMA_STATE, NETWORK_PREFIX
from ddim.checkpoints.spec import KEY
from ddim.data.datasets import DataSpec
from ddim.diffusion.schedule import linear_schedule
from ddim.diffusion.spec import SamplerSpec
from ddim.evaluation.fidelity import EvaluateSpec
from ddim.evaluation.metrics import MetricSpec
from ddim.inference.compute import ComputeSpec, place
from ddim.networks import UNetSpec, build_network


def write_checkpoint(path: Path, seed: int = 0, step: int = 4) -> Path:
    """Write an 8x8 grey model of random weights, the averaged ones near the raw ones."""
    network_spec = UNetSpec(
        (8, 8),
        1,
        ch=8,
        ch_mult=(1, 1),
        num_res_blocks=1,
        attn_resolutions=(4,),
        dropout=0.0,
        num_groups=4,
        init="torch",
    )
    spec = ModelSpec(
        "unet", network_spec, linear_schedule(50, 2e-3, 0.4), data="digits"
    )  # DDPM's, twenty times shorter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_network("unet", network_spec).state_dict()
        shadow = {name: value + 0.05 * torch.randn_like(value) for name, value in state.items()}
    torch.save(
        {
            "global_step": step,
            "state_dict": {NETWORK_PREFIX + name: value for name, value in state.items()},
            "callbacks": {EMA_STATE: {"shadow": shadow, "updates": step, "decay": 0.9999}},
            KEY: spec.to_dict(),
        },
        path,
    )
    return path


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    return write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny.ckpt")


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> LoadedModel:
    return place(load_model(checkpoint), ComputeSpec("cpu"))


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
