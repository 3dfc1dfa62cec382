"""The configuration files of Hugging Face's diffusers, without importing it; weights: see parameter_names.py.

diffusers counts times from 0 and stores its tables as float32. Its DDIM scheduler samples as the paper does with
`clip_sample: false`, `set_alpha_to_one: true` and `timestep_spacing: leading`; docs/diffusers_options.md lists all.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ddim.config import build, choose
from ddim.diffusion.schedule import NoiseSchedule, ScheduleSpec, zero_terminal_snr
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.io import check_regular_file, explain_content
from ddim.networks import UNetSpec

VERSION = "0.42.1"  # of diffusers, with which exported files are tested
PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
WEIGHTS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# All names of weights, the preferred ones first: an index lists the shards of large weights, fp16 is half precision.
WEIGHTS_NAMES = tuple(
    f"diffusion_pytorch_model.{suffix}"
    for suffix in (
        *("safetensors", "safetensors.index.json", "bin", "bin.index.json"),
        *("fp16.safetensors", "safetensors.index.fp16.json", "fp16.bin", "bin.index.fp16.json"),
    )
)

# Option of UNet2DModel -> (its value for DDPM's U-Net, its default).
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
}
_REQUIRED = ("sample_size", "block_out_channels", "down_block_types", "up_block_types")
_BLOCKS = {False: ("DownBlock2D", "UpBlock2D"), True: ("AttnDownBlock2D", "AttnUpBlock2D")}


def unet_config(spec: UNetSpec) -> dict[str, Any]:
    """Return the `config.json` of a U-Net.

    Raises:
        UserError: diffusers cannot build this network.
    """
    if spec.ch_mult[0] != 1:
        raise UserError(
            f"diffusers cannot build a U-Net with ch_mult={list(spec.ch_mult)}: its first convolution has the width of "
            "the first level, so the first entry must be 1."
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
        "down_block_types": [_BLOCKS[a][0] for a in attention],
        "up_block_types": [_BLOCKS[a][1] for a in reversed(attention)],
        "layers_per_block": spec.num_res_blocks,
        "norm_num_groups": spec.num_groups,
        "dropout": spec.dropout,
        "num_class_embeds": None if spec.classes is None else spec.classes + 1,  # the last is that of no label
        **{key: needed for key, (needed, _) in _UNET.items()},
    }


def unet_spec(config: Mapping[str, Any], path: Path) -> UNetSpec:
    """Return the U-Net that a `config.json` describes; the last of its embeddings of classes is that of no label.

    Raises:
        UserError: invalid entries, or another network than DDPM's U-Net; the message lists the differences.
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
    differences = [
        f"{key}={config.get(key, default)!r} (needed: {needed!r})"
        for key, (needed, default) in _UNET.items()
        if config.get(key, default) != needed
    ]
    widths = list(config["block_out_channels"])
    down, up = list(config["down_block_types"]), list(config["up_block_types"])
    attention = [kind == _BLOCKS[True][0] for kind in down]
    if down != [_BLOCKS[a][0] for a in attention]:
        differences.append(f"down_block_types={down}")
    if up != [_BLOCKS[a][1] for a in reversed(attention)]:
        differences.append(f"up_block_types={up} (not the reverse of down_block_types)")
    channels, out_channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != out_channels:
        differences.append(f"in_channels={channels} and out_channels={out_channels}")
    if [width % widths[0] for width in widths] != [0] * len(down):
        differences.append(f"block_out_channels={widths} (one multiple of the first for each block)")
    if differences:
        raise UserError(f"{path} describes another network than DDPM's U-Net: {'; '.join(differences)}.")
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    values = {
        "image_size": [height, width],
        "channels": channels,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attn_resolutions": [min(height, width) // 2**i for i, has_attention in enumerate(attention) if has_attention],
        "dropout": config.get("dropout", 0.0),
        "num_groups": config.get("norm_num_groups", 32),
        "classes": None if (count := config.get("num_class_embeds")) is None else count - 1,
    }
    return build(UNetSpec, values, str(path))


def scheduler_config(schedule: NoiseSchedule, prediction: str) -> dict[str, Any]:
    """Return the `scheduler_config.json` of a DDIMScheduler that samples as the paper does, without clipping."""
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
    """Return the schedule by its diffusers name if that reproduces it exactly, else as a list of betas."""
    betas = 1 - schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
    start, end = (float(f"{float(beta):.12g}") for beta in betas[[0, -1]])  # 1 - (1 - beta) loses digits of beta
    named = {"beta_schedule": BETA_SCHEDULES.get(schedule.name), "beta_start": start, "beta_end": end}
    if named["beta_schedule"] and torch.equal(_named_schedule(named, schedule.T).alpha_bar, schedule.alpha_bar):
        return {**named, "trained_betas": None}
    return {"beta_schedule": "linear", "trained_betas": betas.tolist()}


def _named_schedule(config: Mapping[str, Any], T: int) -> NoiseSchedule:
    """Return the schedule that a scheduler's configuration describes."""
    if config.get("trained_betas") is not None:
        return build(ScheduleSpec, {"name": "custom", "betas": config["trained_betas"]}, "trained_betas").build()
    names = {theirs: ours for ours, theirs in BETA_SCHEDULES.items()}
    name = choose("beta_schedule", str(config.get("beta_schedule", "linear")), names)
    ends = {key: config.get(key, default) for key, default in (("beta_start", 1e-4), ("beta_end", 0.02))}
    return build(ScheduleSpec, {"name": name, "T": T, **(ends if name != "cosine" else {})}, "schedule").build()


def has_betas(config: Mapping[str, Any]) -> bool:
    """Return whether a `scheduler_config.json` is of a scheduler with betas, as DDPM's; all of those state them.

    Others (flow matching, EDM, variance exploding, consistency models) have noise levels of other kinds.
    """
    return "beta_schedule" in config or "beta_start" in config or config.get("trained_betas") is not None


def read_scheduler(config: Mapping[str, Any], path: Path) -> tuple[NoiseSchedule, str]:
    """Return the schedule and the prediction type in the `scheduler_config.json` of any scheduler with betas.

    Raises:
        UserError: an entry is invalid or not supported.
    """
    if (shift := config.get("snr_shift_scale", 1)) != 1:
        raise UserError(f"{path}: snr_shift_scale={shift!r} is not supported; supported is 1, which shifts nothing.")
    predictions = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    prediction = predictions[_one_of("prediction_type", config.get("prediction_type", "epsilon"), predictions, path)]
    try:
        schedule = _named_schedule(config, config.get("num_train_timesteps", 1000))
        return zero_terminal_snr(schedule) if config.get("rescale_betas_zero_snr") else schedule, prediction
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from error


def read_sampler(config: Mapping[str, Any], path: Path) -> SamplerSpec:
    """Return how the scheduler of a `scheduler_config.json` samples, with as many steps as its pipeline takes.

    A DDPMScheduler is DDPM with the variance of its name over all T times; every other one is read as the DDIMScheduler
    that DDIMPipeline makes of it, with η = 0 and 50 steps.

    Raises:
        UserError: an entry is invalid.
    """
    if config.get("thresholding"):
        names = {"threshold_ratio": ("dynamic_thresholding_ratio", 0.995), "threshold_max": ("sample_max_value", 1.0)}
    else:
        names = {"clip_range": ("clip_sample_range", 1.0)} if config.get("clip_sample", True) else {}
    values = {ours: config.get(theirs, default) for ours, (theirs, default) in names.items()}
    spacing, offset = config.get("timestep_spacing", "leading"), config.get("steps_offset", 0)
    values |= {"spacing": _one_of("timestep_spacing", spacing, TIMESTEP_SPACINGS, path)}
    if spacing == "leading" and offset:
        values["steps_offset"] = offset
    if config.get("_class_name") == "DDPMScheduler":
        values["S"] = config.get("num_train_timesteps", 1000)
        large = str(config.get("variance_type")).startswith("fixed_large")
        values |= {"rule": "sigma_hat", "eta": None} if large else {"eta": 1.0}
        return build(SamplerSpec, values | {"clip": "x0_and_eps" if names else "none"}, str(path))
    last_time = 0 if config.get("set_alpha_to_one", True) else 1
    return build(SamplerSpec, values | {"last_time": last_time, "clip": "x0" if names else "none"}, str(path))


def _one_of(key: str, value: Any, allowed: Collection[str], path: Path) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"{path}: {key}={value!r} is not supported; supported are {', '.join(allowed)}.")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file does not exist, or does not hold a JSON object.
    """
    check_regular_file(path, "file")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({explain_content(path) or error}).") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object.")
    return values
