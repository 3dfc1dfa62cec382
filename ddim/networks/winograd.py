"""3x3 convolutions with a quarter of the multiplications, for processors that are fastest in float32.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, F(4x4, 3x3): with its B, G and A,
a tile of 4x4 outputs is A^T [(G g G^T) * (B^T d B)] A for the 6x6 inputs d below it and the filter g. Of all tiles and
channels together the elementwise product becomes 36 matrix products. What stands around them moves memory rather than
computes, so torch compiles it into a loop or three each, for all shapes.

In float32 the result differs from a direct convolution's by about 1e-5 of its range: a tenth of TF32's error, a
hundredth of bfloat16's, ten times that of a direct convolution.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUT, IN = 4, 6  # sides of a tile
TILES = 256  # at once, so that they stay in a cache
Matrix = Sequence[Sequence[float]]
Cells = Sequence[Sequence[Tensor]]  # a small matrix of tensors, by row and column

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
    """A 3x3 convolution of stride 1 and padding 1: (B, C_in, H, W) -> (B, C_out, H, W).

    `use_winograd` makes it of an `nn.Conv2d`, whose parameters it keeps. The output is laid out channels last. Images
    whose sides are not 8, 12, 16, ... pixels are convolved directly.
    """

    transformed: Tensor | None  # G g G^T of frozen weights, (36, C_in, C_out)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.transformed
        gradient = frozen is not None and x.requires_grad and torch.is_grad_enabled()
        if gradient or any(side % OUT or side == OUT for side in x.shape[2:]):
            return super().forward(x)
        assert self.bias is not None  # `use_winograd` sees to it
        return _trained(x, self.weight, self.bias) if frozen is None else _frozen(x, frozen, self.bias)


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
            frozen = None if module.weight.requires_grad else _filters(module.weight)
            module.register_buffer("transformed", frozen, persistent=False)


# Operations of their own, which torch neither traces into nor breaks at when it compiles the network around them.


@torch.library.custom_op("ddim::winograd", mutates_args=())
def _frozen(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """(B, C_in, H, W), (36, C_in, C_out), (C_out,) -> (B, C_out, H, W)."""
    return _convolve(x.permute(0, 2, 3, 1), filters, bias.detach()).permute(0, 3, 1, 2)


@torch.library.custom_op("ddim::winograd_trained", mutates_args=())
def _trained(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C_in, H, W), (C_out, C_in, 3, 3), (C_out,) -> (B, C_out, H, W)."""
    return _frozen(x, _fused(_filters)(weight.detach()), bias)


@torch.library.custom_op("ddim::winograd_gradients", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C_out, H, W), (B, C_in, H, W), (C_out, C_in, 3, 3) -> gradients of x and of weight."""
    grad, x, weight = grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1), weight.detach()
    flipped = _fused(_filters)(weight.flip(2, 3).transpose(0, 1))
    grad_x = _convolve(grad, flipped, grad.new_zeros(weight.shape[1])).permute(0, 3, 1, 2)
    products = grad.new_zeros(IN * IN, weight.shape[1], weight.shape[0])
    for part, spread in zip(_parts(x), _parts(grad), strict=True):
        products.baddbmm_(_input_tiles(part).transpose(1, 2), _fused(_spread_tiles)(spread))
    return grad_x, _fused(_unfiltered)(products).contiguous()  # as was promised to torch


def _output_like(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], len(bias)).permute(0, 3, 1, 2)


_frozen.register_fake(_output_like)
_trained.register_fake(_output_like)
_gradients.register_fake(
    lambda grad, x, weight: (_output_like(grad, weight, weight[0, :, 0, 0]), torch.empty_like(weight).contiguous())
)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *_gradients(grad, *ctx.saved_tensors), grad.sum((0, 2, 3))


_trained.register_autograd(_backward, setup_context=_keep)


def _convolve(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, C_in), (36, C_in, C_out), (C_out,) -> (B, H, W, C_out)."""
    y = x.new_empty(*x.shape[:3], filters.shape[2])
    for part, out in zip(_parts(x), _parts(y), strict=True):
        _fused(_gather)(torch.bmm(_input_tiles(part), filters), bias, out)
    return y


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Cut (B, H, W, C) along B into equal parts of about TILES tiles: code is compiled for one image or for many."""
    images = max(1, TILES * OUT * OUT // (x.shape[1] * x.shape[2]))
    return x.tensor_split(math.ceil(len(x) / images))


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """One loop for a function of small matrices of tensors, compiled for all shapes, or twice or thrice for all.

    torch takes sizes that are 1, or equal to each other, in the first call for a rule, and the shape of an
    `nn.Parameter` for constant: hand over what `detach` returns.
    """
    return torch.compile(function, dynamic=True)


def _input_tiles(x: Tensor) -> Tensor:
    """B^T d B of every tile: (B, H, W, C) -> (36, B H/4 W/4, C)."""
    return _fused(_tiles)(F.pad(x, (0, 0, 1, 1, 1, 1)))


def _tiles(x: Tensor) -> Tensor:
    height, width = x.shape[1] - IN + OUT, x.shape[2] - IN + OUT
    cells = [[x[:, i : i + height : OUT, j : j + width : OUT] for j in range(IN)] for i in range(IN)]
    return _stack(_sandwich(_B, cells)).flatten(1, 3)


def _gather(products: Tensor, bias: Tensor, y: Tensor) -> None:
    """A^T m A of every tile plus the bias: (36, B H/4 W/4, C), (C,) -> into y (B, H, W, C)."""
    batch, height, width, _ = y.shape
    tiles = products.unflatten(1, (batch, height // OUT, width // OUT)).unflatten(0, (IN, IN))
    rows = [torch.stack([cell + bias for cell in row], 3) for row in _sandwich(_A, tiles.unbind(0))]
    y.copy_(torch.stack(rows, 2).reshape(y.shape))


def _spread_tiles(y: Tensor) -> Tensor:
    """A y A^T of every tile, the transpose of `_gather`: (B, H, W, C) -> (36, B H/4 W/4, C)."""
    cells = [[y[:, i::OUT, j::OUT] for j in range(OUT)] for i in range(OUT)]
    return _stack(_sandwich(_transpose(_A), cells)).flatten(1, 3)


def _filters(weight: Tensor) -> Tensor:
    """G g G^T of every filter: (C_out, C_in, 3, 3) -> (36, C_in, C_out)."""
    return _stack(_sandwich(_G, [[weight[:, :, i, j].T for j in range(3)] for i in range(3)]))


def _unfiltered(products: Tensor) -> Tensor:
    """G^T m G, the transpose of `_filters`: (36, C_in, C_out) -> (C_out, C_in, 3, 3)."""
    cells = _sandwich(_transpose(_G), products.unflatten(0, (IN, IN)).unbind(0))
    return _stack(cells).permute(2, 1, 0).unflatten(2, (3, 3))


def _sandwich(matrix: Matrix, cells: Cells) -> Cells:
    """M X M^T for a small matrix X of tensors."""
    columns = [_combine(matrix, column) for column in zip(*cells, strict=True)]
    return [_combine(matrix, row) for row in zip(*columns, strict=True)]


def _combine(matrix: Matrix, parts: Sequence[Tensor]) -> list[Tensor]:
    """M v for a vector of tensors; zeros cost nothing."""
    return [functools.reduce(torch.add, [f * part for f, part in zip(row, parts, strict=True) if f]) for row in matrix]


def _stack(cells: Cells) -> Tensor:
    """All cells, row by row, along a new first dimension."""
    return torch.stack([cell for row in cells for cell in row])


def _transpose(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))
