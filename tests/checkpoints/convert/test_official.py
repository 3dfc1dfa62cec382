"""Against the official implementation itself, run beside ours: DDIM_OFFICIAL=PATH of a checkout of ermongroup/ddim."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from ddim import sample
from ddim.checkpoints import ModelSpec, StoredModel, load_model, save_model
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.diffusion.schedule import linear_schedule
from ddim.diffusion.timesteps import reference_quad_tau, reference_uniform_tau
from ddim.networks import build_network

CHECKOUT = os.environ.get("DDIM_OFFICIAL", "")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="set DDIM_OFFICIAL to a checkout of ermongroup/ddim"),
]
# Their configuration for each of our presets. At 256 pixels one evaluation on two cores takes seconds.
CONFIGS = {"cifar10": "cifar10.yml", "celeba": "celeba.yml", "lsun": "bedroom.yml"}


def official(module: str):
    """Import one file of the checkout under a name of its own."""
    path = Path(CHECKOUT) / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def namespace(values):
    return SimpleNamespace(**{k: namespace(v) if isinstance(v, dict) else v for k, v in values.items()})


@pytest.fixture(scope="module", params=CONFIGS)
def both(request, tmp_path_factory):
    """The official model with random weights, and ours imported from the list that the official training writes."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = namespace(yaml.safe_load((Path(CHECKOUT) / "configs" / CONFIGS[request.param]).read_text()))
    theirs = official("models/diffusion").Model(config).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():  # no bias is 0 and no scale of a norm is 1 in a trained network
            if value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
            elif name == "conv_out.weight":
                value.mul_(5)  # outputs of order 1
    average = {k: v.clone() for k, v in theirs.state_dict().items()}
    online = {f"module.{k}": torch.zeros_like(v) for k, v in average.items()}
    torch.save([online, {"state": {}, "param_groups": []}, 3, 700, average], folder / "ckpt.pth")
    done = import_checkpoint(ImportSpec(str(folder), "", str(folder / "ckpt.pth"), name="ours"))
    assert (done.model.weights, done.model.step) == ("ema", 700)
    return theirs, load_model(done.path), folder


def test_their_model_and_ours_predict_the_same_noise(both):
    theirs, ours, _ = both
    x = torch.randn(1, *ours.spec.image_shape, generator=torch.Generator().manual_seed(1))
    for t in (1, 250, 500, 750, 1000):
        with torch.no_grad():
            expected = theirs(x, torch.tensor([t - 1.0]))
        assert 0.1 < expected.std() < 10
        assert (ours(x, torch.tensor([t])) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_their_model_loads_our_flat_export(both):
    theirs, ours, folder = both
    export_checkpoint(ExportSpec(str(folder / "ours.safetensors"), str(folder), layout="flat", overwrite=True))
    state = torch.load(folder / "model.pt")
    assert list(theirs.load_state_dict(state).missing_keys) == []
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in ours.network.state_dict().items())


@pytest.mark.parametrize("rule", [reference_uniform_tau, reference_quad_tau])
def test_their_sampler_and_ours_make_the_same_images(tmp_path, monkeypatch, rule):
    """Ten steps of their `generalized_steps` with their U-Net, whole; only its hard-coded .to("cuda") is undone."""
    spec = PRESETS["cifar10"]
    torch.manual_seed(0)
    network = build_network("unet", spec)
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(0.05 * torch.randn_like(value))
    model = StoredModel(ModelSpec("unet", spec, linear_schedule()), network.state_dict(), "ema", 1)
    save_model(model, tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    config = namespace(yaml.safe_load((Path(CHECKOUT) / "configs" / "cifar10.yml").read_text()))
    theirs = official("models/diffusion").Model(config).eval()
    theirs.load_state_dict(network.state_dict())
    tau = rule(1000, 10)
    x_T = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).float()
    move = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *to, **more: x if to == ("cuda",) else move(x, *to, **more))
    images, _ = official("functions/denoising").generalized_steps(x_T, [t - 1 for t in tau], theirs, betas, eta=0.0)
    expected = images[-1]
    got = sample(ours, ours.spec.schedule, x_T, tau)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
