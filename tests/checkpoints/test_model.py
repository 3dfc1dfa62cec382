"""The description that is stored with the weights suffices to load them."""

import dataclasses
import re
from dataclasses import replace

import pytest
import torch

from ddim import linear_schedule
from ddim.checkpoints import ModelSpec, load_model, weights_hash
from ddim.diffusion.schedule import NoiseSchedule
from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec

NETWORK = UNetSpec(
    image_size=(8, 8),
    channels=1,
    ch=8,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    dropout=0.5,
    num_groups=4,
    init="torch",
)


@pytest.fixture
def spec():
    return ModelSpec("unet", NETWORK, linear_schedule(20), "v", "digits")


@pytest.fixture
def write(spec, tmp_path):
    """write(online, shadow, **changes): a checkpoint with these two sets of weights; changes are its other entries."""

    def write(online, shadow, **changes):
        callbacks = {} if shadow is None else {"EMA": {"decay": 0.9, "updates": 7, "shadow": shadow}}
        checkpoint = {
            "ddim": spec.to_dict(),
            "state_dict": {f"network.{k}": v for k, v in online.items()},
            "callbacks": callbacks,
            "global_step": 7,
            "optimizer_states": [{"state": {}}],
        }
        torch.save(checkpoint | changes, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

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
    if field in ("dropout", "init"):  # of the training, not of the weights
        other = replace(spec, network_spec=replace(NETWORK, dropout=0.1, init="ddpm"), data="others")
        assert spec.differences(other) == []
        return
    other = replace(spec, network_spec=replace(NETWORK, **{field: OTHER[field]}))
    mine, theirs = spec.to_dict()["network"][field], other.to_dict()["network"][field]
    assert spec.differences(other) == [f"network.{field}: {mine} and {theirs}"]
    assert other.differences(spec) == [f"network.{field}: {theirs} and {mine}"]


def test_schedule_and_prediction_are_differences(spec):
    alpha_bar = spec.schedule.alpha_bar.clone()
    alpha_bar[3] = torch.nextafter(alpha_bar[3], alpha_bar[4])
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


@pytest.mark.parametrize("entry", [0, 2, "1", None])
def test_another_format_is_refused(spec, entry):
    with pytest.raises(UserError, match=rf"has format {entry!r}; this version reads format 1\."):
        ModelSpec.from_dict(spec.to_dict() | {"format": entry})


@pytest.mark.parametrize(
    "change",
    [
        {"network": None},
        {"network": {}},
        {"network": {"name": "unet", "ch": 8}},
        {"network": {"name": "vit", "ch": 8}},
        {"network": {"name": "unet", "image_size": [8, 8], "unknown": 1}},
        {"network": {"name": "unet", "image_size": "88"}},
        {"schedule": {"name": "linear"}},
        {"schedule": {"name": "linear", "alpha_bar": [1.0, 0.5]}},
        {"schedule": {"name": "linear", "alpha_bar": torch.ones(3)}},
        {"schedule": {"name": "linear", "alpha_bar": torch.ones(3, dtype=torch.float64)}},
        {"prediction": "epsilon"},
        {"prediction": []},
    ],
)
def test_a_damaged_description_is_one_sentence(spec, change):
    sentence = r"the checkpoint's description of its model (lacks|is not understood:) [^\n]*[^.]\."
    with pytest.raises(UserError) as caught:
        ModelSpec.from_dict(spec.to_dict() | change)
    assert re.fullmatch(sentence, str(caught.value))


@pytest.mark.parametrize("entry", ["network", "schedule", "prediction", "data"])
def test_an_incomplete_description_names_the_missing_entry(spec, entry):
    values = spec.to_dict()
    del values[entry]
    with pytest.raises(UserError, match=rf"description of its model lacks '{entry}'\."):
        ModelSpec.from_dict(values)


def test_load_model_needs_only_the_file(write, spec, two):
    online, average = two
    path = write(online.state_dict(), average.state_dict())
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 7, 20])
    for weights, network in (("ema", average), ("online", online)):
        loaded = load_model(path, weights)
        assert torch.equal(loaded(x, t), network.eval()(x, t - 1))  # in eval mode: no dropout; paper times
        assert not loaded(x, t).requires_grad
        assert (loaded.weights, loaded.step) == (weights, 7)
        assert loaded.weights_hash == weights_hash(network.state_dict())
        assert loaded.spec.differences(spec) == []
        assert loaded.spec.network_spec.dropout == 0.5
    assert load_model(path).weights == "ema"


@pytest.mark.parametrize("callbacks", [{}, {"EMA": {"decay": 0.9, "updates": 0, "shadow": {}}}, {"EMA": {}}])
def test_a_file_without_ema_weights(write, two, callbacks):
    path = write(two[0].state_dict(), None, callbacks=callbacks)
    with pytest.raises(UserError, match=r"holds no EMA weights .*; choose weights=online"):
        load_model(path)
    assert load_model(path, "online").weights_hash == weights_hash(two[0].state_dict())


def test_unknown_weights_are_refused(write, two):
    path = write(two[0].state_dict(), two[1].state_dict())
    with pytest.raises(UserError, match=r"unknown weights 'em' \(did you mean ema\?\); allowed: ema, online"):
        load_model(path, "em")


def test_weights_that_do_not_fit_their_description(write, spec, two):
    online = two[0].state_dict()
    name, value = next(iter(online.items()))
    fewer = {k: v for k, v in online.items() if k != name}
    wider = replace(spec, network_spec=replace(NETWORK, ch=16)).to_dict()
    for path_of in (
        lambda: write(fewer, None),
        lambda: write(online | {"stray": value}, None),
        lambda: write(online | {name: value[:1]}, None),
        lambda: write(online, None, ddim=wider),
    ):
        with pytest.raises(UserError, match=r"the weights in .*model.ckpt do not fit the network it describes: .*\.$"):
            load_model(path_of(), "online")


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
