"""The names and shapes of parameters here and in diffusers."""

import json
from dataclasses import replace

import pytest
import torch
from layouts import NETWORK, NETWORKS, randomised

from ddim.checkpoints.convert.diffusers import unet_config
from ddim.checkpoints.convert.model_zoo import PRESETS
from ddim.checkpoints.convert.parameter_names import ParameterNames, to_diffusers
from ddim.networks import UNet

pytestmark = pytest.mark.integration


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
        ("class_emb.weight", "class_embedding.weight"),
        ("conv_out.bias", "conv_out.bias"),
    ],
)
def test_cifar10_parameters_have_the_published_names(ours, theirs):
    assert ParameterNames(replace(PRESETS["cifar10"], classes=10), diffusers=True).names[ours] == theirs
    assert to_diffusers(ours, 4) == theirs


def test_up_blocks_are_numbered_from_the_lowest_level():
    names = ParameterNames(PRESETS["lsun"], diffusers=True).names
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
    parameters = ParameterNames(PRESETS["cifar10"], diffusers=True)
    ours = {theirs: name for name, theirs in parameters.names.items()}
    assert parameters.file_shapes[name] == there
    assert parameters.our_shapes[ours[name]] == here


def test_the_original_names_and_shapes_are_ours():
    parameters = ParameterNames(NETWORK, diffusers=False)
    state = {name: tuple(value.shape) for name, value in UNet(NETWORK).state_dict().items()}
    assert parameters.file_shapes == parameters.our_shapes == state
    assert all(name == theirs for name, theirs in parameters.names.items())


@pytest.mark.parametrize("spec", [*NETWORKS.values(), *PRESETS.values()], ids=[*NETWORKS, *PRESETS])
def test_names_and_shapes_are_those_of_unet2dmodel(hf, spec):
    with torch.device("meta"):
        theirs = hf.UNet2DModel.from_config(json.loads(json.dumps(unet_config(spec))))
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert ParameterNames(spec, diffusers=True).file_shapes == expected


@pytest.mark.parametrize("as_diffusers", [False, True])
def test_conversion_of_weights_is_invertible(as_diffusers):
    parameters, state = ParameterNames(NETWORKS["oblong"], as_diffusers), randomised(NETWORKS["oblong"]).state_dict()
    there = parameters.to_file(state)
    assert {name: tuple(value.shape) for name, value in there.items()} == parameters.file_shapes
    back = parameters.from_file(there)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) for name, value in state.items())
    if as_diffusers:
        q = state["mid.attn_1.q.weight"]
        assert torch.equal(there["mid_block.attentions.0.to_q.weight"], q[:, :, 0, 0])
