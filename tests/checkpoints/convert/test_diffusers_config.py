"""The U-Net's config.json: what is written, what is read, and what is refused."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
from layouts import NETWORK, NETWORKS, export, refusal

from ddim import linear_schedule
from ddim.checkpoints import ModelSpec, StoredModel
from ddim.checkpoints.convert.diffusers import read_json, unet_config, unet_spec
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.networks import UNet, UNetSpec

HERE = Path("folder/config.json")
# As it lies next to the published CIFAR-10 weights.
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


@pytest.mark.parametrize("spec", [*NETWORKS.values(), *PRESETS.values()], ids=[*NETWORKS, *PRESETS])
def test_a_network_survives_its_config(spec):
    config = json.loads(json.dumps(unet_config(spec)))
    assert unet_spec(config, HERE) == spec
    height, width = spec.image_size
    assert config["sample_size"] == (height if height == width else [height, width])


def test_a_network_that_diffusers_cannot_build_is_not_exported(tmp_path):
    """There, the first convolution and the time embedding have the width of the first level."""
    spec = UNetSpec((8, 8), 1, ch=8, ch_mult=(2, 2), num_res_blocks=1, attn_resolutions=(), num_groups=4)
    model = StoredModel(ModelSpec("unet", spec, linear_schedule()), UNet(spec).state_dict(), "ema", None)
    assert "ch_mult" in refusal(export, model, tmp_path, "diffusers")
    assert not (tmp_path / "folder").exists()


# A value other than DDPM's for every key that changes the network's function.
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
}


REQUIRED = ("sample_size", "block_out_channels", "down_block_types", "up_block_types")


def lacking(*keys):
    return {key: value for key, value in CIFAR10.items() if key not in keys}


def blocks(kind, *names):
    return {f"{kind.lower()}_block_types": [f"{name}{kind}Block2D" for name in names]}


# Config -> what its refusal names.
REFUSED = [
    *((CIFAR10 | {key: value}, f"than DDPM's U-Net: {key}={value!r} (needed: ") for key, value in OTHERWISE.items()),
    *((lacking(key), f" without {key}.") for key in REQUIRED),
    ({}, f"None without {', '.join(REQUIRED)}."),
    *(  # another default there
        (lacking(key), f": {key}=")
        for key in ("freq_shift", "flip_sin_to_cos", "downsample_padding", "attention_head_dim", "norm_eps")
    ),
    *(
        (CIFAR10 | change, words)
        for change, words in (
            (blocks("Down", "", "Skip", "", ""), "down_block_types=["),
            (blocks("Down", "", "", "Attn", ""), "up_block_types=["),
            (blocks("Up", "", "Attn", "", ""), "up_block_types=["),
            (blocks("Up", "", "", "CrossAttn", ""), "up_block_types=["),
            (blocks("Up", "", "", "Attn"), "up_block_types=["),
            ({"out_channels": 6}, "in_channels=3 and out_channels=6"),
            ({"in_channels": 1}, "in_channels=1 and out_channels=3"),
            *(
                ({"block_out_channels": widths}, f"block_out_channels={widths}")
                for widths in ([128, 192, 256, 256], [256, 256, 128, 256], [128, 256, 256], [128, *[256] * 4])
            ),
            ({"norm_num_groups": 48}, "num_groups=48"),
            ({"sample_size": 36}, "image_size 36x36"),
            ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel'"),
            ({"_class_name": None}, "a UNet2DModel but None"),
            ({"num_class_embeds": 1}, "classes=0 must be positive"),
            ({"num_class_embeds": "10"}, ""),
            ({"sample_size": None}, ""),
            ({"sample_size": [32]}, ""),
            ({"sample_size": "small"}, ""),
            ({"block_out_channels": None}, ""),
            ({"block_out_channels": [0, 0, 0, 0]}, ""),
            ({"block_out_channels": ["a", "a", "a", "a"]}, ""),
            ({"block_out_channels": [], "down_block_types": [], "up_block_types": []}, ""),
            ({"down_block_types": None}, ""),
        )
    ),
]


@pytest.mark.parametrize(("config", "words"), REFUSED)
def test_unsupported_configs_are_refused(config, words):
    message = refusal(unet_spec, config, HERE)
    assert str(HERE) in message
    assert words in message


def test_every_difference_is_listed():
    message = refusal(unet_spec, CIFAR10 | {"norm_eps": 1e-05, "freq_shift": 0, "out_channels": 6}, HERE)
    for part in ("norm_eps=1e-05 (needed: 1e-06)", "freq_shift=0 (needed: 1)", "in_channels=3 and out_channels=6"):
        assert part in message


DERIVED = {"layers_per_block": 2, "norm_num_groups": 32, "dropout": 0.0, "in_channels": 3, "out_channels": 3}
DERIVED["num_class_embeds"] = None


@pytest.mark.parametrize("key", [*OTHERWISE, *DERIVED])
def test_missing_options_have_the_defaults_of_unet2dmodel(hf, key):
    """The published files leave out every key that is younger than they are."""
    assumed = inspect.signature(hf.UNet2DModel.__init__).parameters[key].default
    full = unet_config(UNetSpec((32, 32), dropout=0.0))
    silent = {k: v for k, v in full.items() if k != key}
    if assumed == full[key]:
        assert unet_spec(silent, HERE) == unet_spec(full, HERE)
    else:
        assert f": {key}={assumed!r} (needed: {full[key]!r})" in refusal(unet_spec, silent, HERE)


def test_no_option_of_unet2dmodel_is_overlooked(hf):
    options = set(inspect.signature(hf.UNet2DModel.__init__).parameters) - {"self"}
    read = {*REQUIRED, *DERIVED, *OTHERWISE}
    assert options - read == {"num_train_timesteps"}  # used by time_embedding_type=learned alone
    assert set(unet_config(NETWORK)) == read | {"_class_name", "_diffusers_version"}


def test_a_config_must_be_a_json_object(tmp_path):
    path = tmp_path / "config.json"
    assert "config.json cannot be read" in refusal(read_json, path)
    for text in ("", "{", "\x00"):
        path.write_text(text)
        assert "config.json cannot be read" in refusal(read_json, path)
    path.write_text("[1]")
    assert refusal(read_json, path).endswith("config.json does not hold a JSON object.")
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
