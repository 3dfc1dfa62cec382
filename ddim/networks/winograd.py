"""3x3 convolutions with a quarter of the multiplications, for processors that are fastest in float32.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, F(4x4, 3x3): with its B, G and A,
a tile of 4x4 outputs is A^T [(G g G^T) * (B^T d B)] A for the 6x6 inputs d below it and the filter g. Of all tiles and
channels together the elementwise product becomes 36 matrix products.

In float32 the result differs from a direct convolution's by about 1e-5 of its range: a tenth of TF32's error, a
hundredth of bfloat16's, ten times that of a direct convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUT, IN = 4, 6  # sides of a tile
TILES = 256  # at once, so that they stay in a cache
Matrix = Sequence[Sequence[float]]

_B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)  # B^T
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_A = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)  # A^T


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1: (B, C_in, H, W) -> (B, C_out, H, W); H and W divisible by 4.

    `use_winograd` makes it of an `nn.Conv2d`, whose parameters it keeps.
    """

    transformed: Tensor | None  # G g G^T of frozen weights, (6, 6, C_in, C_out)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.transformed
        gradient = frozen is not None and x.requires_grad and torch.is_grad_enabled()
        if gradient or x.shape[2] % OUT or x.shape[3] % OUT:
            return super().forward(x)
        x = x.permute(0, 2, 3, 1)
        y = _Convolution.apply(x, self.weight) if frozen is None else _convolve(x, frozen)
        assert self.bias is not None  # `use_winograd` sees to it
        return (y + self.bias).permute(0, 3, 1, 2)


def use_winograd(network: nn.Module, least: int = 32) -> None:
    """Let the 3x3 convolutions of a network use Winograd's algorithm, in place; names and weights stay.

    Weights that take no gradient are transformed once, here, which takes four times their memory: change them
    afterwards and the network does not see it. Others are transformed in each evaluation.

    Args:
        network: any.
        least: channels, on either side, below which a convolution stays as it is.
    """
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
            and min(module.in_channels, module.out_channels) >= least
            and module.bias is not None
        ):
            module.__class__ = WinogradConv2d
            frozen = None if module.weight.requires_grad else _transform_filter(module.weight).contiguous()
            module.register_buffer("transformed", frozen, persistent=False)


class _Convolution(torch.autograd.Function):
    """(B, H, W, C_in), (C_out, C_in, 3, 3) -> (B, H, W, C_out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, _transform_filter(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (x, weight), (grad,) = ctx.saved_tensors, gradients
        flipped = _transform_filter(weight.flip(2, 3).transpose(0, 1))
        height, width = x.shape[1] // OUT, x.shape[2] // OUT
        tiles = grad.unflatten(1, (height, OUT)).unflatten(3, (width, OUT)).permute(2, 4, 0, 1, 3, 5)
        spread = _combine(_T(_A), _combine(_T(_A), tiles.unbind(0)).unbind(1))  # A y A^T: (6 columns, 6 rows, ...)
        inputs = _transform_input(x)
        product = _matrices(inputs).transpose(1, 2) @ _matrices(spread)
        filters = product.unflatten(0, (IN, IN))
        columns = _combine(_T(_G), filters.unbind(0))  # (3 columns, 6 rows, C_in, C_out)
        return _convolve(grad, flipped), _combine(_T(_G), columns.unbind(1)).permute(3, 2, 0, 1)


def _convolve(x: Tensor, filters: Tensor) -> Tensor:
    """(B, H, W, C_in), (6, 6, C_in, C_out) -> (B, H, W, C_out)."""
    images = max(1, TILES * OUT * OUT // (x.shape[1] * x.shape[2]))
    if len(x) > images:
        return torch.cat([_convolve(part, filters) for part in x.split(images)])
    inputs = _transform_input(x)
    product = torch.bmm(_matrices(inputs), _matrices(filters)).view(*inputs.shape[:-1], filters.shape[-1])
    rows = _combine(_A, _combine(_A, product.unbind(0)).unbind(1))  # (4 rows, 4 columns, B, H/4, W/4, C_out)
    return rows.permute(2, 3, 0, 4, 1, 5).flatten(1, 2).flatten(2, 3)


def _transform_input(x: Tensor) -> Tensor:
    """B^T d B of every tile: (B, H, W, C) -> (6 columns, 6 rows, B, H/4, W/4, C)."""
    height, width = x.shape[1], x.shape[2]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    rows = _combine(_B, [x[:, i : i + height - OUT + 1 : OUT] for i in range(IN)])
    return _combine(_B, [rows[:, :, :, j : j + width - OUT + 1 : OUT] for j in range(IN)])


def _transform_filter(weight: Tensor) -> Tensor:
    """G g G^T of every filter: (C_out, C_in, 3, 3) -> (6 columns, 6 rows, C_in, C_out)."""
    columns = _combine(_G, weight.permute(2, 3, 1, 0).unbind(1))
    return _combine(_G, columns.unbind(1)).transpose(0, 1)


def _combine(matrix: Matrix, parts: Sequence[Tensor]) -> Tensor:
    """The products of a small matrix with a vector of tensors, stacked, outside of autograd; zeros cost nothing."""
    sums = parts[0].new_empty(len(matrix), *parts[0].shape)
    for total, row in zip(sums.unbind(0), matrix, strict=True):
        (first, part), *others = [(factor, part) for factor, part in zip(row, parts, strict=True) if factor]
        torch.mul(part, first, out=total)
        for factor, part in others:
            total.add_(part, alpha=factor)
    return sums


def _matrices(x: Tensor) -> Tensor:
    """(6, 6, ..., C) -> (36, ..., C) as 36 matrices."""
    return x.reshape(IN * IN, -1, x.shape[-1])


def _T(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))
