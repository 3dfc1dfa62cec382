"""Winograd's algorithm is a convolution: the same numbers, the same gradients, the same names."""

import copy

import pytest
import torch
from torch import nn

from ddim.networks import UNetSpec, build_network
from ddim.networks.cpu import native, winograd
from ddim.networks.cpu.norm_silu import NormSiLU, fuse_norms
from ddim.networks.cpu.winograd import WinogradConv2d, use_winograd

pytestmark = pytest.mark.usefixtures("compiler")
SPEC = UNetSpec((16, 32), ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), num_groups=8, init="torch")


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("tiles", [256, 11, 7])
@pytest.mark.parametrize("shape", [(2, 96, 8, 12), (1, 32, 8, 8), (5, 64, 16, 4), (3, 32, 4, 4), (11, 32, 4, 4)])
def test_output_and_gradients_are_those_of_a_direct_convolution(shape, tiles, monkeypatch, threads):
    monkeypatch.setattr(winograd, "TILES", tiles)
    direct = nn.Conv2d(shape[1], 32, 3, padding=1, dtype=torch.float64)
    fast = copy.deepcopy(direct)
    use_winograd(fast)
    assert type(fast) is WinogradConv2d
    outputs, gradients = [], []
    for layer in (direct, fast):
        x = gaussian(*shape).requires_grad_()
        y = layer(x)
        outputs.append(y)
        gradients.append(torch.autograd.grad(y, (x, *layer.parameters()), gaussian(*y.shape, seed=1)))
    assert (outputs[1] - outputs[0]).abs().max() < 1e-12
    for expected, got in zip(*gradients, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < 1e-11


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    layer = nn.Conv2d(64, 96, 3, padding=1).requires_grad_(False)
    use_winograd(layer)
    x = gaussian(13, 64, 8, 8, dtype=torch.float32)  # 4 tiles an image, while 6, 4 or 1 are multiplied at once
    whole = layer(x)
    for size in (1, 2, 7):
        assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), whole)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_network_keeps_its_outputs_and_its_names(frozen):
    network = build_network("unet", SPEC).eval().requires_grad_(not frozen)
    fast = copy.deepcopy(network)
    use_winograd(fast)
    used = [name for name, module in fast.named_modules() if isinstance(module, WinogradConv2d)]
    assert len(used) == 17  # all but the first, the last, and the one of stride 2
    assert fast.state_dict().keys() == network.state_dict().keys()
    x, t = gaussian(2, 3, 16, 32, dtype=torch.float32), torch.tensor([3, 800])
    with torch.no_grad():
        expected, got = network(x, t), fast(x, t)
    assert (got - expected).abs().max() < 5e-5 * expected.abs().max()
    assert not torch.equal(got, expected)


def test_weights_that_are_trained_are_seen_and_frozen_ones_are_transformed_once():
    layer = nn.Conv2d(32, 32, 3, padding=1)
    use_winograd(layer)
    assert layer.transformed is None
    frozen = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    use_winograd(frozen)
    assert frozen.transformed.shape == (36, 32, 32)
    assert "transformed" not in frozen.state_dict()
    x = gaussian(1, 32, 8, 8, dtype=torch.float32)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert (layer(x) - layer.bias[:, None, None] - 2 * (before - layer.bias[:, None, None])).abs().max() < 1e-4


def test_frozen_weights_let_a_gradient_of_the_input_through():
    layer = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    fast = copy.deepcopy(layer)
    use_winograd(fast)
    x = gaussian(1, 32, 8, 8, dtype=torch.float32).requires_grad_()
    expected, got = (torch.autograd.grad(convolution(x).square().sum(), x)[0] for convolution in (layer, fast))
    assert torch.equal(got, expected)


def test_a_profile_names_the_loops():
    layer = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    use_winograd(layer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(gaussian(1, 32, 8, 8, dtype=torch.float32))
    assert {f"winograd.{loop}" for loop in ("input_tiles", "products", "output")} <= {e.key for e in profiler.events()}


def test_frozen_weights_with_a_bias_that_is_trained_are_convolved_directly():
    layer = nn.Conv2d(32, 32, 3, padding=1)
    layer.weight.requires_grad_(False)
    use_winograd(layer)
    layer(gaussian(1, 32, 8, 8, dtype=torch.float32)).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((32,), 64.0))


@pytest.mark.parametrize("change", ["dtype", "processor"])
def test_filters_in_another_order_are_not_used(change, monkeypatch):
    layer = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(False)
    fast = copy.deepcopy(layer)
    use_winograd(fast)
    x = gaussian(1, 32, 8, 8, dtype=torch.float32)
    if change == "dtype":
        layer, fast, x = layer.double(), fast.double(), x.double()
    else:  # where it was pickled
        monkeypatch.setattr(native, "CAPABILITY", "another")
    assert torch.equal(fast(x), layer(x))


@pytest.mark.parametrize("x", [torch.ones(1, 64, 8, 8), torch.ones(1, 32, 8, 8, dtype=torch.float64)])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_does_not_fit_is_torch_s_to_refuse(x, frozen):
    layer = nn.Conv2d(32, 32, 3, padding=1).requires_grad_(not frozen)
    use_winograd(layer)
    with pytest.raises(RuntimeError):
        layer(x)


@pytest.mark.slow
def test_a_network_around_the_operations_can_be_compiled():
    """Without a break, with the same outputs and gradients."""
    block = nn.Sequential(NormSiLU(4, 32), nn.Conv2d(32, 64, 3, padding=1), NormSiLU(4, 64))
    results = []
    for compile in (False, True):
        torch.compiler.reset()
        fast = copy.deepcopy(block)
        use_winograd(fast)
        fuse_norms(fast)
        if compile:
            fast.compile(fullgraph=True, dynamic=False)
        x = gaussian(2, 32, 8, 8, dtype=torch.float32).requires_grad_()
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
def test_other_convolutions_stay_as_they_are(layer):
    use_winograd(layer)
    assert type(layer) is nn.Conv2d


@pytest.mark.parametrize("size", [(6, 8), (8, 2), (5, 5)])
def test_sizes_that_tiles_do_not_cover_are_convolved_directly(size):
    layer = nn.Conv2d(32, 32, 3, padding=1)
    fast = copy.deepcopy(layer)
    use_winograd(fast)
    x = gaussian(1, 32, *size, dtype=torch.float32)
    assert torch.equal(fast(x), layer(x))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch's own check
def test_the_operations_keep_what_torch_asks_of_them():
    """Shapes and strides told in advance, and gradients: what compiling a network around them relies on."""
    x, weight, bias = gaussian(2, 64, 8, 12), gaussian(32, 64, 3, 3).requires_grad_(), gaussian(32).requires_grad_()
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    torch.library.opcheck(torch.ops.ddim.winograd_trained.default, (x, weight, bias))
    filters = winograd._filters(weight.detach().permute(1, 2, 3, 0))
    grad = gaussian(2, 32, 8, 12, seed=1)
    arguments = (grad, x.detach(), weight.detach())
    torch.library.opcheck(torch.ops.ddim.winograd_gradients.default, arguments)
    for told, got in zip(winograd._gradients._abstract_fn(*arguments), winograd._gradients(*arguments), strict=True):
        assert (told.shape, told.stride()) == (got.shape, got.stride())
    torch.library.opcheck(torch.ops.ddim.winograd.default, (x.detach(), filters, bias.detach()))
