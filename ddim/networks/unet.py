"""DDPM's U-Net, the network of every experiment of the DDIM paper.

Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, appendix B. Modules carry the names of the
original PyTorch files, so that published flat state dicts load key for key; `up.{i}` is level i, not the i-th to run.

Shapes in comments: B images, C channels, H x W pixels, D = 4 ch features of the time embedding.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddim.networks.time_embedding import time_embedding

Init = Literal["ddpm", "torch"]


@dataclass(frozen=True)
class UNetSpec:
    """The hyperparameters of a `UNet`; the defaults are those of the CIFAR-10 network.

    Args:
        image_size: (H, W) in pixels; both divisible by 2 ** (len(ch_mult) - 1).
        channels: channels of the image.
        ch: width of the first convolution, and length of the sinusoidal time embedding.
        ch_mult: one entry per level, from the full resolution down; level i is `ch * ch_mult[i]` wide.
        num_res_blocks: residual blocks per level on the way down; one more on the way up.
        attn_resolutions: shorter sides, in pixels, of the levels with attention after every residual block. The middle
            has one attention block in any case.
        dropout: probability of zeroing an activation inside a residual block, in [0, 1).
        num_groups: groups of every group normalisation; each group must hold at least two channels.
        init: "ddpm" is Ho et al.'s initialisation, "torch" the PyTorch defaults that the official PyTorch code uses.
        out_channels: channels of the output; None for those of the image.
        classes: K labels that the network is conditional on, 0..K-1; None for an unconditional network.

    Raises:
        ValueError: a value out of range, or values that do not fit together.
    """

    image_size: tuple[int, int]
    channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    num_groups: int = 32
    init: Init = "ddpm"
    out_channels: int | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        counts = ("channels", "ch", "ch_mult", "num_res_blocks", "num_groups", "out_channels", "classes")
        for name in ("image_size", *counts):
            value = getattr(self, name)
            if value is None:
                continue
            if value == () or min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ValueError(f"{name}={value} must be positive; give whole numbers of at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be a probability in [0, 1); use 0 for none.")
        if self.init not in get_args(Init):
            raise ValueError(f"init={self.init!r} is not known; choose one of {', '.join(get_args(Init))}.")
        if self.ch % 2 or self.ch < 4:
            raise ValueError(
                f"ch={self.ch} must be even and at least 4 for the sines and cosines of the time embedding."
            )
        self._check_sizes()
        self._check_groups()

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The shorter side of the feature maps at each level, in pixels, from the full resolution down."""
        return tuple(min(self.image_size) // 2**level for level in range(len(self.ch_mult)))

    def _check_sizes(self) -> None:
        height, width = self.image_size
        levels = len(self.ch_mult)
        divisor = 2 ** (levels - 1)
        if height % divisor or width % divisor:
            raise ValueError(
                f"image_size {height}x{width} does not fit {levels} levels: both sides must be divisible by {divisor}; "
                "resize or pad the images, or shorten ch_mult."
            )
        if unmatched := [r for r in self.attn_resolutions if r not in self.resolutions]:
            raise ValueError(
                f"attn_resolutions={self.attn_resolutions}: no level has the resolution {unmatched[0]}; "
                f"choose among {', '.join(map(str, self.resolutions))} (shorter side, level by level)."
            )

    def _check_groups(self) -> None:
        widths = [self.ch * mult for mult in self.ch_mult]
        if unfit := [width for width in (self.ch, *widths) if width % self.num_groups]:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide a width of {unfit[0]} channels "
                f"(ch={self.ch}, ch_mult={self.ch_mult}); change one of the three."
            )
        # The time embedding shifts whole channels; a norm over single channels would remove every such shift.
        if self.num_groups in widths:
            raise ValueError(
                f"num_groups={self.num_groups} leaves one channel per group at a width of {self.num_groups}, where "
                "normalisation would cancel the time embedding; use at least two channels per group."
            )


class TimeMLP(nn.Module):
    """Two linear layers on the sinusoidal embedding: (B,) times -> (B, D)."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.ch = ch
        self.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])

    def forward(self, t: Tensor) -> Tensor:
        embedding = time_embedding(t, self.ch).to(next(self.parameters()).dtype)  # float64 networks need float64
        return self.dense[1](F.silu(self.dense[0](embedding)))


class NormSiLU(nn.GroupNorm):
    """Group normalisation, then SiLU: (B, C, ...) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def _norm_silu(spec: UNetSpec, width: int) -> NormSiLU:
    return NormSiLU(spec.num_groups, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added in between: (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, spec: UNetSpec, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = _norm_silu(spec, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.temb_proj = nn.Linear(4 * spec.ch, width_out)
        self.norm2 = _norm_silu(spec, width_out)
        self.dropout = nn.Dropout(spec.dropout)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x))
        h = h + rearrange(self.temb_proj(F.silu(temb)), "b c -> b c 1 1")
        h = self.conv2(self.dropout(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Residual self-attention with one head over the H*W pixels: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, spec: UNetSpec, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(spec.num_groups, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # the default scale is C^(-1/2)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Strided 3x3 convolution: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Right and bottom only: what "SAME" padding means at stride 2 in the original TensorFlow code.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, on one side of the U: residual blocks, each followed by attention if configured."""

    def __init__(self, spec: UNetSpec, widths_in: list[int], width: int, resolution: int) -> None:
        super().__init__()
        attention = resolution in spec.attn_resolutions
        self.block = nn.ModuleList(ResidualBlock(spec, width_in, width) for width_in in widths_in)
        self.attn = nn.ModuleList(AttentionBlock(spec, width) if attention else nn.Identity() for _ in widths_in)


class DownLevel(Level):
    """A level on the way down; returns every output that the way up needs as a skip, the level's output last."""

    def __init__(self, spec: UNetSpec, widths_in: list[int], width: int, resolution: int, halve: bool) -> None:
        super().__init__(spec, widths_in, width, resolution)
        self.downsample = Downsample(width) if halve else None

    def forward(self, h: Tensor, temb: Tensor) -> list[Tensor]:
        outputs = []
        for block, attn in zip(self.block, self.attn, strict=True):
            h = attn(block(h, temb))
            outputs.append(h)
        if self.downsample is not None:
            outputs.append(self.downsample(h))
        return outputs


class UpLevel(Level):
    """A level on the way up; each residual block also takes the last entry of `skips` off that list."""

    def __init__(self, spec: UNetSpec, widths_in: list[int], width: int, resolution: int, double: bool) -> None:
        super().__init__(spec, widths_in, width, resolution)
        self.upsample = Upsample(width) if double else nn.Identity()

    def forward(self, h: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            h = attn(block(torch.cat([h, skips.pop()], dim=1), temb))
        return self.upsample(h)


class Middle(nn.Module):
    """The blocks at the lowest resolution: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, spec: UNetSpec, width: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(spec, width, width)
        self.attn_1 = AttentionBlock(spec, width)
        self.block_2 = ResidualBlock(spec, width, width)

    def forward(self, h: Tensor, temb: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h, temb)), temb)


class UNet(nn.Module):
    """DDPM's U-Net: predicts a (B, out_channels, H, W) tensor, usually the noise, from x_t and the time.

    A conditional one also takes labels: their embedding is added to that of the time (Dhariwal and Nichol 2021). One
    more row of it, K, is that of no label (Ho and Salimans 2022).

    Activations keep the memory format of the input when the weights have it too (`to(memory_format=channels_last)`).
    """

    def __init__(self, spec: UNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.temb = TimeMLP(spec.ch)
        self.conv_in = nn.Conv2d(spec.channels, spec.ch, 3, padding=1)
        widths = [spec.ch * mult for mult in spec.ch_mult]
        lowest = len(widths) - 1

        down, skip_widths = [], [spec.ch]
        for i, width in enumerate(widths):
            widths_in = [skip_widths[-1]] + [width] * (spec.num_res_blocks - 1)
            down.append(DownLevel(spec, widths_in, width, spec.resolutions[i], halve=i < lowest))
            skip_widths += [width] * (spec.num_res_blocks + (i < lowest))
        self.down = nn.ModuleList(down)

        self.mid = Middle(spec, widths[-1])

        up, below = [], widths[-1]
        for i in reversed(range(len(widths))):
            before = [below] + [widths[i]] * spec.num_res_blocks
            widths_in = [width + skip_widths.pop() for width in before]
            up.append(UpLevel(spec, widths_in, widths[i], spec.resolutions[i], double=i > 0))
            below = widths[i]
        self.up = nn.ModuleList(reversed(up))

        self.norm_out = _norm_silu(spec, widths[0])
        self.conv_out = nn.Conv2d(widths[0], spec.out_channels or spec.channels, 3, padding=1)
        if spec.init == "ddpm":
            _init_ddpm(self)
        if spec.classes is not None:  # last, so that everything else has the weights of an unconditional network
            self.class_emb = nn.Embedding(spec.classes + 1, 4 * spec.ch)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            x: (B, C, H, W) float, usually in about [-1, 1] plus noise; C, H and W as in the spec.
            t: (B,) integer, zero-based network times 0..T-1 (`ddim.networks.zero_based` takes the paper's 1..T).
            y: (B,) int64 labels 0..K of a conditional network, where K is no label; None for an unconditional one.

        Returns:
            (B, out_channels, H, W), in the dtype of x, or in autocast's where that is on.

        Raises:
            ValueError: x, t or y has the wrong shape, or y is given to an unconditional network or not to another.
        """
        expected = (self.spec.channels, *self.spec.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"x has the shape {tuple(x.shape)}, but this network takes (B, C, H, W) = (B, *{expected})."
            )
        if tuple(t.shape) != (x.shape[0],):
            raise ValueError(f"t has the shape {tuple(t.shape)}, but must hold one time per image: ({x.shape[0]},).")
        if (None if y is None else tuple(y.shape)) != (None if self.spec.classes is None else tuple(t.shape)):
            raise ValueError(
                f"y has the shape {None if y is None else tuple(y.shape)}; a conditional network takes one label per "
                f"image, ({x.shape[0]},), and another takes none; this one has classes={self.spec.classes}."
            )
        temb = self.temb(t) if y is None else self.temb(t) + self.class_emb(y)  # (B, D)
        skips = [self.conv_in(x)]
        for level in self.down:
            skips += level(skips[-1], temb)
        h = self.mid(skips[-1], temb)
        for level in reversed(self.up):
            h = level(h, temb, skips)
        return self.conv_out(self.norm_out(h))


def _init_ddpm(network: UNet) -> None:
    """Initialise as Ho et al.: Xavier uniform weights, zero biases, zero last layers.

    The last layers (conv2 of every residual block, proj_out of every attention block, conv_out) get variance scale
    1e-10 there and exactly 0 here, so that an untrained network returns exactly 0.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if name.split(".")[-1] in ("conv2", "proj_out", "conv_out"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None  # every convolution and linear layer above has one
            nn.init.zeros_(module.bias)
