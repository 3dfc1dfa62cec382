"""The fused operation is SiLU of a group normalisation: the same numbers, the same gradients, the same names."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddim.networks import UNetSpec, build_network
from ddim.networks.cpu import native, norm_silu
from ddim.networks.cpu.norm_silu import FusedNormSiLU, NormSiLU, fuse_norms

pytestmark = pytest.mark.usefixtures("compiler")
SHAPES = [(2, 32, 5, 7), (1, 96, 8, 8), (3, 64, 1, 1), (2, 32, 9, 16)]  # 129 pixels and fewer than 64


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def a_pair(groups, channels, dtype=torch.float64):
    """The plain module and the fused one, with weights that are no defaults."""
    plain = NormSiLU(groups, channels, eps=1e-6, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(gaussian(channels, seed=2))
        plain.bias.copy_(gaussian(channels, seed=3))
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    assert type(fused) is FusedNormSiLU
    return plain, fused


def test_the_plain_module_is_silu_of_a_group_normalisation():
    plain, _ = a_pair(8, 32)
    x = gaussian(2, 32, 5, 7)
    assert torch.equal(plain(x), F.silu(F.group_norm(x, 8, plain.weight, plain.bias, 1e-6)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [2, 8, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_output_and_gradients_are_those_of_the_two_operations(shape, groups, dtype, tolerance, threads):
    results = []
    for module in a_pair(groups, shape[1], dtype):
        x = (3 * gaussian(*shape, dtype=dtype) + 7).requires_grad_()
        y = module(x)
        grad = gaussian(*shape, seed=1, dtype=dtype)
        results.append((y, *torch.autograd.grad(y, (x, module.weight, module.bias), grad)))
    for expected, got in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < tolerance * max(1, expected.abs().max())


def test_the_input_has_a_gradient_where_weights_have_none_and_that_of_a_sum_is_one():
    grads = []
    for module in a_pair(8, 32):
        x = gaussian(2, 32, 4, 4).requires_grad_()
        module.requires_grad_(False)(x).sum().backward()  # whose gradient is one number, expanded
        grads.append(x.grad)
    assert (grads[1] - grads[0]).abs().max() < 1e-12


def test_an_image_does_not_depend_on_the_others_of_its_batch(threads):
    _, fused = a_pair(8, 64, torch.float32)
    x = gaussian(13, 64, 8, 12, dtype=torch.float32)
    whole = fused(x)
    for size in (1, 2, 7):
        assert torch.equal(torch.cat([fused(part) for part in x.split(size)]), whole)


def test_in_float32_it_is_as_exact_as_torch():
    plain, fused = a_pair(8, 64, torch.float32)
    x = gaussian(4, 64, 32, 32, dtype=torch.float32) + 100  # a mean that dwarfs the deviation
    exact = copy.deepcopy(plain).double()(x.double())
    errors = [(module(x) - exact).abs().max() for module in (plain, fused)]
    assert errors[1] <= 1.5 * errors[0]


def test_the_exponential_is_right_everywhere():
    """With weights of zero what SiLU sees is the bias."""
    z = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-30, -1e-30, 87.9, -87.9])])
    module = NormSiLU(1, 32)
    fuse_norms(module)
    with torch.no_grad():
        module.weight.zero_()
    for value in z:
        with torch.no_grad():
            module.bias.fill_(value)
            got = module(gaussian(1, 32, 1, 1, dtype=torch.float32))[0, 0, 0, 0].item()
        expected = value.item() / (1 + math.exp(-value.item()))
        assert got == pytest.approx(expected, rel=5e-7, abs=1e-36), value


def test_a_network_keeps_its_outputs_and_its_names():
    spec = UNetSpec(
        (16, 16), ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), num_groups=8, init="torch"
    )
    network = build_network("unet", spec).eval()
    fast = copy.deepcopy(network)
    fuse_norms(fast)
    fused = [name for name, module in fast.named_modules() if isinstance(module, FusedNormSiLU)]
    assert len(fused) == 17  # two a residual block, and the last
    assert "norm_out" in fused
    assert fast.state_dict().keys() == network.state_dict().keys()
    x, t = gaussian(2, 3, 16, 16, dtype=torch.float32), torch.tensor([3, 800])
    with torch.no_grad():
        expected, got = network(x, t), fast(x, t)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("module", [NormSiLU(4, 48), NormSiLU(4, 32, affine=False), nn.GroupNorm(4, 32)])
def test_others_stay_as_they_are(module):
    kind = type(module)
    fuse_norms(module)
    assert type(module) is kind


@pytest.mark.parametrize("x", [torch.ones(2, 32, 4), torch.ones(2, 32, 4, 4, dtype=torch.bfloat16)])
def test_what_the_loop_is_not_for_is_left_to_torch(x, monkeypatch):
    plain, fused = a_pair(4, 32, x.dtype)
    monkeypatch.setattr(native, "run", None)
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("x", [torch.ones(2, 64, 4, 4), torch.ones(2, 32, 4, 4, dtype=torch.float64)])
def test_what_does_not_fit_is_torch_s_to_refuse(x):
    with pytest.raises(RuntimeError):
        a_pair(4, 32, torch.float32)[1](x)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch's own check
def test_the_operations_keep_what_torch_asks_of_them():
    x = gaussian(2, 32, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = gaussian(32, seed=1).requires_grad_(), gaussian(32, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.ddim.norm_silu.default, (x, weight, bias, 4, 1e-6))
    _, moments = norm_silu._norm_silu(x.detach(), weight.detach(), bias.detach(), 4, 1e-6)
    arguments = (gaussian(2, 32, 3, 5, seed=3), x.detach(), weight.detach(), bias.detach(), moments)
    torch.library.opcheck(torch.ops.ddim.norm_silu_gradients.default, arguments)
