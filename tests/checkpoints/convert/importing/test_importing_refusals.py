"""Import: mismatches, contradictions and unwritable outputs are one sentence, and leave no files."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign import GIVEN, MODELS, NETWORK, bring, edit, put, refusal, weights, write_lightning
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddim import io as checkpoint_files
from ddim.checkpoints import StoredModel, read_model, save_model
from ddim.checkpoints.convert.importing import ImportSpec
from ddim.config import build
from ddim.diffusion.schedule import ScheduleSpec
from ddim.errors import UserError


@pytest.fixture(scope="module")
def state():
    return weights(NETWORK)


def test_mismatched_parameters_are_named_with_their_shapes(tmp_path, state):
    damaged = {name: value for name, value in state.items() if name != "mid.attn_1.q.weight"}
    damaged |= {
        "stray.weight": torch.zeros(2),
        "conv_in.weight": torch.zeros(8, 1, 3, 2),
        "conv_out.bias": state["conv_in.bias"],
    }
    torch.save(damaged, tmp_path / "flat.ckpt")
    assert refusal(tmp_path / "flat.ckpt", network=GIVEN) == (
        f"the weights in {tmp_path / 'flat.ckpt'} do not fit the given network: 1 missing (mid.attn_1.q.weight); "
        "1 unexpected (stray.weight); 2 of the wrong shape (conv_in.weight (8, 1, 3, 2) instead of (8, 1, 3, 3), "
        "conv_out.bias (8,) instead of (1,))."
    )


def test_mismatches_are_counted_and_five_are_named(tmp_path, state):
    names = list(state)
    torch.save({name: value for name, value in state.items() if name not in names[:6]}, tmp_path / "flat.ckpt")
    message = refusal(tmp_path / "flat.ckpt", network=GIVEN)
    assert message.endswith(f": 6 missing ({', '.join(names[:5])}, ...).")
    torch.save({name: value for name, value in state.items() if name not in names[:5]}, tmp_path / "flat.ckpt")
    message = refusal(tmp_path / "flat.ckpt", network=GIVEN)
    assert message.endswith(f": 5 missing ({', '.join(names[:5])}).")


@pytest.mark.parametrize("layout", ["official", "diffusers", "lightning", "safetensors"])
def test_every_layout_is_checked_name_by_name(tmp_path, state, layout):
    model = StoredModel(MODELS["plain"][0], state, "ema", 1)
    damaged = replace(model, state={name: v for name, v in state.items() if name != "conv_out.bias"})
    if layout == "diffusers":
        path, _ = put(model, tmp_path, layout, {})
        file = path / "unet" / "diffusion_pytorch_model.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({name: v for name, v in load_file(file).items() if name != "conv_out.bias"}, file, metadata)
        options = {}
    elif layout == "safetensors":
        save_model(damaged, path := tmp_path / "model.safetensors")
        options = {}
    else:
        path, options = put(damaged, tmp_path, layout, MODELS["plain"][1])
        if layout == "lightning":  # where the average lacks a parameter, the online one would be taken
            path = write_lightning(damaged, path, online=damaged.state)
    message = refusal(path, **options)
    assert re.search(r"do not fit the (given network|network that it describes): 1 missing \(conv_out\.bias\)", message)


def test_the_nearest_preset_is_named_with_advice(tmp_path, presets):
    nearly = weights(presets["celeba"])
    del nearly["conv_in.bias"]
    torch.save(nearly, tmp_path / "flat.ckpt")
    assert refusal(tmp_path / "flat.ckpt") == (
        f"the weights in {tmp_path / 'flat.ckpt'} do not fit the nearest, preset celeba: 1 missing (conv_in.bias). "
        "If it is another network, describe it with network=..., as in configs/network."
    )
    message = refusal(tmp_path / "flat.ckpt", preset="celeba")
    assert message.endswith("do not fit preset celeba: 1 missing (conv_in.bias).")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": ScheduleSpec("linear", T=999)}, "schedule: linear with T=1000 and linear with T=999"),
        ({"schedule": ScheduleSpec("cosine")}, "schedule: linear with T=1000 and cosine with T=1000"),
        ({"prediction": "v"}, "prediction: eps and v"),
        ({"network": GIVEN | {"num_groups": 2}}, "network.num_groups: 4 and 2"),
        ({"network": GIVEN | {"attn_resolutions": []}}, "network.attn_resolutions: [4] and []"),
        ({"preset": "cifar10"}, "network.image_size: [8, 8] and [32, 32]; network.channels: 1 and 3; "),
        (
            {"prediction": "x0", "schedule": ScheduleSpec("linear", T=5)},
            "schedule: linear with T=1000 and linear with T=5; prediction: eps and x0",
        ),
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "lightning", "safetensors"])
def test_a_command_that_contradicts_the_file_is_refused(tmp_path, state, layout, options, said):
    path, _ = put(StoredModel(MODELS["plain"][0], state, "ema", 1), tmp_path, layout, {})
    message = refusal(path, **options)
    assert f"describes another model than the command ({said}" in message
    assert message.endswith("; leave these options out.")


@pytest.mark.parametrize("layout", ["diffusers", "lightning", "safetensors"])
def test_a_command_may_repeat_the_description_of_the_file(tmp_path, state, layout):
    path, _ = put(StoredModel(MODELS["plain"][0], state, "ema", 1), tmp_path, layout, {})
    # Dropout is a matter of training; what the file says stays.
    said = {"network": GIVEN | {"dropout": 0.0}, "schedule": ScheduleSpec("linear", T=1000), "prediction": "eps"}
    assert bring(path, **said).model.spec.network_spec.dropout == 0.3


def test_a_scheduler_that_contradicts_the_command_is_refused(folder):
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=10)
    message = refusal(folder, schedule=ScheduleSpec("linear", T=1000))
    assert "schedule: linear with T=10 and linear with T=1000" in message


@pytest.mark.parametrize("found", ["flat", "official", "diffusers", "lightning", "safetensors"])
def test_an_unexpected_layout_is_refused(tmp_path, state, found):
    path, options = put(StoredModel(MODELS["plain"][0], state, "ema", 1), tmp_path, found, MODELS["plain"][1])
    for expected in {"flat", "official", "diffusers", "lightning", "safetensors"} - {found}:
        message = refusal(path, layout=expected, **options)
        assert f"has the layout {found}, not {expected}; leave layout=auto." in message


def with_value(state, value):
    changed = state["mid.block_1.conv1.weight"].clone()
    changed[-1, -1, -1, -1] = value
    return state | {"mid.block_1.conv1.weight": changed}


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf", "int64", "uint8", "bool", "complex64", "half inf", "1e39"])
def test_weights_that_are_not_finite_real_numbers_are_refused(tmp_path, state, kind):
    name = "mid.block_1.conv1.weight"
    if kind in ("nan", "inf", "-inf"):
        damaged = with_value(state, float(kind))
    elif kind == "half inf":
        damaged = state | {name: torch.full(state[name].shape, 1e9).half()}
    elif kind == "1e39":  # finite as float64, infinite as float32
        damaged = with_value({k: v.double() for k, v in state.items()}, 1e39)
    else:
        damaged = state | {name: state[name].to(getattr(torch, kind))}
    torch.save(damaged, tmp_path / "flat.ckpt")
    message = refusal(tmp_path / "flat.ckpt", network=GIVEN)
    assert f"{name} holds values that are not finite real numbers" in message


def test_supported_layouts_are_listed_for_other_content(tmp_path):
    for content in ({"model_state": {}, "epoch": 3}, {"a": torch.zeros(1), "b": 1}, {}, torch.zeros(3), "text", 7):
        torch.save(content, tmp_path / "other.ckpt")
        message = refusal(tmp_path / "other.ckpt")
        for layout in ("flat", "official", "diffusers", "lightning", "safetensors"):
            assert re.search(rf"supported are .*\b{layout}: ", message)
        if isinstance(content, dict) and content:
            assert f"holds the entries {', '.join(content)}; supported are" in message


def test_a_state_dict_holds_only_tensors(tmp_path, state):
    torch.save([state | {"epoch": 3}, {}, 0, 1], tmp_path / "official.ckpt")
    message = refusal(tmp_path / "official.ckpt", network=GIVEN)
    assert message.endswith("the entry 'epoch' is not a tensor, so this is not a state dict.")


def test_an_incomplete_diffusers_folder_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    wanted = "diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin, in unet/ or at the top"
    assert refusal(tmp_path / "empty").endswith(f"empty holds nothing; a diffusers folder has {wanted}.")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    assert "other holds a.txt; a diffusers folder has" in refusal(tmp_path / "other")
    (folder / "unet" / "config.json").unlink()
    assert "unet has no config.json, which describes the network" in refusal(folder)
    (folder / "unet" / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "unet holds config.json; a diffusers folder has" in refusal(folder)


def test_an_export_with_a_changed_config_is_refused(tmp_path, state):
    path, _ = put(StoredModel(MODELS["plain"][0], state, "ema", 1), tmp_path, "diffusers", {})
    edit(path / "unet" / "config.json", norm_num_groups=2)
    message = refusal(path)
    assert "is not the one that it was exported with; restore it." in message
    edit(path / "unet" / "config.json", norm_num_groups=4, _diffusers_version="0.42.1")
    assert bring(path).model.weights == "ema"


def test_an_existing_file_is_refused_before_reading_the_source(tmp_path, flat):
    out = tmp_path / "here.safetensors"
    out.write_text("precious")
    for source in (flat, tmp_path / "nowhere.ckpt"):
        message = refusal(source, out=out, network=GIVEN)
        assert message == f"{out} exists already; choose another output_dir=..., or overwrite=true to replace it."
    assert out.read_text() == "precious"
    bring(flat, out=out, network=GIVEN, overwrite=True)
    assert read_model(out).weights == "unlabelled"


def test_a_missing_source_is_one_sentence(tmp_path):
    assert "nowhere.ckpt" in refusal(tmp_path / "nowhere.ckpt")
    assert "nowhere.ckpt" in refusal(tmp_path / "nowhere.ckpt", overwrite=True)


def test_a_refused_import_keeps_the_existing_file(tmp_path, flat, state):
    done = bring(flat, network=GIVEN)
    before = done.path.read_bytes()
    torch.save(with_value(state, float("nan")), flat)
    refusal(flat, network=GIVEN, overwrite=True)
    assert done.path.read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path, flat, monkeypatch):
    def fail(tensors, path, metadata):
        Path(path).write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_file", fail)
    with pytest.raises((OSError, UserError), match="No space left"):
        bring(flat, network=GIVEN, out=tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["flat.ckpt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_unwritable_output_is_one_sentence(tmp_path, flat, overwrite):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "out.safetensors").mkdir()
    for out in (tmp_path / "folder" / "out.safetensors", tmp_path / "file" / "out.safetensors"):
        assert str(out) in refusal(flat, network=GIVEN, out=out, overwrite=overwrite)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "give either checkpoint=PATH or download=NAME, one of ema_cifar10, cifar10, "),
        ({"checkpoint": "a", "download": "cifar10"}, "give either checkpoint=PATH or download=NAME, one of "),
        ({"download": "ema_cifar"}, "unknown download 'ema_cifar' (did you mean ema_cifar10?); allowed: ema_cifar10, "),
        *(
            ({"checkpoint": "a", "name": name}, f"name={name!r} must be a file name without a folder; choose that by ")
            for name in ("a/b", "/a", "..", "a/")
        ),
        ({"checkpoint": "a", "preset": "cifar"}, "unknown preset 'cifar' (did you mean cifar10?); allowed: cifar10, "),
        ({"checkpoint": "a", "preset": "lsun", "network": GIVEN}, "give either preset or network, not both."),
        (
            {"checkpoint": "a", "layout": "offical"},
            "layout='offical' is not known (did you mean official?); allowed: auto",
        ),
        (
            {"checkpoint": "a", "weights": "average"},
            "weights='average' is not known; allowed: auto, ema, online",
        ),
    ],
)
def test_invalid_commands_are_refused(options, said):
    with pytest.raises(UserError) as caught:
        build(ImportSpec, {"output_dir": "o", "download_dir": "d"} | options, "")
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"chh": 8}, "unknown key network.chh (did you mean ch?)"),
        ({"name": "unt"}, "unknown network 'unt' (did you mean unet?)"),
        ({"ch": "8"}, "network.ch='8' must be an integer, not text."),
        ({"num_groups": 3}, "network: num_groups=3 does not divide a width of 8 channels"),
    ],
)
def test_a_given_network_is_checked(flat, network, said):
    assert refusal(flat, network=GIVEN | network).startswith(said)


def test_a_prediction_that_is_not_known_is_refused(flat):
    assert refusal(flat, network=GIVEN, prediction="epsilon").startswith("unknown prediction 'epsilon'")
