"""The fused operation equals group normalisation and SiLU: same outputs, gradients and names."""

import copy
import math

import pytest
import torch
from tensors import gaussian, gaussian32
from torch import nn
from torch.nn import functional as F

from ddim.networks.cpu import native, norm_silu
from ddim.networks.cpu.norm_silu import FusedNormSiLU, fuse_norms
from ddim.networks.unet import NormSiLU

pytestmark = pytest.mark.usefixtures("compiler")
SHAPES = [(2, 32, 5, 7), (1, 96, 8, 8), (3, 64, 1, 1), (2, 32, 9, 16)]  # 129 pixels and fewer than 64


def plain_and_fused(groups, channels, dtype=torch.float64):
    """The plain and the fused module, with weights other than the defaults."""
    plain = NormSiLU(groups, channels, eps=1e-6, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(gaussian(channels, seed=2))
        plain.bias.copy_(gaussian(channels, seed=3))
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    assert type(fused) is FusedNormSiLU
    return plain, fused


def test_the_plain_module_is_group_norm_then_silu():
    plain, _ = plain_and_fused(8, 32)
    x = gaussian(2, 32, 5, 7)
    assert torch.equal(plain(x), F.silu(F.group_norm(x, 8, plain.weight, plain.bias, 1e-6)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [2, 8, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_output_and_gradients_equal_the_two_operations(shape, groups, dtype, tolerance, threads):
    results = []
    for module in plain_and_fused(groups, shape[1], dtype):
        x = (3 * gaussian(*shape, dtype=dtype) + 7).requires_grad_()
        y = module(x)
        grad = gaussian(*shape, seed=1, dtype=dtype)
        results.append((y, *torch.autograd.grad(y, (x, module.weight, module.bias), grad)))
    for expected, got in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < tolerance * max(1, expected.abs().max())


def test_frozen_weights_pass_the_gradient_of_the_input():
    grads = []
    for module in plain_and_fused(8, 32):
        x = gaussian(2, 32, 4, 4).requires_grad_()
        module.requires_grad_(False)(x).sum().backward()  # an expanded gradient, not contiguous
        grads.append(x.grad)
    assert (grads[1] - grads[0]).abs().max() < 1e-12


def test_float32_is_as_accurate_as_torch():
    plain, fused = plain_and_fused(8, 64, torch.float32)
    x = gaussian32(4, 64, 32, 32) + 100  # a mean that dwarfs the deviation
    exact = copy.deepcopy(plain).double()(x.double())
    errors = [(module(x) - exact).abs().max() for module in (plain, fused)]
    assert errors[1] <= 1.5 * errors[0]


def test_silu_is_accurate_over_the_whole_range():
    """With zero weights the input of SiLU is the bias."""
    z = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-30, -1e-30, 87.9, -87.9])])
    module = NormSiLU(1, 32)
    fuse_norms(module)
    with torch.no_grad():
        module.weight.zero_()
        for values in F.pad(z, (0, -len(z) % 32)).split(32):
            module.bias.copy_(values)
            expected = [value / (1 + math.exp(-value)) for value in values.tolist()]
            assert module(gaussian32(1, 32, 1, 1)).flatten().tolist() == pytest.approx(expected, rel=5e-7, abs=1e-36)


@pytest.mark.parametrize("module", [NormSiLU(4, 48), NormSiLU(4, 32, affine=False), nn.GroupNorm(4, 32)])
def test_unsuitable_modules_stay_as_they_are(module):
    kind = type(module)
    fuse_norms(module)
    assert type(module) is kind


@pytest.mark.parametrize("x", [torch.ones(2, 32, 4), torch.ones(2, 32, 4, 4, dtype=torch.bfloat16)])
def test_other_inputs_are_computed_by_torch(x, monkeypatch):
    plain, fused = plain_and_fused(4, 32, x.dtype)
    monkeypatch.setattr(native, "run", None)
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("x", [torch.ones(2, 64, 4, 4), torch.ones(2, 32, 4, 4, dtype=torch.float64)])
def test_mismatched_inputs_are_refused_by_torch(x):
    with pytest.raises(RuntimeError):
        plain_and_fused(4, 32, torch.float32)[1](x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of opcheck
def test_the_custom_operations_pass_opcheck():
    x = gaussian(2, 32, 3, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = gaussian(32, seed=1).requires_grad_(), gaussian(32, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.ddim.norm_silu.default, (x, weight, bias, 4, 1e-6))
    _, moments = norm_silu._norm_silu(x.detach(), weight.detach(), bias.detach(), 4, 1e-6)
    arguments = (gaussian(2, 32, 3, 5, seed=3), x.detach(), weight.detach(), bias.detach(), moments)
    torch.library.opcheck(torch.ops.ddim.norm_silu_gradients.default, arguments)
