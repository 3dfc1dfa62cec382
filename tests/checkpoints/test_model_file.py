"""Model files: one set of weights with everything needed to sample from it, readable with safetensors alone."""

import json
import math
import struct
from dataclasses import replace

import pytest
import torch
from layouts import NETWORK, refusal, same
from safetensors import safe_open
from safetensors.torch import load_file

from ddim import cosine_schedule, from_betas, io, linear_schedule
from ddim.checkpoints import ModelSpec, StoredModel, load_model, read_model, save_model, weights_hash
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint

SCHEDULES = {
    "linear": linear_schedule(1000),
    "cosine": cosine_schedule(50),
    "custom": from_betas([0.1, 1 / 3, 1e-9, 0.7, math.pi / 4]),
}
ORIGIN = {"file": "published.ckpt", "layout": "flat", "sha256": "0" * 64, "note": 'ü "quoted" \n é'}
TRAINED = replace(NETWORK, init="torch")


@pytest.fixture(scope="module")
def model(state):
    return StoredModel(ModelSpec("unet", TRAINED, SCHEDULES["linear"], "v", "digits"), state, "ema", 790_000, ORIGIN)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("weights", "step"), [("ema", 790_000), ("online", 0), ("ema", None), ("unlabelled", None)])
def test_a_model_survives_its_file_bit_for_bit(model, path, schedule, weights, step):
    spec = replace(model.spec, schedule=SCHEDULES[schedule])
    save_model(replace(model, spec=spec, weights=weights, step=step), path)
    for asked in ("ema", "online") if weights == "unlabelled" else (weights,):
        stored, loaded = read_model(path, asked), load_model(path, asked)
        for back in (stored, loaded):
            assert (back.weights, back.step) == (weights, step)
            assert type(back.step) is type(step)
            assert (back.spec.network, back.spec.network_spec) == ("unet", TRAINED)
            assert torch.equal(back.spec.schedule.alpha_bar, SCHEDULES[schedule].alpha_bar)
            assert (back.spec.schedule.name, back.spec.prediction, back.spec.data) == (schedule, "v", "digits")
        assert same(stored.state, model.state)
        assert stored.origin == ORIGIN
        assert same(loaded.network.state_dict(), model.state)
        assert loaded.weights_hash == weights_hash(model.state)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3.4e38, math.nan, math.inf])
def test_every_float_survives(model, path, value):
    state = {name: torch.full_like(tensor, value) for name, tensor in model.state.items()}
    save_model(replace(model, state=state), path)
    assert same(read_model(path).state, state)


def test_safetensors_alone_reads_everything(model, path):
    save_model(model, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert names == set(model.state)
    assert same(load_file(path), model.state)
    assert set(metadata) == {"format", "ddim"}
    assert metadata["format"] == "pt"
    # Readers in other languages find it at the start of the file: eight bytes of length, then JSON.
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header["__metadata__"] == metadata
    assert (header["conv_in.weight"]["dtype"], header["conv_in.weight"]["shape"]) == ("F32", [8, 1, 3, 3])
    description = json.loads(metadata["ddim"])
    alpha_bar = description["schedule"].pop("alpha_bar")
    assert description == {
        "format": 1,
        "network": {
            "name": "unet",
            "image_size": [8, 8],
            "channels": 1,
            "ch": 8,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [4],
            "dropout": 0.3,
            "num_groups": 4,
            "init": "torch",
        },
        "schedule": {"name": "linear"},
        "prediction": "v",
        "image": {"shape": [1, 8, 8], "range": [-1.0, 1.0]},
        "data": "digits",
        "weights": "ema",
        "step": 790_000,
        "origin": ORIGIN,
    }
    assert [type(number) for number in alpha_bar] == [float] * 1001
    assert torch.equal(torch.tensor(alpha_bar, dtype=torch.float64), SCHEDULES["linear"].alpha_bar)  # every bit
    product = 1.0
    assert alpha_bar[0] == 1.0
    for t in range(1, 1001):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * (t - 1) / 999)
        assert alpha_bar[t] == pytest.approx(product, rel=1e-12)


def test_the_recipe_travels_with_the_weights(model, path):
    """It changes no hash; a file without one is as it was before there were any, and loads."""
    save_model(model, path)
    without = load_model(path)
    assert (without.recipe, b"recipe" in path.read_bytes()) == ({}, False)
    recipe = {"seed": 3, "optim.lr": 2e-4, "optim.betas": [0.9, 0.999], "optim.grad_clip": None, "data.labels": "ü"}
    save_model(replace(model, recipe=recipe), path)
    assert read_model(path).recipe == load_model(path).recipe == recipe
    assert load_model(path).weights_hash == without.weights_hash


def test_saving_makes_folders_and_is_atomic(model, tmp_path, monkeypatch):
    def breaks_off(tensors, path, metadata):
        path.write_bytes(before[:1000])
        raise OSError("no space left")

    path = tmp_path / "a" / "b" / "model.safetensors"
    save_model(model, path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(io, "save_file", breaks_off)
        with pytest.raises(OSError, match="no space left"):
            save_model(replace(model, step=3), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    save_model(replace(model, step=3), path)
    assert load_model(path).step == 3


def test_a_model_may_replace_the_file_it_was_read_from(model, path):
    """Its tensors may lie on the disk still."""
    save_model(model, path)
    stored = read_model(path)
    save_model(replace(stored, step=8), path)
    assert same(stored.state, model.state)
    assert same(read_model(path).state, model.state)
    assert read_model(path).step == 8


@pytest.mark.parametrize(("held", "asked"), [("ema", "online"), ("online", "ema")])
def test_other_weights_than_those_in_the_file_are_refused(model, path, held, asked):
    save_model(replace(model, weights=held), path)
    assert f"{path} holds {held} weights only; choose weights={held}." in refusal(load_model, path, asked)
    assert load_model(path, held).weights == held


@pytest.mark.parametrize("asked", ["unlabelled", "averaged", ""])
def test_unknown_labels_are_refused(model, path, asked):
    save_model(replace(model, weights="unlabelled"), path)
    assert "allowed: ema, online" in refusal(load_model, path, asked)


def test_a_model_file_may_have_any_name(model, tmp_path):
    path = tmp_path / "model.ckpt"
    save_model(model, path)
    assert load_model(path).step == 790_000


def test_the_old_label_raw_still_means_online(model, path, tmp_path):
    """In the headers of model files, in load_model, and in the command of an import."""
    save_model(replace(model, weights="raw"), path)
    for asked in ("raw", "online"):
        assert load_model(path, asked).weights == read_model(path, asked).weights == "online"
    assert "holds online weights only; choose weights=online." in refusal(load_model, path, "ema")
    for asked in ("raw", "online", "auto"):
        spec = ImportSpec(str(tmp_path / asked), "d", checkpoint=str(path), weights=asked)
        assert spec.weights == ("auto" if asked == "auto" else "online")
        assert load_model(import_checkpoint(spec).path, "raw").weights == "online"


@pytest.mark.parametrize("weights", ["raw", "online"])
def test_the_old_label_raw_loads_a_training_checkpoint(make_checkpoint, tmp_path, weights):
    path = make_checkpoint(tmp_path / "last.ckpt")
    assert load_model(path, weights).weights_hash == load_model(path, "online").weights_hash
    assert load_model(path, weights).weights == "online"
    assert load_model(path, weights).weights_hash != load_model(path, "ema").weights_hash


def test_a_description_of_a_huge_network_takes_no_memory(model, path):
    """Before, 39 TB were asked for."""
    save_model(replace(model, spec=replace(model.spec, network_spec=replace(NETWORK, ch=1 << 20))), path)
    assert f"the weights in {path} do not fit the network it describes: " in refusal(load_model, path)
