"""The description that is stored with the weights suffices to load them."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from layouts import lightning, refusal, save
from torch import nn

from ddim import DDIM, initial_noise, linear_schedule, quadratic_tau, sample
from ddim.checkpoints import ModelSpec, StoredModel, load_model, read_model, save_model, weights_hash
from ddim.checkpoints.model import weight_sets
from ddim.diffusion.schedule import NoiseSchedule
from ddim.errors import UserError
from ddim.networks import NETWORKS, UNet, UNetSpec

NETWORK = UNetSpec((8, 8), 1, ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), dropout=0.5, num_groups=4)
NETWORK = replace(NETWORK, init="torch")


@pytest.fixture
def spec():
    return ModelSpec("unet", NETWORK, linear_schedule(20), "v", "digits")


@pytest.fixture
def write(spec, tmp_path):
    """write(online, shadow, **changes): a checkpoint with these two sets of weights; changes are its other entries."""

    def write(online, shadow, **changes):
        model = StoredModel(spec, shadow, "ema", 7)
        return save(lightning(model, online, average=shadow is not None) | changes, tmp_path / "model.ckpt")

    return write


@pytest.fixture
def two():
    """Two networks with different weights."""
    return UNet(NETWORK), UNet(NETWORK)


def test_the_description_is_plain_and_survives_a_file(spec, tmp_path):
    torch.save(spec.to_dict(), tmp_path / "spec.pt")
    stored = torch.load(tmp_path / "spec.pt", weights_only=True)

    def plain(value):
        if isinstance(value, dict):
            return all(type(k) is str and plain(v) for k, v in value.items())
        return all(map(plain, value)) if type(value) is list else type(value) in (int, float, str, bool)

    assert plain({**stored, "schedule": stored["schedule"]["name"]})
    assert stored["image"] == {"shape": [1, 8, 8], "range": [-1.0, 1.0]}
    back = ModelSpec.from_dict(stored)
    assert (back.network, back.network_spec, back.prediction, back.data) == ("unet", NETWORK, "v", "digits")
    assert torch.equal(back.schedule.alpha_bar, spec.schedule.alpha_bar)
    assert back.schedule.name == "linear"
    assert back.image_shape == (1, 8, 8)
    assert back.differences(spec) == spec.differences(back) == []


OTHER = {
    "image_size": (16, 16),
    "channels": 3,
    "ch": 16,
    "ch_mult": (1, 2),
    "num_res_blocks": 2,
    "attn_resolutions": (8,),
    "num_groups": 2,
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(UNetSpec)])
def test_every_network_field_of_the_weights_is_a_difference(spec, field):
    if field in ("out_channels", "classes"):  # below
        return
    if field in ("dropout", "init"):  # of the training, not of the weights
        other = replace(spec, network_spec=replace(NETWORK, dropout=0.1, init="ddpm"), data="others")
        assert spec.differences(other) == []
        return
    other = replace(spec, network_spec=replace(NETWORK, **{field: OTHER[field]}))
    mine, theirs = spec.to_dict()["network"][field], other.to_dict()["network"][field]
    assert spec.differences(other) == [f"network.{field}: {mine} and {theirs}"]
    assert other.differences(spec) == [f"network.{field}: {theirs} and {mine}"]


def test_learned_variance_is_described_and_a_difference(spec):
    learned = replace(spec, network_spec=replace(NETWORK, out_channels=2), variance="learned_range")
    stored = learned.to_dict()
    assert (stored["variance"], stored["network"]["out_channels"]) == ("learned_range", 2)
    back = ModelSpec.from_dict(stored)
    assert (back.variance, back.network_spec.out_channels) == ("learned_range", 2)
    assert spec.differences(learned) == ["network.out_channels: None and 2"]
    assert "variance" not in spec.to_dict()
    assert "out_channels" not in spec.to_dict()["network"]
    for wrong in ({"variance": "fixed"}, {"network_spec": NETWORK}):
        with pytest.raises(UserError, match="output channels; the network has"):
            replace(learned, **wrong)


def test_classes_are_described_and_a_difference(spec):
    conditional = replace(spec, network_spec=replace(NETWORK, classes=2), classes=("cat", "dog"))
    stored = conditional.to_dict()
    assert (stored["network"]["classes"], stored["classes"]) == (2, ["cat", "dog"])
    back = ModelSpec.from_dict(stored)
    assert (back.num_classes, back.classes, conditional.differences(back)) == (2, ("cat", "dog"), [])
    assert spec.differences(conditional) == ["network.classes: None and 2", "classes: none and cat, dog"]
    assert "classes" not in spec.to_dict() | spec.to_dict()["network"]
    for wrong in ({"classes": ("cat",)}, {"network_spec": NETWORK}):
        with pytest.raises(UserError, match=r"names of classes do not fit a network of classes="):
            replace(conditional, **wrong)


def test_schedule_and_prediction_are_differences(spec):
    alpha_bar = spec.schedule.alpha_bar.clone()
    alpha_bar[3] = torch.nextafter(alpha_bar[3], alpha_bar[4])  # as another processor may round it
    assert spec.differences(replace(spec, schedule=NoiseSchedule(alpha_bar.clone(), "linear"))) == []
    alpha_bar[3] *= 1 - 1e-8
    nearly = replace(spec, schedule=NoiseSchedule(alpha_bar, "custom"))
    assert spec.differences(nearly) == ["schedule: linear with T=20 and custom with T=20"]
    renamed = replace(spec, schedule=NoiseSchedule(spec.schedule.alpha_bar, "custom"))
    assert spec.differences(renamed) == []
    others = replace(spec, prediction="x0", schedule=linear_schedule(21))
    assert spec.differences(others) == [
        "schedule: linear with T=20 and linear with T=21",
        "prediction: v and x0",
    ]


def test_an_unknown_prediction_is_refused(spec):
    with pytest.raises(UserError, match="unknown prediction 'epsilon'"):
        replace(spec, prediction="epsilon")


@pytest.mark.parametrize("model_file", [False, True])
def test_load_model_needs_only_the_file(write, spec, two, tmp_path, model_file):
    online, average = two
    training = write(online.state_dict(), average.state_dict())
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 7, 20])
    noise, tau = initial_noise(range(3), spec.image_shape, seed=5), quadratic_tau(20, 5)
    for weights, network in (("ema", average), ("online", online)):
        path = training
        if model_file:
            save_model(read_model(training, weights), path := tmp_path / "model.safetensors")
        loaded = load_model(path, weights)
        assert torch.equal(loaded(x, t), network.eval()(x, t - 1))  # in eval mode: no dropout; paper times
        assert not loaded(x, t).requires_grad
        assert not loaded.network.training
        assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
        assert (loaded.weights, loaded.step) == (weights, 7)
        assert loaded.weights_hash == weights_hash(network.state_dict())
        assert loaded.spec.differences(spec) == []
        assert loaded.spec.network_spec.dropout == 0.5
        images = sample(loaded, loaded.spec.schedule, noise, tau, DDIM(eta=0.0), prediction="v")
        expected = sample(lambda x, t, net=network: net(x, t - 1), linear_schedule(20), noise, tau, prediction="v")
        assert torch.equal(images, expected)
    assert load_model(training).weights == "ema"


@pytest.mark.parametrize("callbacks", [{}, {"EMA": {"decay": 0.9, "updates": 0, "shadow": {}}}, {"EMA": {}}])
def test_a_file_without_ema_weights(write, two, callbacks):
    path = write(two[0].state_dict(), None, callbacks=callbacks)
    with pytest.raises(UserError, match=r"holds no EMA weights .*; choose weights=online"):
        load_model(path)
    assert load_model(path, "online").weights_hash == weights_hash(two[0].state_dict())


def test_average_weights_have_the_buffers_of_the_network():
    weight, buffer, average = torch.ones(2), torch.full((2,), 3.0), torch.zeros(2)
    state = {"network.w": weight, "network.b": buffer, "alpha_bar": torch.ones(5)}
    sets = weight_sets({"state_dict": state, "callbacks": {"EMA": {"shadow": {"w": average}}}})
    assert sets == {"online": {"w": weight, "b": buffer}, "ema": {"w": average, "b": buffer}}


def test_unknown_weights_are_refused(write, two):
    path = write(two[0].state_dict(), two[1].state_dict())
    with pytest.raises(UserError, match=r"unknown weights 'em' \(did you mean ema\?\); allowed: ema, online"):
        load_model(path, "em")


@pytest.mark.parametrize("model_file", [False, True])
def test_weights_that_do_not_fit_their_description(write, spec, two, path, model_file):
    online = two[0].state_dict()
    name, value = next(iter(online.items()))
    wider = replace(spec, network_spec=replace(NETWORK, ch=16))
    fewer, narrow = {k: v for k, v in online.items() if k != name}, online | {name: value[:1].clone()}
    states = [(state, spec) for state in ({}, fewer, narrow, online | {"stray": value})]
    for state, description in (*states, (online, wider)):
        if model_file:
            save_model(StoredModel(description, state, "online", 7), path)
        else:
            path = write(state, None, ddim=description.to_dict())
        message = refusal(load_model, path, "online")
        assert f"the weights in {path} do not fit the network it describes: " in message


def test_a_misfit_of_many_names_is_a_short_sentence(spec, path):
    save_model(StoredModel(spec, {f"other.{i}.weight": torch.zeros(1) for i in range(300)}, "ema", 7), path)
    message = refusal(load_model, path)
    assert '"other.0.weight", "other.1.weight", ' in message
    assert message.endswith('.weight" and more.')
    assert len(message) < 400 + len(str(path))


VALUES = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(24.0).reshape(1, 2, 3, 4) - 7}


def changed(name, index):
    value = VALUES[name].clone()
    value.view(-1)[index] = torch.nextafter(value.view(-1)[index], torch.tensor(99.0))
    return VALUES | {name: value}


@pytest.mark.parametrize(
    "same",
    [
        dict(reversed(VALUES.items())),
        {k: v.clone().requires_grad_() for k, v in VALUES.items()},
        VALUES | {"a": VALUES["a"].t().contiguous().t()},
        VALUES | {"b": VALUES["b"].to(memory_format=torch.channels_last)},
        VALUES | {"a": torch.stack([VALUES["a"], VALUES["a"]], dim=2)[:, :, 1]},
    ],
    ids=["order", "gradient", "strides", "channels_last", "view"],
)
def test_the_hash_depends_only_on_names_and_values(same):
    digest = weights_hash(same)
    assert digest == weights_hash(VALUES)
    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")


@pytest.mark.parametrize(
    "other",
    [
        changed("a", 0),
        changed("b", 23),
        {"a": VALUES["a"], "c": VALUES["b"]},
        {"a": VALUES["a"]},
        VALUES | {"c": torch.zeros(0)},
        VALUES | {"a": VALUES["a"].reshape(3, 2)},
        VALUES | {"a": VALUES["a"].t()},
        VALUES | {"a": VALUES["a"].double()},
        VALUES | {"a": VALUES["a"].view(torch.int32)},
        VALUES | {"a": VALUES["a"].bfloat16()},
    ],
    ids=["first", "last", "name", "missing", "empty", "shape", "transposed", "wider", "bits", "bfloat16"],
)
def test_the_hash_differs_for_other_weights(other):
    assert weights_hash(other) != weights_hash(VALUES)


@dataclasses.dataclass(frozen=True)
class PluginSpec:
    image_size: tuple[int, int] = (8, 8)
    channels: int = 1


class Plugin(nn.Module):
    """A network that cannot be built without memory: it reads a tensor, and has a buffer of numpy's."""

    def __init__(self, spec):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 4)]
        self.register_buffer("frequencies", torch.from_numpy(np.arange(4.0)))

    def forward(self, x, t):
        return self.layer(x)


def test_a_network_of_a_plugin_is_built_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "plugin", (PluginSpec, Plugin))
    network, path = Plugin(PluginSpec()), tmp_path / "model.safetensors"
    spec = ModelSpec("plugin", PluginSpec(), linear_schedule(20))
    save_model(StoredModel(spec, network.state_dict(), "ema", 7), path)
    x, t = torch.ones(2, 1, 8, 8), torch.ones(2, dtype=torch.int64)
    assert torch.equal(load_model(path)(x, t), network(x, t))
    save_model(StoredModel(spec, {"layer.bias": torch.ones(1)}, "ema", 7), path)
    with pytest.raises(UserError, match=r"the weights in .* do not fit the network it describes: Missing key"):
        load_model(path)
    monkeypatch.delitem(NETWORKS, "plugin")
    with pytest.raises(
        UserError, match=r"'plugin' is none of this package, so it is one of a plugin; add plugins=\[MOD"
    ):
        load_model(path)
