"""Our U-Net and sampler are diffusers' own under other names: held against tables written by hand, and against it."""

import inspect
import json
import re
import shutil
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ddim import DDIM, linear_schedule, sample
from ddim.checkpoints import ModelSpec, StoredModel
from ddim.checkpoints.diffusers import (
    modern_names,
    name_there,
    read_json,
    read_scheduler,
    scheduler_config,
    unet_config,
    unet_spec,
)
from ddim.checkpoints.exporting import write_diffusers
from ddim.checkpoints.parameters import Parameters, in_words
from ddim.checkpoints.published import PRESETS
from ddim.diffusion.noise import step_noise
from ddim.diffusion.schedule import NoiseSchedule, cosine_schedule, from_betas, scaled_linear_schedule
from ddim.diffusion.timesteps import linear_tau, reference_uniform_tau
from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec, zero_based

SMALL = UNetSpec((8, 8), channels=1, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_groups=4)
SPECS = {
    "small": SMALL,
    "oblong": UNetSpec((8, 12), 2, ch=8, ch_mult=(1, 2, 2), attn_resolutions=(8, 2), dropout=0.0, num_groups=2),
    "upright": UNetSpec((16, 8), 3, ch=4, ch_mult=(1, 1, 3), num_res_blocks=3, attn_resolutions=(4,), num_groups=2),
    "flat": UNetSpec((4, 6), 4, ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), dropout=0.5, num_groups=4),
}
HERE = Path("folder/config.json")


@pytest.fixture(scope="module")
def hf():
    """The library itself, without its bars and advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("diffusers")
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield library
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def folder(tmp_path):
    """A folder that does not stay behind: the large networks fill a disk."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path)


# ------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("temb.dense.0.weight", "time_embedding.linear_1.weight"),
        ("temb.dense.1.bias", "time_embedding.linear_2.bias"),
        ("conv_in.weight", "conv_in.weight"),
        ("down.0.block.1.norm1.weight", "down_blocks.0.resnets.1.norm1.weight"),
        ("down.1.block.0.nin_shortcut.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
        ("down.2.block.1.temb_proj.bias", "down_blocks.2.resnets.1.time_emb_proj.bias"),
        ("down.1.attn.0.q.weight", "down_blocks.1.attentions.0.to_q.weight"),
        ("down.1.attn.1.norm.bias", "down_blocks.1.attentions.1.group_norm.bias"),
        ("down.2.downsample.conv.bias", "down_blocks.2.downsamplers.0.conv.bias"),
        ("mid.block_1.conv1.weight", "mid_block.resnets.0.conv1.weight"),
        ("mid.block_2.temb_proj.weight", "mid_block.resnets.1.time_emb_proj.weight"),
        ("mid.attn_1.norm.weight", "mid_block.attentions.0.group_norm.weight"),
        ("mid.attn_1.k.weight", "mid_block.attentions.0.to_k.weight"),
        ("mid.attn_1.proj_out.bias", "mid_block.attentions.0.to_out.0.bias"),
        ("up.0.block.2.nin_shortcut.bias", "up_blocks.3.resnets.2.conv_shortcut.bias"),
        ("up.1.attn.2.v.weight", "up_blocks.2.attentions.2.to_v.weight"),
        ("up.1.attn.0.proj_out.weight", "up_blocks.2.attentions.0.to_out.0.weight"),
        ("up.3.upsample.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("up.3.block.0.norm2.bias", "up_blocks.0.resnets.0.norm2.bias"),
        ("norm_out.weight", "conv_norm_out.weight"),
        ("conv_out.bias", "conv_out.bias"),
    ],
)
def test_a_parameter_of_the_cifar10_network_has_the_published_name(ours, theirs):
    assert Parameters(PRESETS["cifar10"], as_diffusers=True).names[ours] == theirs
    assert name_there(ours, 4) == theirs


def test_the_way_up_counts_from_the_lowest_of_however_many_levels():
    names = Parameters(PRESETS["lsun"], as_diffusers=True).names
    assert names["up.4.attn.0.k.weight"] == "up_blocks.1.attentions.0.to_k.weight"
    assert names["up.5.upsample.conv.bias"] == "up_blocks.0.upsamplers.0.conv.bias"
    assert names["up.0.block.0.conv1.weight"] == "up_blocks.5.resnets.0.conv1.weight"
    assert names["down.4.attn.1.v.bias"] == "down_blocks.4.attentions.1.to_v.bias"


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("time_embedding.linear_1.weight", (512, 128), (512, 128)),
        ("down_blocks.1.resnets.0.conv_shortcut.weight", (256, 128, 1, 1), (256, 128, 1, 1)),
        ("down_blocks.1.resnets.0.time_emb_proj.weight", (256, 512), (256, 512)),
        ("down_blocks.1.attentions.0.to_q.weight", (256, 256, 1, 1), (256, 256)),
        ("down_blocks.1.attentions.0.to_q.bias", (256,), (256,)),
        ("down_blocks.1.attentions.0.group_norm.weight", (256,), (256,)),
        ("mid_block.attentions.0.to_out.0.weight", (256, 256, 1, 1), (256, 256)),
        ("conv_out.weight", (3, 128, 3, 3), (3, 128, 3, 3)),
    ],
)
def test_only_attention_changes_its_shape(name, here, there):
    parameters = Parameters(PRESETS["cifar10"], as_diffusers=True)
    ours = {theirs: name for name, theirs in parameters.names.items()}
    assert parameters.shapes[name] == there
    assert parameters.shapes_here[ours[name]] == here


def test_the_original_names_and_shapes_are_ours():
    parameters = Parameters(SMALL, as_diffusers=False)
    state = {name: tuple(value.shape) for name, value in UNet(SMALL).state_dict().items()}
    assert parameters.shapes == parameters.shapes_here == state
    assert all(name == theirs for name, theirs in parameters.names.items())


@pytest.mark.parametrize("spec", [*SPECS.values(), *PRESETS.values()], ids=[*SPECS, *PRESETS])
def test_names_and_shapes_are_those_of_unet2dmodel(hf, spec):
    with torch.device("meta"):
        theirs = hf.UNet2DModel.from_config(json.loads(json.dumps(unet_config(spec))))
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert Parameters(spec, as_diffusers=True).shapes == expected


@pytest.mark.parametrize("as_diffusers", [False, True])
def test_weights_survive_the_way_there_and_back(as_diffusers):
    parameters, state = Parameters(SPECS["oblong"], as_diffusers), randomised(SPECS["oblong"]).state_dict()
    there = parameters.to_file(state)
    assert {name: tuple(value.shape) for name, value in there.items()} == parameters.shapes
    back = parameters.to_ours(there)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    if as_diffusers:
        q = state["mid.attn_1.q.weight"]
        assert torch.equal(there["mid_block.attentions.0.to_q.weight"], q[:, :, 0, 0])


def test_every_way_in_which_weights_do_not_fit_is_named():
    parameters = Parameters(SMALL, as_diffusers=True)
    state = parameters.to_file(UNet(SMALL).state_dict())
    assert parameters.problems(state) == {}
    weight = state.pop("conv_norm_out.weight")
    state["stray"] = weight
    state["mid_block.attentions.0.to_q.weight"] = state["mid_block.attentions.0.to_q.weight"][:, :, None, None]
    problems = parameters.problems(state)
    assert problems == {
        "missing": ["conv_norm_out.weight"],
        "unexpected": ["stray"],
        "of the wrong shape": ["mid_block.attentions.0.to_q.weight (16, 16, 1, 1) instead of (16, 16)"],
    }
    assert in_words(problems) == (
        "1 missing (conv_norm_out.weight); 1 unexpected (stray); "
        "1 of the wrong shape (mid_block.attentions.0.to_q.weight (16, 16, 1, 1) instead of (16, 16))"
    )


def test_of_many_names_five_are_given():
    assert in_words({"missing": list("abcde")}) == "5 missing (a, b, c, d, e)"
    assert in_words({"missing": list("abcdef")}) == "6 missing (a, b, c, d, e, ...)"


def test_attention_of_older_files_gets_its_present_names():
    old = {
        "mid_block.attentions.0.query.weight": 0,
        "mid_block.attentions.0.key.bias": 1,
        "down_blocks.1.attentions.1.value.weight": 2,
        "up_blocks.2.attentions.10.proj_attn.bias": 3,
        "mid_block.attentions.0.group_norm.weight": 4,
        "up_blocks.2.attentions.2.to_q.weight": 5,
        "time_embedding.linear_1.weight": 6,
        "conv_out.bias": 7,
    }
    assert modern_names(old) == {
        "mid_block.attentions.0.to_q.weight": 0,
        "mid_block.attentions.0.to_k.bias": 1,
        "down_blocks.1.attentions.1.to_v.weight": 2,
        "up_blocks.2.attentions.10.to_out.0.bias": 3,
        "mid_block.attentions.0.group_norm.weight": 4,
        "up_blocks.2.attentions.2.to_q.weight": 5,
        "time_embedding.linear_1.weight": 6,
        "conv_out.bias": 7,
    }


# --------------------------------------------------------------------------------------------- config.json of the U-Net

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


def test_a_published_config_is_understood_word_for_word():
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


def test_the_config_that_is_written_says_everything_and_means_the_published_one():
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
def test_a_network_that_computes_otherwise_is_refused(key, value):
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
def test_blocks_and_widths_that_our_network_cannot_have_are_refused(change, words):
    assert words in refusal(CIFAR10 | change)


@pytest.mark.parametrize("key", ["sample_size", "block_out_channels", "down_block_types", "up_block_types"])
def test_a_config_without_a_required_key_is_refused(key):
    assert f" without {key}." in refusal({k: v for k, v in CIFAR10.items() if k != key})


def test_an_empty_config_names_all_that_it_lacks():
    assert "None without sample_size, block_out_channels, down_block_types, up_block_types." in refusal({})


@pytest.mark.parametrize(
    "key", ["freq_shift", "flip_sin_to_cos", "downsample_padding", "attention_head_dim", "norm_eps"]
)
def test_where_the_defaults_of_diffusers_are_another_network_silence_is_refused(key):
    assert f": {key}=" in refusal({k: v for k, v in CIFAR10.items() if k != key})


DERIVED = {"layers_per_block": 2, "norm_num_groups": 32, "dropout": 0.0, "in_channels": 3, "out_channels": 3}


@pytest.mark.parametrize("key", [*OTHERWISE, *DERIVED])
def test_what_a_config_does_not_say_is_what_unet2dmodel_assumes(hf, key):
    """The published files leave out every key that is younger than they are."""
    assumed = inspect.signature(hf.UNet2DModel.__init__).parameters[key].default
    full = unet_config(UNetSpec((32, 32), dropout=0.0))
    silent = {k: v for k, v in full.items() if k != key}
    if assumed == full[key]:
        assert unet_spec(silent, HERE) == unet_spec(full, HERE)
    else:
        assert f": {key}={assumed!r} (needed: {full[key]!r})" in refusal(silent)


@pytest.mark.parametrize(("key", "assumed"), DERIVED.items())
def test_the_numbers_that_a_config_does_not_say_are_the_published_ones(key, assumed):
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
def test_a_config_that_makes_no_sense_is_refused_in_one_sentence(change):
    refusal(CIFAR10 | change)


def test_what_is_not_a_json_object_is_no_config(tmp_path):
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


# ------------------------------------------------------------------------------------------------ scheduler_config.json

SOME_BETAS = [0.3, 0.01, 0.125, 0.4, 1e-5, 0.2]
SCHEDULES = {
    "linear": linear_schedule(),
    "linear, other betas": linear_schedule(250, 0.0004, 0.08),
    "linear, digits": linear_schedule(1000, 0.0001234567, 0.01987654321),
    "linear, thirds": linear_schedule(1000, 1 / 30_000, 1 / 30),
    "linear, one": linear_schedule(1, 0.25, 0.5),
    "scaled_linear": scaled_linear_schedule(),
    "scaled_linear, other betas": scaled_linear_schedule(100, 1e-3, 0.3),
    "cosine": cosine_schedule(),
    "cosine, short": cosine_schedule(50),
    "cosine, other offset": cosine_schedule(1000, 0.02),
    "custom": from_betas(SOME_BETAS),
    "custom, many": from_betas(1e-4 + 0.03 * torch.rand(500, generator=torch.Generator().manual_seed(0))),
    "linear by another name": NoiseSchedule(linear_schedule().alpha_bar, "custom"),
    "custom by the name of linear": NoiseSchedule(from_betas(SOME_BETAS).alpha_bar, "linear"),
}
NAMED = {
    "linear": ("linear", 1000, 0.0001, 0.02),
    "linear, other betas": ("linear", 250, 0.0004, 0.08),
    "linear, digits": ("linear", 1000, 0.0001234567, 0.01987654321),
    "scaled_linear": ("scaled_linear", 1000, 0.00085, 0.012),
    "scaled_linear, other betas": ("scaled_linear", 100, 0.001, 0.3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_survives_its_config_bitwise(name):
    schedule = SCHEDULES[name]
    config = json.loads(json.dumps(scheduler_config(schedule, "eps")))
    assert config["num_train_timesteps"] == schedule.T
    back, prediction = read_scheduler(config, HERE)
    assert torch.equal(back.alpha_bar, schedule.alpha_bar)
    assert prediction == "eps"
    assert back.name == (schedule.name if config["trained_betas"] is None else "custom")


def test_betas_of_one_half_and_more_survive_to_the_last_digits():
    schedule = from_betas(torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    back, _ = read_scheduler(scheduler_config(schedule, "eps"), HERE)
    torch.testing.assert_close(back.alpha_bar, schedule.alpha_bar, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "words"), NAMED.items(), ids=NAMED)
def test_a_schedule_that_diffusers_knows_is_written_by_name(name, words):
    config = scheduler_config(SCHEDULES[name], "eps")
    keys = ("beta_schedule", "num_train_timesteps", "beta_start", "beta_end", "trained_betas")
    assert tuple(config[key] for key in keys) == (*words, None)


def test_the_cosine_schedule_is_written_by_name_and_others_as_their_betas():
    assert scheduler_config(cosine_schedule(), "eps")["beta_schedule"] == "squaredcos_cap_v2"
    assert scheduler_config(cosine_schedule(), "eps")["trained_betas"] is None
    assert scheduler_config(from_betas(SOME_BETAS), "eps")["trained_betas"] == pytest.approx(SOME_BETAS, abs=1e-15)


@pytest.mark.parametrize(("ours", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_what_a_network_predicts_has_its_name_there(ours, theirs):
    config = scheduler_config(linear_schedule(), ours)
    assert config["prediction_type"] == theirs
    assert read_scheduler(config, HERE)[1] == ours


def test_the_scheduler_does_what_the_paper_does():
    config = scheduler_config(linear_schedule(), "eps")
    wanted = {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "thresholding": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_a_published_scheduler_config_is_read():
    published = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    for config in (published, {}):  # nothing said: the defaults of diffusers, which are DDPM's
        schedule, prediction = read_scheduler(config, HERE)
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        torch.testing.assert_close(schedule.alpha_bar[1:], (1 - betas).cumprod(0), rtol=1e-12, atol=0)
        assert (schedule.name, schedule.T, prediction) == ("linear", 1000, "eps")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prediction_type": "flow"}, "prediction_type='flow'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
        ({"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'"),
        ({"trained_betas": [0.1, 1.0]}, "beta_2=1.0 must lie strictly between 0 and 1"),
        ({"trained_betas": []}, "betas must be a list of at least one number"),
        ({"num_train_timesteps": 0}, "T=0 must be at least 1"),
        ({"num_train_timesteps": "many"}, "T="),
        ({"beta_end": 3}, "must lie strictly between 0 and 1"),
    ],
)
def test_a_scheduler_that_is_not_understood_is_refused(config, words):
    with pytest.raises(UserError) as caught:
        read_scheduler(config, HERE)
    assert str(HERE) in str(caught.value)
    assert words in str(caught.value)
    assert re.search(r"[^.\n]\.$", str(caught.value)), "one sentence ends with one point"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_scheduler_there_has_our_noise_levels(hf, name):
    schedule = SCHEDULES[name]
    theirs = hf.DDIMScheduler.from_config(json.loads(json.dumps(scheduler_config(schedule, "eps"))))
    assert theirs.config.num_train_timesteps == schedule.T
    # A float32 table: 1 - 0.999, at the end of the cosine schedule, is known to 5 digits only.
    rtol = 5e-5 if name.startswith("cosine") else 5e-6
    torch.testing.assert_close(theirs.alphas_cumprod.double(), schedule.alpha_bar[1:], rtol=rtol, atol=0)
    assert theirs.final_alpha_cumprod == 1


# ------------------------------------------------------------------------------------------------- the networks agree


def randomised(spec, seed=0):
    """A network in which no weight is 0 or 1, norms and biases included, with outputs of order 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(replace(spec, init="torch")).eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    network.conv_out.weight.mul_(1.5)
    return network


def write(network, spec, folder, schedule=None, prediction="eps"):
    model = ModelSpec("unet", spec, schedule or linear_schedule(), prediction)
    write_diffusers(StoredModel(model, network.state_dict(), "ema", None), folder, [], None)


def gaussian(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_same_output(hf, spec, folder, times, batch):
    network = randomised(spec)
    write(network, spec, folder)
    theirs, report = hf.UNet2DModel.from_pretrained(
        folder, subfolder="unet", local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
    )
    assert all(not entries for entries in report.values())
    assert not theirs.training
    x = gaussian(batch, spec.channels, *spec.image_size)
    ours = zero_based(network)
    outputs = []
    for t in times:
        eps = ours(x, torch.full((batch,), t))
        with torch.no_grad():
            expected = theirs(x, t - 1).sample
        assert 0.3 < expected.std() < 3
        assert (eps - expected).abs().max() <= 1e-5
        outputs.append(eps)
    # A time that is off by one, or ignored, would show.
    assert all((b - a).abs().max() > 1e-3 for a, b in pairwise(outputs))


FIVE_TIMES = (1, 2, 500, 999, 1000)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_exported_network_predicts_the_same(hf, spec, folder):
    assert_same_output(hf, spec, folder, FIVE_TIMES, batch=3)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "times"), [("cifar10", FIVE_TIMES), ("celeba", FIVE_TIMES), ("lsun", (500,))])
def test_the_exported_network_of_full_size_predicts_the_same(hf, preset, times, folder):
    assert_same_output(hf, PRESETS[preset], folder, times, batch=1)


# ------------------------------------------------------------------------------------------------- the samplers agree


def steady(seed=0):
    """A network with random weights whose output is nearly 1.3 x_t.

    Of noise that has little to do with x_t, dividing by sqrt(alpha_bar) = 1/157 makes images that are all black and
    white, and nothing could be compared. So two features carry x_t and -x_t past the norm, which large constants beside
    them keep from dividing by the size of x_t, and silu(x) - silu(-x) = x.
    """
    spec = replace(SMALL, num_groups=2)
    network = randomised(spec, seed)
    last, size, ch = network.up[0].block[-1], 16.0, spec.ch
    for layer in (network.conv_in, last.conv2, last.nin_shortcut, network.conv_out):
        layer.weight.mul_(0.5)
    for i, sign in ((0, 1), (4, -1)):  # the first feature of each group
        network.conv_in.weight[i, 0, 1, 1] += sign
        last.nin_shortcut.weight[i, ch + i] += 1  # of [from below, skip], the skip of conv_in
        last.nin_shortcut.bias[i + 1] += size
        last.nin_shortcut.bias[i + 2] -= size
        network.norm_out.weight[i] = size / 2**0.5
        network.conv_out.weight[0, i, 1, 1] += 1.3 * sign
    network.conv_out.bias.sub_(network(torch.zeros(1, 1, 8, 8), torch.tensor([300])).mean())
    return spec, network


CASES = {
    "eps": ("eps", linear_schedule(), 50),
    "x0": ("x0", linear_schedule(), 50),
    "v": ("v", linear_schedule(), 50),
    "eps, other betas": ("eps", linear_schedule(200, 0.0005, 0.1), 25),
    "x0, scaled_linear": ("x0", scaled_linear_schedule(100), 20),
    "v, cosine": ("v", cosine_schedule(), 20),
    "v, custom": ("v", from_betas(SOME_BETAS), 6),
}


def pixels(x):
    return (x / 2 + 0.5).clamp(0, 1)


def load(hf, folder, pipeline="DDIMPipeline"):
    loaded = getattr(hf, pipeline).from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def images_there(pipeline, steps):
    """Images from the x_T that `gaussian` draws."""
    generator = torch.Generator().manual_seed(1)
    images = pipeline(2, generator, num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("case", CASES)
def test_the_exported_pipeline_makes_our_images(hf, folder, case):
    prediction, schedule, steps = CASES[case]
    spec, network = steady() if prediction == "eps" else (SMALL, randomised(SMALL))
    write(network, spec, folder, schedule, prediction)
    model, x_T = zero_based(network), gaussian(2, 1, 8, 8)

    def ours(**changes):
        options = {"tau": reference_uniform_tau(schedule.T, steps), "prediction": prediction} | changes
        return pixels(sample(model, schedule, x_T, **options))

    images = ours()
    for pipeline in ("DDIMPipeline", "DDPMPipeline"):
        assert (images_there(load(hf, folder, pipeline), steps) - images).abs().max() <= 1e-4
    # The comparison bites: there is something to see, and each choice that the configuration makes is seen.
    assert ((images == 0) | (images == 1)).float().mean() < 0.5
    assert images.std() > 0.05
    others = {
        "clipped": ours(clip="x0"),
        "not to the end": ours(last_time=1),
        "other prediction": ours(prediction={"eps": "v", "v": "x0", "x0": "v"}[prediction]),
    }
    if steps < schedule.T:
        others["other times"] = ours(tau=linear_tau(schedule.T, steps))
    assert [name for name, x in others.items() if (x - images).abs().max() < 5e-4] == []


def test_the_exported_pipeline_makes_images_that_are_not_square(hf, folder):
    spec = SPECS["oblong"]
    network = randomised(spec)
    write(network, spec, folder, prediction="v")
    tau = tuple(range(1, 1001, 100))
    images = pixels(sample(zero_based(network), linear_schedule(), gaussian(2, 2, 8, 12), tau, prediction="v"))
    assert images.shape == (2, 2, 8, 12)
    assert ((images == 0) | (images == 1)).float().mean() < 0.5
    assert (images_there(load(hf, folder), 10) - images).abs().max() <= 1e-4


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_exported_pipeline_takes_our_noise_at_any_eta(hf, folder, eta):
    spec, network = steady()
    write(network, spec, folder)
    pipeline = load(hf, folder)
    pipeline.scheduler.set_timesteps(50)
    x = x_T = gaussian(2, 1, 8, 8)
    for k, t in enumerate(pipeline.scheduler.timesteps, start=1):
        noise = step_noise(range(2), (1, 8, 8), 3, k)
        with torch.no_grad():
            eps = pipeline.unet(x, t).sample
        x = pipeline.scheduler.step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
    ours = sample(zero_based(network), linear_schedule(), x_T, tuple(range(1, 1001, 20)), DDIM(eta), seed=3)
    assert 0.1 < ours.std() < 1
    assert (x - ours).abs().max() <= 2e-4  # on images in [-1, 1]


def test_the_times_there_are_every_so_manieth_from_the_first_on(hf):
    scheduler = hf.DDIMScheduler.from_config(scheduler_config(linear_schedule(), "eps"))
    for steps in (1, 20, 50, 1000):
        scheduler.set_timesteps(steps)
        paper_times = [t + 1 for t in reversed(scheduler.timesteps.tolist())]
        assert paper_times == list(range(1, 1001, 1000 // steps))
        assert tuple(paper_times) == reference_uniform_tau(1000, steps)
