"""Group normalisation followed by SiLU, in one operation on CPUs: `norm_silu.cpp`.

torch has the two apart, and writes and reads every number once more in between. Results are the same but for rounding.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.networks.cpu import native

SOURCE = Path(__file__).with_suffix(".cpp")


class NormSiLU(nn.GroupNorm):
    """SiLU of a group normalisation: (B, C, ...) -> the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class FusedNormSiLU(NormSiLU):
    """The same in one operation, whose output is laid out channels last; `fuse_norms` makes it of a `NormSiLU`.

    A gradient of a gradient cannot be had.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not native.takes(x, self.weight, self.num_channels):
            return super().forward(x)
        return _norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)[0]


def fuse_norms(network: nn.Module) -> None:
    """Replace the `NormSiLU` of a network by a faster one, in place; names and weights stay.

    Those whose channels are no multiple of 32 stay as they are.
    """
    native.load(SOURCE)  # what it has to say, it says before work starts
    for module in network.modules():
        if type(module) is NormSiLU and module.affine and module.num_channels % native.CHANNELS == 0:
            module.__class__ = FusedNormSiLU


@torch.library.custom_op("ddim::norm_silu", mutates_args=())
def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(B, C, H, W), (C,), (C,) -> (B, C, H, W), and mean and reciprocal deviation of the groups, (2, B, groups)."""
    pixels = native.pixels(x)
    y, moments = torch.empty_like(pixels), pixels.new_empty(2, len(x), groups)
    native.run(SOURCE, "forward", x.dtype, pixels, weight, bias, y, *moments, eps, *_sizes(pixels, groups))
    return y.permute(0, 3, 1, 2), moments


@torch.library.custom_op("ddim::norm_silu_gradients", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight and bias, (2, C), for one of the output."""
    grad, pixels = native.pixels(grad), native.pixels(x)
    grad_x, by_image = torch.empty_like(pixels), pixels.new_empty(2, len(x), x.shape[1])
    tensors = (grad, pixels, weight, bias, *moments, grad_x, *by_image)
    native.run(SOURCE, "backward", x.dtype, *tensors, *_sizes(pixels, moments.shape[2]))
    return grad_x.permute(0, 3, 1, 2), by_image.sum(1)


def _sizes(pixels: Tensor, groups: int) -> tuple[int, ...]:
    batch, height, width, channels = pixels.shape
    return batch, height * width, channels, groups


_norm_silu.register_fake(
    lambda x, weight, bias, groups, eps: (
        torch.empty_like(x, memory_format=torch.channels_last),
        x.new_empty(2, len(x), groups),
    )
)
_gradients.register_fake(
    lambda grad, x, weight, bias, moments: (
        torch.empty_like(x, memory_format=torch.channels_last),
        x.new_empty(2, x.shape[1]),
    )
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grad_x, of_parameters = _gradients(grad, *ctx.saved_tensors)
    return grad_x, *of_parameters, None, None


_norm_silu.register_autograd(_backward, setup_context=_keep)
