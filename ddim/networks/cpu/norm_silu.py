"""Group normalisation and SiLU as one operation on CPUs, in `norm_silu.cpp`.

torch has two operations, and writes and reads every value once more in between. Results differ by rounding only.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.networks.cpu import native
from ddim.networks.unet import NormSiLU

SOURCE = Path(__file__).with_suffix(".cpp")


class FusedNormSiLU(NormSiLU):
    """`NormSiLU` as one operation: (B, C, H, W) -> the same shape, in channels_last format; made by `fuse_norms`.

    Has no second derivative.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not native.supports(x, self.weight, self.num_channels):
            return super().forward(x)
        return _norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)[0]


def fuse_norms(network: nn.Module) -> None:
    """Replace each `NormSiLU` of a network by a `FusedNormSiLU`, in place; names and values of the weights stay.

    Modules whose channels are not a multiple of 32 stay as they are.

    Raises:
        UserError: the compiler is missing or fails.
    """
    native.load(SOURCE)  # errors of the compiler come before any work
    for module in network.modules():
        if type(module) is NormSiLU and module.affine and module.num_channels % native.CHANNELS == 0:
            module.__class__ = FusedNormSiLU


@torch.library.custom_op("ddim::norm_silu", mutates_args=())
def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(B, C, H, W), (C,), (C,) -> (B, C, H, W), and (2, B, groups): mean and 1 / standard deviation of each group."""
    nhwc = native.to_nhwc(x)
    y, moments = torch.empty_like(nhwc), nhwc.new_empty(2, len(x), groups)
    native.run(SOURCE, "forward", x.dtype, nhwc, weight, bias, y, *moments, eps, *_sizes(nhwc, groups))
    return y.permute(0, 3, 1, 2), moments


@torch.library.custom_op("ddim::norm_silu_gradients", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the output -> gradients of x, (B, C, H, W), and of weight and bias, (2, C)."""
    grad, nhwc = native.to_nhwc(grad), native.to_nhwc(x)
    grad_x, per_image = torch.empty_like(nhwc), nhwc.new_empty(2, len(x), x.shape[1])
    tensors = (grad, nhwc, weight, bias, *moments, grad_x, *per_image)
    native.run(SOURCE, "backward", x.dtype, *tensors, *_sizes(nhwc, moments.shape[2]))
    return grad_x.permute(0, 3, 1, 2), per_image.sum(1)


def _sizes(nhwc: Tensor, groups: int) -> tuple[int, ...]:
    batch, height, width, channels = nhwc.shape
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


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_parameters = _gradients(grad, *ctx.saved_tensors)
    return grad_x, *grad_parameters, None, None


_norm_silu.register_autograd(_backward, setup_context=_save_for_backward)
