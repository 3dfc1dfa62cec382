"""Import of what this project wrote itself: the description and the weights stay as they are, whatever the network."""

from dataclasses import dataclass, replace

import pytest
import torch
from layouts import (
    NETWORK,
    WEIGHTS_FILE,
    at_root,
    bring,
    described,
    export,
    given,
    import_refusal,
    lightning,
    same,
    save,
    weights,
)
from torch import nn

from ddim.checkpoints import ModelSpec, StoredModel, load_model, save_model, weights_hash
from ddim.diffusion.schedule import ScheduleSpec, cosine_schedule, linear_schedule
from ddim.networks import NETWORKS
from ddim.networks.categorical import CategoricalUNet, CategoricalUNetSpec

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class PluginSpec:
    image_size: tuple[int, int] = (8, 8)
    channels: int = 1
    width: int = 4


class Plugin(nn.Module):
    """Modules with the names of other code bases and wrappers, five dimensions, and buffers of other types."""

    def __init__(self, spec):
        super().__init__()
        self.init_conv = nn.Conv2d(1, spec.width, 3, padding=1)
        self.module = nn.Module()
        self.module.time_embedding = nn.Conv3d(1, 1, 2)
        self.register_buffer("frequencies", torch.arange(4, dtype=torch.float64) / 3)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))


def categorical(**changes):
    values = {"categories": 3, "ch": 4, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": (), "num_groups": 2}
    return CategoricalUNetSpec((8, 8), 1, **values | changes)


MODELS = {
    "categorical_unet": (CategoricalUNet, categorical()),
    "plugin": (Plugin, PluginSpec()),
}


@pytest.fixture(params=MODELS)
def other(request, monkeypatch):
    """A model whose network is another than the U-Net."""
    monkeypatch.setitem(NETWORKS, "plugin", (PluginSpec, Plugin))
    network, spec = MODELS[request.param]
    plugins = ("my_package",) * (request.param == "plugin")
    described = ModelSpec(request.param, spec, cosine_schedule(20), "x0", "digits", plugins)
    state = {name: value.clone() for name, value in network(spec).state_dict().items()}
    return StoredModel(described, state, "ema", 7, recipe={"seed": 3, "optim.lr": 0.1})


def put(model, folder, layout):
    """Write a model as a training or an export does; return the path."""
    if layout == "lightning":
        content = lightning(model, {name: value + 1 for name, value in model.state.items()})
        content["ddim"] |= {"recipe": model.recipe}
        return save(content, folder / "last.ckpt")
    save_model(model, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("layout", ["lightning", "safetensors"])
def test_every_network_of_ours_is_imported_unchanged(tmp_path, other, layout):
    done = bring(put(other, tmp_path, layout))
    assert (done.model.origin["layout"], done.warnings) == (layout, [])
    loaded = load_model(done.path)
    assert loaded.spec.differences(other.spec) == []
    assert (loaded.spec.network, loaded.spec.plugins) == (other.spec.network, other.spec.plugins)
    assert (loaded.spec.data, loaded.step, loaded.weights) == ("digits", 7, "ema")
    assert loaded.recipe == other.recipe
    assert same(done.model.state, other.state)
    assert loaded.weights_hash == done.weights_hash == weights_hash(other.state)
    assert bring(put(other, tmp_path, layout), trained_on="mine", overwrite=True).model.spec.data == "mine"


@pytest.mark.parametrize("layout", ["lightning", "safetensors"])
def test_weights_are_checked_with_the_network_of_the_file(tmp_path, other, layout):
    name, value = next((key, value) for key, value in other.state.items() if key.endswith(".weight"))
    for state, words in (
        ({key: value for key, value in other.state.items() if key != name}, f"1 missing ({name})"),
        (other.state | {"stray": value}, "1 unexpected (stray)"),
        (other.state | {name: value[:1]}, f"1 of the wrong shape ({name} {tuple(value[:1].shape)} instead of "),
    ):
        path = put(replace(other, state=state), tmp_path, "safetensors")
        assert f"do not fit the network that it describes: {words}" in import_refusal(path)
    path = put(replace(other, state=other.state | {name: torch.full_like(value, torch.nan)}), tmp_path, layout)
    assert f"{name} holds values that are not finite real numbers" in import_refusal(path)


def test_another_network_in_the_command_is_a_contradiction(tmp_path, other):
    message = import_refusal(put(other, tmp_path, "safetensors"), network=given(NETWORK))
    assert f"describes another model than the command (network.name: {other.spec.network} and unet; " in message


def test_foreign_weights_are_read_as_the_u_net_only(tmp_path):
    path = save(weights(), tmp_path / "flat.ckpt")
    values = given(categorical()) | {"name": "categorical_unet"}
    message = import_refusal(path, network=values)
    assert message.startswith(f"{path} was not written by this project, so it can be read as DDPM's U-Net only, not as")


@pytest.mark.parametrize("place", ["alone", "without config.json", "beside", "at the root"])
def test_an_exported_file_describes_itself(tmp_path, place):
    """Also where it was copied without the configurations, which describe less than its header."""
    spec, _ = described(ScheduleSpec("cosine", T=50), NETWORK, "v", "cats")
    model = StoredModel(spec, weights(), "online", 7, recipe={"seed": 3})
    folder = export(model, tmp_path, "diffusers")
    path = folder / WEIGHTS_FILE
    if place == "alone":
        path = path.rename(tmp_path / "alone.safetensors")
    elif place == "without config.json":
        (folder / "unet" / "config.json").unlink()
    elif place == "at the root":
        at_root(folder)
        path = folder / path.name
    done = bring(path, weights="online")
    assert (done.model.weights, done.model.step, done.warnings) == ("online", 7, [])
    assert same(done.model.state, model.state)
    assert (done.model.spec.differences(spec), done.model.spec.data) == ([], "cats")
    assert done.model.spec.network_spec == NETWORK  # the dropout, too
    assert done.model.origin["layout"] == "diffusers"
    assert "holds online weights only" in import_refusal(path, weights="ema", overwrite=True)


def test_the_schedule_of_a_file_without_configurations_stands(tmp_path, model):
    path = (export(model, tmp_path, "diffusers") / WEIGHTS_FILE).rename(tmp_path / "alone.safetensors")
    assert "describes another model than the command (schedule: linear with T=1000 and linear with T=9" in (
        import_refusal(path, schedule=ScheduleSpec("linear", T=9))
    )
    assert torch.equal(bring(path).model.spec.schedule.alpha_bar, linear_schedule().alpha_bar)
