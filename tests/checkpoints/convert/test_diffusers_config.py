"""The U-Net's config.json: what is written, what is read, and what is refused."""

import inspect
import json
from dataclasses import replace

import pytest
from exported import HERE, SMALL, SPECS, write

from ddim.checkpoints.convert.diffusers import (
    read_json,
    unet_config,
    unet_spec,
)
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec

# As it lies beside the published CIFAR-10 weights.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
LSUN = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}


@pytest.mark.parametrize(("config", "preset"), [(CIFAR10, "cifar10"), (LSUN, "lsun")])
def test_a_published_config_is_the_preset_without_its_dropout(config, preset):
    spec = unet_spec(config, HERE)
    assert spec == replace(PRESETS[preset], dropout=0.0)


def test_a_published_config_gives_these_fields():
    assert unet_spec(CIFAR10, HERE) == UNetSpec(
        image_size=(32, 32),
        channels=3,
        ch=128,
        ch_mult=(1, 2, 2, 2),
        num_res_blocks=2,
        attn_resolutions=(16,),
        dropout=0.0,
        num_groups=32,
    )


def test_our_config_states_every_option_as_published():
    config = unet_config(replace(PRESETS["cifar10"], dropout=0.25))
    assert config.pop("_diffusers_version")
    published = {key: value for key, value in CIFAR10.items() if key != "_diffusers_version"}
    assert {key: config.pop(key) for key in published} == published
    # What the published file leaves to the defaults of its time.
    assert config == {
        "dropout": 0.25,
        "time_embedding_dim": None,
        "mid_block_type": "UNetMidBlock2D",
        "downsample_type": "conv",
        "upsample_type": "conv",
        "attn_norm_num_groups": None,
        "resnet_time_scale_shift": "default",
        "add_attention": True,
        "class_embed_type": None,
        "num_class_embeds": None,
    }


@pytest.mark.parametrize("spec", [*SPECS.values(), *PRESETS.values()], ids=[*SPECS, *PRESETS])
def test_a_network_survives_its_config(spec):
    config = json.loads(json.dumps(unet_config(spec)))
    assert unet_spec(config, HERE) == spec
    height, width = spec.image_size
    assert config["sample_size"] == (height if height == width else [height, width])


def test_a_network_that_diffusers_cannot_build_is_not_exported(folder):
    """There, the first convolution and the time embedding have the width of the first level."""
    spec = UNetSpec((8, 8), 1, ch=8, ch_mult=(2, 2), num_res_blocks=1, attn_resolutions=(), num_groups=4)
    with pytest.raises(UserError, match="ch_mult"):
        write(UNet(spec), spec, folder)
    assert not folder.exists()


# A value other than DDPM's for every key that says how the network computes.
OTHERWISE = {
    "center_input_sample": True,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 256,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "mid_block_type": None,
    "mid_block_scale_factor": 1.41421356,
    "downsample_padding": 1,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "act_fn": "gelu",
    "attention_head_dim": 8,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-05,
    "resnet_time_scale_shift": "scale_shift",
    "add_attention": False,
    "class_embed_type": "timestep",
    "num_class_embeds": 10,
}


def refusal(config):
    with pytest.raises(UserError) as caught:
        unet_spec(config, HERE)
    assert str(HERE) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("key", "value"), OTHERWISE.items(), ids=OTHERWISE)
def test_a_network_with_another_option_is_refused(key, value):
    assert f"another network than DDPM's U-Net: {key}={value!r} (needed: " in refusal(CIFAR10 | {key: value})


def test_every_difference_is_listed():
    message = refusal(CIFAR10 | {"norm_eps": 1e-05, "freq_shift": 0, "out_channels": 6})
    for part in ("norm_eps=1e-05 (needed: 1e-06)", "freq_shift=0 (needed: 1)", "in_channels=3 and out_channels=6"):
        assert part in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D", "DownBlock2D"]}, "down_block_types=["),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]}, "up_block_types=["),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]}, "up_block_types=["),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}, "up_block_types=["),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]}, "up_block_types=["),
        ({"out_channels": 6}, "in_channels=3 and out_channels=6"),
        ({"in_channels": 1}, "in_channels=1 and out_channels=3"),
        ({"block_out_channels": [128, 192, 256, 256]}, "block_out_channels=[128, 192, 256, 256]"),
        ({"block_out_channels": [256, 256, 128, 256]}, "block_out_channels=[256, 256, 128, 256]"),
        ({"block_out_channels": [128, 256, 256]}, "block_out_channels=[128, 256, 256]"),
        ({"block_out_channels": [128, 256, 256, 256, 256]}, "block_out_channels=[128, 256, 256, 256, 256]"),
        ({"norm_num_groups": 48}, "num_groups=48"),
        ({"sample_size": 36}, "image_size 36x36"),
        ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel'"),
        ({"_class_name": None}, "a UNet2DModel but None"),
    ],
)
def test_unsupported_blocks_and_widths_are_refused(change, words):
    assert words in refusal(CIFAR10 | change)


@pytest.mark.parametrize("key", ["sample_size", "block_out_channels", "down_block_types", "up_block_types"])
def test_a_config_without_a_required_key_is_refused(key):
    assert f" without {key}." in refusal({k: v for k, v in CIFAR10.items() if k != key})


def test_an_empty_config_names_all_missing_keys():
    assert "None without sample_size, block_out_channels, down_block_types, up_block_types." in refusal({})


@pytest.mark.parametrize(
    "key", ["freq_shift", "flip_sin_to_cos", "downsample_padding", "attention_head_dim", "norm_eps"]
)
def test_a_missing_option_with_another_default_is_refused(key):
    assert f": {key}=" in refusal({k: v for k, v in CIFAR10.items() if k != key})


DERIVED = {"layers_per_block": 2, "norm_num_groups": 32, "dropout": 0.0, "in_channels": 3, "out_channels": 3}


@pytest.mark.parametrize("key", [*OTHERWISE, *DERIVED])
def test_missing_options_have_the_defaults_of_unet2dmodel(hf, key):
    """The published files leave out every key that is younger than they are."""
    assumed = inspect.signature(hf.UNet2DModel.__init__).parameters[key].default
    full = unet_config(UNetSpec((32, 32), dropout=0.0))
    silent = {k: v for k, v in full.items() if k != key}
    if assumed == full[key]:
        assert unet_spec(silent, HERE) == unet_spec(full, HERE)
    else:
        assert f": {key}={assumed!r} (needed: {full[key]!r})" in refusal(silent)


@pytest.mark.parametrize(("key", "assumed"), DERIVED.items())
def test_missing_numbers_have_the_published_defaults(key, assumed):
    other = CIFAR10 | {"layers_per_block": 3, "norm_num_groups": 16, "dropout": 0.5}
    fields = {"layers_per_block": "num_res_blocks", "norm_num_groups": "num_groups", "in_channels": "channels"}
    spec = unet_spec({k: v for k, v in other.items() if k != key}, HERE)
    assert getattr(spec, fields.get(key, "channels" if key == "out_channels" else key)) == assumed


def test_no_option_of_unet2dmodel_is_overlooked(hf):
    options = set(inspect.signature(hf.UNet2DModel.__init__).parameters) - {"self"}
    read = {"sample_size", "block_out_channels", "down_block_types", "up_block_types", *DERIVED, *OTHERWISE}
    assert options - read == {"num_train_timesteps"}  # used by time_embedding_type=learned alone
    assert set(unet_config(SMALL)) == read | {"_class_name", "_diffusers_version"}


@pytest.mark.parametrize(
    "change",
    [
        {"sample_size": None},
        {"sample_size": [32]},
        {"sample_size": "small"},
        {"block_out_channels": None},
        {"block_out_channels": [0, 0, 0, 0]},
        {"block_out_channels": ["a", "a", "a", "a"]},
        {"block_out_channels": [], "down_block_types": [], "up_block_types": []},
        {"down_block_types": None},
    ],
    ids=str,
)
def test_an_invalid_config_is_refused_in_one_sentence(change):
    refusal(CIFAR10 | change)


def test_a_config_must_be_a_json_object(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        read_json(path)
    for text in ("", "{", "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"config\.json cannot be read"):
            read_json(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json does not hold a JSON object\."):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
