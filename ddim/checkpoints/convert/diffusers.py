"""The layout of Hugging Face's diffusers: its configurations, its names of weights, its folders; without importing it.

Its times are zero-based and its tables float32; a model means the same there as here when its scheduler neither clips
nor leaves alpha_bar = 1 out: `clip_sample: false`, `set_alpha_to_one: true`, `timestep_spacing: leading`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddim.config import build, choose
from ddim.diffusion.schedule import NoiseSchedule, ScheduleSpec
from ddim.errors import UserError
from ddim.io import Tensors
from ddim.networks import UNetSpec

VERSION = "0.42.1"  # that the exported files are tested with
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# What UNet2DModel must be told to be DDPM's U-Net, and what it assumes when it is told nothing.
_UNET = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "freq_shift": (1, 0),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "attention_head_dim": (None, 8),
    "attn_norm_num_groups": (None, None),
    "norm_eps": (1e-6, 1e-5),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
_REQUIRED = ("sample_size", "block_out_channels", "down_block_types", "up_block_types")
_BLOCKS = {False: ("DownBlock2D", "UpBlock2D"), True: ("AttnDownBlock2D", "AttnUpBlock2D")}


def unet_config(spec: UNetSpec) -> dict[str, Any]:
    """Return the `config.json` of a U-Net.

    Raises:
        UserError: diffusers cannot build it.
    """
    if spec.ch_mult[0] != 1:
        raise UserError(
            f"diffusers cannot build a U-Net with ch_mult={list(spec.ch_mult)}: its first convolution is as wide as "
            "its first level, so the first entry must be 1."
        )
    attention = [resolution in spec.attn_resolutions for resolution in spec.resolutions]
    height, width = spec.image_size
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": height if height == width else [height, width],
        "in_channels": spec.channels,
        "out_channels": spec.channels,
        "block_out_channels": [spec.ch * mult for mult in spec.ch_mult],
        "down_block_types": [_BLOCKS[here][0] for here in attention],
        "up_block_types": [_BLOCKS[here][1] for here in reversed(attention)],
        "layers_per_block": spec.num_res_blocks,
        "norm_num_groups": spec.num_groups,
        "dropout": spec.dropout,
        **{key: needed for key, (needed, _) in _UNET.items()},
    }


def unet_spec(config: Mapping[str, Any], path: Path) -> UNetSpec:
    """Return the U-Net that a `config.json` describes.

    Raises:
        UserError: it makes no sense, or describes another network than DDPM's U-Net; the message lists the differences.
    """
    try:
        return _unet_spec(config, path)
    except UserError:
        raise
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} is not understood: {str(error).rstrip('.')}.") from error


def _unet_spec(config: Mapping[str, Any], path: Path) -> UNetSpec:
    if config.get("_class_name") != "UNet2DModel" or any(key not in config for key in _REQUIRED):
        missing = [key for key in _REQUIRED if key not in config]
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise UserError(f"{path} does not describe a UNet2DModel but {config.get('_class_name')!r}{lacks}.")
    unlike = [
        f"{key}={config.get(key, default)!r} (needed: {needed!r})"
        for key, (needed, default) in _UNET.items()
        if config.get(key, default) != needed
    ]
    widths = list(config["block_out_channels"])
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    attention = [kind == _BLOCKS[True][0] for kind in down]
    if down != [_BLOCKS[here][0] for here in attention]:
        unlike.append(f"down_block_types={down}")
    if up != [_BLOCKS[here][1] for here in reversed(attention)]:
        unlike.append(f"up_block_types={up} (not down_block_types the other way round)")
    if config.get("in_channels", 3) != config.get("out_channels", 3):
        unlike.append(f"in_channels={config.get('in_channels', 3)} and out_channels={config.get('out_channels', 3)}")
    if [width % widths[0] for width in widths] != [0] * len(down):
        unlike.append(f"block_out_channels={widths} (one multiple of the first for each block)")
    if unlike:
        raise UserError(f"{path} describes another network than DDPM's U-Net: {'; '.join(unlike)}.")
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    values = {
        "image_size": [height, width],
        "channels": config.get("in_channels", 3),
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attn_resolutions": [min(height, width) // 2**i for i, here in enumerate(attention) if here],
        "dropout": config.get("dropout", 0.0),
        "num_groups": config.get("norm_num_groups", 32),
    }
    return build(UNetSpec, values, str(path))


def scheduler_config(schedule: NoiseSchedule, prediction: str) -> dict[str, Any]:
    """Return the `scheduler_config.json` of a DDIMScheduler that samples as this project does, unclipped."""
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": schedule.T,
        **_betas_config(schedule),
        "prediction_type": PREDICTION_TYPES[prediction],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
        "thresholding": False,
    }


def _betas_config(schedule: NoiseSchedule) -> dict[str, Any]:
    """Name the schedule where diffusers has a name for it, which also keeps every digit; else list its betas."""
    betas = 1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
    start, end = (float(f"{float(beta):.12g}") for beta in betas[[0, -1]])  # 1 - (1 - beta) loses digits of beta
    named = {"beta_schedule": BETA_SCHEDULES.get(schedule.name), "beta_start": start, "beta_end": end}
    if named["beta_schedule"] and torch.equal(_named_schedule(named, schedule.T).alpha_bar, schedule.alpha_bar):
        return {**named, "trained_betas": None}
    return {"beta_schedule": "linear", "trained_betas": betas.tolist()}


def _named_schedule(config: Mapping[str, Any], T: int) -> NoiseSchedule:
    """Return the schedule of a configuration; the names and the types of its entries are checked."""
    if config.get("trained_betas") is not None:
        return build(ScheduleSpec, {"name": "custom", "betas": config["trained_betas"]}, "trained_betas").build()
    ours = {theirs: name for name, theirs in BETA_SCHEDULES.items()}
    name = choose("beta_schedule", str(config.get("beta_schedule", "linear")), ours)
    ends = {key: config.get(key, default) for key, default in (("beta_start", 1e-4), ("beta_end", 0.02))}
    return build(ScheduleSpec, {"name": name, "T": T, **(ends if name != "cosine" else {})}, "schedule").build()


def read_scheduler(config: Mapping[str, Any], path: Path) -> tuple[NoiseSchedule, str]:
    """Return the schedule and the prediction type in a `scheduler_config.json`, of whichever scheduler.

    Raises:
        UserError: an entry that is not understood.
    """
    predictions = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    prediction = config.get("prediction_type", "epsilon")
    if config.get("rescale_betas_zero_snr") or prediction not in predictions:
        raise UserError(
            f"{path}: prediction_type={prediction!r}, rescale_betas_zero_snr={config.get('rescale_betas_zero_snr')!r}; "
            f"understood are {', '.join(predictions)}, without rescaling."
        )
    try:
        return _named_schedule(config, config.get("num_train_timesteps", 1000)), predictions[prediction]
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from error


_PARTS = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_TOP = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def name_there(name: str, levels: int) -> str:
    """Return what diffusers calls a parameter of our U-Net. Its `up_blocks` count in the order in which they run."""
    module, kind = name.rsplit(".", 1)
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    if found := re.fullmatch(r"(mid\.\w+)\.(\w+)", module):
        return f"{_TOP[found[1]]}.{_PARTS.get(found[2], found[2])}.{kind}"
    if found := re.fullmatch(r"(down|up)\.(\d+)\.(\w+)\.(.+)", module):
        side, level, part, rest = found[1], int(found[2]), found[3], found[4]
        block = f"{side}_blocks.{level if side == 'down' else levels - 1 - level}"
        if part in ("downsample", "upsample"):
            return f"{block}.{part}rs.0.{rest}.{kind}"
        number, _, layer = rest.partition(".")
        return (
            f"{block}.{ {'block': 'resnets', 'attn': 'attentions'}[part] }.{number}.{_PARTS.get(layer, layer)}.{kind}"
        )
    return name


def is_linear(name: str) -> bool:
    """Whether a weight, by its name there, is a linear layer there, where ours is a 1x1 convolution."""
    return re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", name) is not None


def modern_names(state: Tensors) -> Tensors:
    """Give the attention layers of files from before 2023 their present names."""
    pattern = re.compile(rf"(attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name): value for name, value in state.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it is not there, or holds something else.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return values
