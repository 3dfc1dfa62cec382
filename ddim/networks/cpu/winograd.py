"""3x3 convolutions with a quarter of the multiplications (Winograd's algorithm), in float32 and float64 on CPUs.

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, F(4x4, 3x3): with the paper's B, G
and A, a tile of 4x4 outputs is A^T [(G g G^T) * (B^T d B)] A, for the 6x6 inputs d below it and the filter g. Over all
tiles and channels the elementwise product is 36 matrix products. Transforms and products are in `winograd.cpp`: torch
compiles the transforms into slow loops, and its library takes a sixth longer for products of these sizes.

The output of an image does not depend on the other images of its batch, bit for bit.

In float32 the error is about 1e-5 of the output's range: ten times that of a direct convolution, a tenth of TF32's, a
hundredth of bfloat16's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.networks.cpu import native

OUT, IN = 4, 6  # sides of a tile of outputs and of the inputs that it needs, in pixels
TILES = 256  # processed together: few enough to stay in the cache
SOURCE = Path(__file__).with_suffix(".cpp")


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1: (B, C_in, H, W) -> (B, C_out, H, W).

    Made by `use_winograd` from an `nn.Conv2d`, whose parameters it keeps. The output is in channels_last format. Images
    whose sides are not multiples of 4 pixels, and dtypes other than float32 and float64, are convolved directly.
    Has no second derivative.
    """

    transformed: Tensor | None  # G g G^T of frozen weights, (36, C_in, C_out), in the order of winograd.cpp's `filters`
    order: tuple[torch.dtype, str]  # the dtype and instruction set that decide that order

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None  # checked by `use_winograd`
        if not native.supports(x, self.weight, self.in_channels) or any(side % OUT for side in x.shape[2:]):
            return super().forward(x)
        if self.transformed is None:
            return _trained(x, self.weight, self.bias)
        needs_grad = any(tensor.requires_grad for tensor in (x, self.weight, self.bias)) and torch.is_grad_enabled()
        if needs_grad or self.order != (x.dtype, native.CAPABILITY):
            return super().forward(x)
        return _frozen(x, self.transformed, self.bias)


def use_winograd(network: nn.Module) -> None:
    """Let the 3x3 convolutions of a network use Winograd's algorithm, in place; names and values of the weights stay.

    Weights that take no gradient are transformed here, once, into four times their memory; later changes of them have
    no effect. Other weights are transformed in each evaluation.

    Args:
        network: on the CPU. Convolutions whose input or output channels are not a multiple of 32 stay as they are.

    Raises:
        UserError: the compiler is missing or fails.
    """
    native.load(SOURCE)  # errors of the compiler come before any work
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
            and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, "zeros")
            and module.in_channels % native.CHANNELS == module.out_channels % native.CHANNELS == 0
            and module.weight.dtype in native.TYPES
            and module.bias is not None
        ):
            module.__class__ = WinogradConv2d
            assert isinstance(module, WinogradConv2d)
            frozen = None if module.weight.requires_grad else _filters(module.weight)
            module.register_buffer("transformed", frozen, persistent=False)
            module.order = (module.weight.dtype, native.CAPABILITY)


# Custom operations: torch.compile neither traces into them nor breaks the graph at them.


@torch.library.custom_op("ddim::winograd", mutates_args=())
def _frozen(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """(B, C_in, H, W), (36, C_in, C_out), (C_out,) -> (B, C_out, H, W)."""
    return _convolve(native.to_nhwc(x), filters, bias).permute(0, 3, 1, 2)


@torch.library.custom_op("ddim::winograd_trained", mutates_args=())
def _trained(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C_in, H, W), (C_out, C_in, 3, 3), (C_out,) -> (B, C_out, H, W)."""
    return _convolve(native.to_nhwc(x), _filters(weight), bias).permute(0, 3, 1, 2)


@torch.library.custom_op("ddim::winograd_gradients", mutates_args=())
def _gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C_out, H, W), (B, C_in, H, W), (C_out, C_in, 3, 3) -> gradients of x and of weight."""
    grad, x = native.to_nhwc(grad), native.to_nhwc(x)
    grad_x = _convolve(grad, _filters(weight, turned=True), None).permute(0, 3, 1, 2)
    products = grad.new_empty(IN * IN, weight.shape[0], weight.shape[1])
    buffers = zip(_parts(x), _parts(grad), _buffers(x), _buffers(grad), strict=True)
    for i, (part, part_grad, tiles, spread) in enumerate(buffers):
        _cut("input_tiles", part, tiles)
        _cut("spread_tiles", part_grad, spread)
        products.baddbmm_(spread[:, :-1].transpose(1, 2), tiles[:, :-1], beta=min(i, 1))  # of the first part: written
    grad_weight = x.new_empty(weight.shape[0], 3, 3, weight.shape[1])
    _join("weights", products, grad_weight)
    return grad_x, grad_weight.permute(0, 3, 1, 2)


def _output_like(x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], x.shape[3], len(bias)).permute(0, 3, 1, 2)


_frozen.register_fake(_output_like)
_trained.register_fake(_output_like)
_gradients.register_fake(
    lambda grad, x, weight: (
        _output_like(grad, weight, weight[0, :, 0, 0]),
        torch.empty_like(weight, memory_format=torch.channels_last),
    )
)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return *_gradients(grad, *ctx.saved_tensors), grad.sum((0, 2, 3))


_trained.register_autograd(_backward, setup_context=_save_for_backward)


def _convolve(x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, W, C_in), (36, C_in, C_out), (C_out,) -> (B, H, W, C_out)."""
    y = x.new_empty(*x.shape[:3], filters.shape[2])
    for part, out, tiles, products in zip(_parts(x), _parts(y), _buffers(x), _buffers(y), strict=True):
        _cut("input_tiles", part, tiles)
        sizes = (tiles.shape[1] - 1, x.shape[3], y.shape[3], tiles.stride(0), products.stride(0))
        native.run(SOURCE, "products", x.dtype, tiles, filters, products, *sizes)
        _join("output", products, out, bias)
    return y


def _filters(weight: Tensor, turned: bool = False) -> Tensor:
    """G g G^T of every filter, stored in the order in which `winograd.cpp` reads them: (C_out, C_in, 3, 3) ->
    (36, C_in, C_out), or of the filters turned by half a turn (36, C_out, C_in), for the gradient of the inputs.
    """
    rows, columns = weight.shape[:2] if turned else weight.shape[1::-1]
    filters = weight.new_empty(IN * IN, rows, columns)
    native.run(SOURCE, "filters", weight.dtype, native.to_nhwc(weight), filters, rows, columns, int(turned))
    return filters


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Split (B, H, W, C) along B into parts of about TILES tiles."""
    return x.split(max(1, TILES * OUT * OUT // (x.shape[1] * x.shape[2])))


def _buffers(x: Tensor) -> Sequence[Tensor]:
    """Return a buffer (36, T + 1, C) for the T tiles of each part of (B, H, W, C).

    All parts share one memory, which so stays in the cache. The extra row is unused: without it the 36 matrices would
    often lie a power of two apart and evict each other from the cache.
    """
    rows = [part.shape[0] * part.shape[1] * part.shape[2] // OUT**2 + 1 for part in _parts(x)]
    memory = x.new_empty(IN * IN * rows[0] * x.shape[3])
    return [memory[: IN * IN * count * x.shape[3]].view(IN * IN, count, x.shape[3]) for count in rows]


def _cut(transform: str, images: Tensor, tiles: Tensor) -> None:
    """Split images (B, H, W, C) into T tiles, transform each, and write them into (36, at least T, C)."""
    native.run(SOURCE, transform, images.dtype, images, tiles, *images.shape, tiles.stride(0))


def _join(transform: str, tiles: Tensor, images: Tensor, bias: Tensor | None = None) -> None:
    """Transform tiles (36, at least T, C), add a bias (C,), and write them to images (B, H, W, C)."""
    pointer = 0 if bias is None else bias
    native.run(SOURCE, transform, tiles.dtype, tiles, pointer, images, *images.shape, tiles.stride(0))
