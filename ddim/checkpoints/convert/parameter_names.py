"""Names and shapes of the U-Net's parameters, here and in files of diffusers; conversion between them.

The names here are those of the original DDPM files. The mapping needs no diffusers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.errors import UserError
from ddim.io import Tensors, printable
from ddim.networks import build_network, without_memory

_MODULES = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "class_emb": "class_embedding",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
}
_LAYERS = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_BLOCKS = {"block": "resnets", "attn": "attentions"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# The U-Nets of other code bases -> a name that only their parameters have. Each is another network than DDPM's U-Net.
_OTHER_NETWORKS = {
    "improved-diffusion, guided-diffusion and latent diffusion": r"input_blocks\.0\.0\.weight",
    "pytorch-ddpm": r"time_embedding\.timembedding\.\d+\.weight",
    "denoising-diffusion-pytorch": r"init_conv\.weight",
    "score_sde_pytorch": r"all_modules\.0\.weight",
}


@dataclass(frozen=True)
class ParameterNames:
    """Names and shapes of a network's parameters in a file.

    Attributes:
        network: the spec of the network.
        diffusers: the file uses diffusers' names and shapes of a U-Net; otherwise those of the network here, which are
            the original DDPM ones.
        name: of the network, a key of NETWORKS.
    """

    network: Any
    diffusers: bool
    name: str = "unet"

    @cached_property
    def parameters(self) -> Tensors:
        """Our name -> a tensor of our shape and type without values; buffers too, which require no gradient."""
        with without_memory(self.name):
            state = build_network(self.name, self.network).state_dict(keep_vars=True)
        return {
            name: torch.empty_like(value, device="meta", requires_grad=value.requires_grad)
            for name, value in state.items()
        }

    @cached_property
    def our_shapes(self) -> dict[str, tuple[int, ...]]:
        """Our name -> our shape."""
        return {name: tuple(value.shape) for name, value in self.parameters.items()}

    @cached_property
    def names(self) -> dict[str, str]:
        """Our name -> name in the file."""
        if not self.diffusers:
            return {name: name for name in self.parameters}
        return {name: to_diffusers(name, len(self.network.ch_mult)) for name in self.parameters}

    @cached_property
    def file_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape in the file. Attention's 1x1 convolutions are linear layers in diffusers."""
        linear = {name for name in self.names.values() if self.diffusers and _is_linear(name)}
        return {other: self.our_shapes[name][: 2 if other in linear else None] for name, other in self.names.items()}

    def mismatches(self, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
        """Return why a state dict (names of the file) does not fit: kind of mismatch -> parameters; {} if it fits."""
        shapes = self.file_shapes
        wrong = {
            "missing": [name for name in shapes if name not in state],
            "unexpected": [name for name in state if name not in shapes],
            "of the wrong shape": [
                f"{name} {tuple(state[name].shape)} instead of {shape}"
                for name, shape in shapes.items()
                if name in state and tuple(state[name].shape) != shape
            ],
        }
        return {kind: names for kind, names in wrong.items() if names}

    def from_file(self, state: Mapping[str, Tensor]) -> Tensors:
        """Return the weights of a file under our names, in our shapes."""
        return {name: state[other].reshape(self.our_shapes[name]) for name, other in self.names.items()}

    def to_file(self, state: Mapping[str, Tensor]) -> Tensors:
        """Undo `from_file`."""
        return {other: state[name].reshape(self.file_shapes[other]) for name, other in self.names.items()}


def describe_mismatches(mismatches: Mapping[str, list[str]]) -> str:
    """Return mismatches as one phrase that names the first five parameters of each kind."""
    phrases = []
    for kind, parameters in mismatches.items():
        names = [printable(name) for name in parameters]
        phrases.append(f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' * (len(names) > 5)})")
    return "; ".join(phrases)


def to_diffusers(name: str, levels: int) -> str:
    """Return diffusers' name of one of our parameters. Its `up_blocks` are numbered in the order in which they run."""
    module, kind = name.rsplit(".", 1)
    if module in _MODULES:
        return f"{_MODULES[module]}.{kind}"
    if match := re.fullmatch(r"(mid\.\w+)\.(\w+)", module):
        return f"{_MODULES[match[1]]}.{_LAYERS.get(match[2], match[2])}.{kind}"
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(\w+)\.(.+)", module):
        side, level, block, rest = match[1], int(match[2]), match[3], match[4]
        prefix = f"{side}_blocks.{level if side == 'down' else levels - 1 - level}"
        if block in ("downsample", "upsample"):
            return f"{prefix}.{block}rs.0.{rest}.{kind}"
        number, _, layer = rest.partition(".")
        return f"{prefix}.{_BLOCKS[block]}.{number}.{_LAYERS.get(layer, layer)}.{kind}"
    return name


def update_attention_names(state: Tensors) -> Tensors:
    """Rename the attention layers of diffusers' files from before 2023 to the current names."""
    pattern = re.compile(rf"(attentions\.\d+)\.({'|'.join(_OLD_ATTENTION)})\.")
    return {pattern.sub(lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name): value for name, value in state.items()}


def _is_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer in diffusers, where ours is a 1x1 convolution."""
    return re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight$", name) is not None


def strip_prefixes(state: Mapping[str, Tensor], path: Path) -> Tensors:
    """Remove the prefixes of wrappers (DataParallel's `module.`, torch.compile's `_orig_mod.`) from parameter names.

    Raises:
        UserError: this is no state dict, or that of a network which is known to be another.
    """
    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path}: the entry {wrong[0]!r} is not a tensor, so this is not a state dict.")
    bare = {".".join(p for p in str(k).split(".") if p not in ("module", "_orig_mod")): v for k, v in state.items()}
    if len(bare) < len(state):
        raise UserError(f"{path} holds parameters twice, with and without the prefix module. or _orig_mod.")
    for project, pattern in _OTHER_NETWORKS.items():
        if any(re.search(rf"(^|\.){pattern}$", name) for name in bare):
            raise UserError(
                f"{path} holds the U-Net of {project}, which is another network than DDPM's U-Net; take weights of "
                "DDPM's U-Net."
            )
    return bare
