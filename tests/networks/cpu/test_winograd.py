"""Winograd's algorithm equals a direct convolution: same outputs, gradients and names."""

import copy

import pytest
import torch
from tensors import gaussian, gaussian32
from torch import nn

from ddim.networks.cpu import native, use_cpp_loops, winograd
from ddim.networks.cpu.winograd import WinogradConv2d, use_winograd
from ddim.networks.unet import NormSiLU

pytestmark = pytest.mark.usefixtures("compiler")


def pair(frozen=False, size=32):
    """A direct convolution and the same one by Winograd's algorithm."""
    direct = nn.Conv2d(size, 32, 3, padding=1).requires_grad_(not frozen)
    fast = copy.deepcopy(direct)
    use_winograd(fast)
    assert type(fast) is WinogradConv2d
    return direct, fast


@pytest.mark.parametrize("tiles", [256, 11, 7])
@pytest.mark.parametrize("shape", [(2, 96, 8, 12), (1, 32, 8, 8), (5, 64, 16, 4), (3, 32, 4, 4), (11, 32, 4, 4)])
def test_output_and_gradients_equal_a_direct_convolution(shape, tiles, monkeypatch, threads):
    monkeypatch.setattr(winograd, "TILES", tiles)
    outputs, gradients = [], []
    for layer in pair(size=shape[1]):
        layer.double()
        x = gaussian(*shape).requires_grad_()
        y = layer(x)
        outputs.append(y)
        gradients.append(torch.autograd.grad(y, (x, *layer.parameters()), gaussian(*y.shape, seed=1)))
    assert (outputs[1] - outputs[0]).abs().max() < 1e-12
    for expected, got in zip(*gradients, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < 1e-11


def test_frozen_weights_are_transformed_in_advance():
    _, frozen = pair(frozen=True)
    assert frozen.transformed.shape == (36, 32, 32)
    assert "transformed" not in frozen.state_dict()


def test_changes_of_trained_weights_take_effect():
    _, layer = pair()
    assert layer.transformed is None
    x, bias = gaussian32(1, 32, 8, 8), layer.bias[:, None, None]
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert (layer(x) - bias - 2 * (before - bias)).abs().max() < 1e-4


def test_frozen_weights_pass_the_gradient_of_the_input():
    x = gaussian32(1, 32, 8, 8).requires_grad_()
    expected, got = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in pair(frozen=True))
    assert torch.equal(got, expected)


def test_frozen_weights_with_a_trained_bias_use_torch():
    layer = nn.Conv2d(32, 32, 3, padding=1)
    layer.weight.requires_grad_(False)
    use_winograd(layer)
    layer(gaussian32(1, 32, 8, 8)).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((32,), 64.0))


def test_a_profile_names_the_loops():
    _, layer = pair(frozen=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(gaussian32(1, 32, 8, 8))
    assert {f"winograd.{loop}" for loop in ("input_tiles", "products", "output")} <= {e.key for e in profiler.events()}


@pytest.mark.parametrize("change", ["dtype", "processor"])
def test_filters_in_another_order_are_not_used(change, monkeypatch):
    layer, fast = pair(frozen=True)
    x = gaussian32(1, 32, 8, 8)
    if change == "dtype":
        layer, fast, x = layer.double(), fast.double(), x.double()
    else:  # unpickled on another machine
        monkeypatch.setattr(native, "CAPABILITY", "another")
    assert torch.equal(fast(x), layer(x))


@pytest.mark.parametrize("x", [torch.ones(1, 64, 8, 8), torch.ones(1, 32, 8, 8, dtype=torch.float64)])
@pytest.mark.parametrize("frozen", [True, False])
def test_mismatched_inputs_are_refused_by_torch(x, frozen):
    _, layer = pair(frozen)
    with pytest.raises(RuntimeError):
        layer(x)


@pytest.mark.slow
def test_surrounding_layers_compile_to_one_graph():
    """With the same outputs and gradients."""
    block = nn.Sequential(NormSiLU(4, 32), nn.Conv2d(32, 64, 3, padding=1), NormSiLU(4, 64))
    results = []
    for compile in (False, True):
        torch.compiler.reset()
        fast = copy.deepcopy(block)
        use_cpp_loops(fast)
        if compile:
            fast.compile(fullgraph=True, dynamic=False)
        x = gaussian32(2, 32, 8, 8).requires_grad_()
        y = fast(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, *fast.parameters()))))
    for expected, got in zip(*results, strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(40, 32, 3, padding=1),
    ],
)
def test_unsuitable_convolutions_stay_as_they_are(layer):
    use_winograd(layer)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("size", [(6, 8), (8, 2), (5, 5)])
def test_sizes_that_tiles_do_not_cover_are_convolved_directly(size):
    layer, fast = pair()
    x = gaussian32(1, 32, *size)
    assert torch.equal(fast(x), layer(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of opcheck
def test_the_custom_operations_pass_opcheck():
    """Predicted shapes and strides, and gradients: what compiling a network around them relies on."""
    x, weight, bias = gaussian(2, 64, 8, 12), gaussian(32, 64, 3, 3).requires_grad_(), gaussian(32).requires_grad_()
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.ddim.winograd_trained.default, (x, weight, bias))
    filters = winograd._filters(weight.detach())
    grad = gaussian(2, 32, 8, 12, seed=1)
    arguments = (grad, x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.ddim.winograd_gradients.default, arguments)
    for predicted, got in zip(
        winograd._gradients._abstract_fn(*arguments), winograd._gradients(*arguments), strict=True
    ):
        assert (predicted.shape, predicted.stride()) == (got.shape, got.stride())
    torch.library.opcheck(torch.ops.ddim.winograd.default, (x.detach(), filters, bias.detach()))
