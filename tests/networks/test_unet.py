"""The layers and properties of the U-Net; `test_unet_published.py` compares it with the published network."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.errors import UserError
from ddim.networks import UNet, UNetSpec, build_network, zero_based
from ddim.networks.unet import AttentionBlock, Downsample, ResidualBlock, Upsample, attention, time_embedding

SMALL = UNetSpec(
    image_size=(8, 12),
    channels=2,
    ch=8,
    ch_mult=(1, 2, 2),
    attn_resolutions=(4,),
    dropout=0.5,
    num_groups=4,
    init="torch",
)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def small_net(**changes: Any) -> UNet:
    """A small evaluating network in which every parameter, biases and norms too, is away from 0 and 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(dataclasses.replace(SMALL, **changes))
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return network.eval()


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, 8, 12, generator=generator)
    return x, torch.tensor([0, 7, 999, 400])[:batch]


# ----------------------------------------------------------------------------------------------------- layers


def test_time_embedding_is_float32_under_autocast() -> None:
    t = torch.tensor([0, 1, 511, 512, 513, 999])
    expected = [[f(int(s) * 10000 ** (-k / 63)) for f in (math.sin, math.cos) for k in range(64)] for s in t]
    with torch.autocast("cpu", torch.bfloat16):
        embedding = time_embedding(t, 128)
    assert embedding.dtype == torch.float32
    torch.testing.assert_close(embedding, torch.tensor(expected), atol=1e-4, rtol=0)  # 999 * 2^-24 = 6e-5


@torch.no_grad()
def test_attention_is_softmax_of_scaled_dot_products() -> None:
    block = AttentionBlock(SMALL, 8)
    x = torch.randn(2, 8, 3, 5)
    h = block.norm(x).flatten(2)
    q, k, v = (
        torch.einsum("oc,bcn->bon", m.weight[:, :, 0, 0], h) + m.bias[:, None] for m in (block.q, block.k, block.v)
    )
    scores = torch.exp(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8))
    mixed = torch.einsum("bnm,bcm->bcn", scores / scores.sum(2, keepdim=True), v)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed.reshape(x.shape)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels_last", [False, True])
def test_attention_has_the_bits_of_torchs(channels_last: bool) -> None:
    def torchs(*qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(each[:, None] for each in qkv))[:, 0]

    shape = (2, 25, 48) if channels_last else (2, 48, 25)
    qkv = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    results = []
    for attend in (attention, torchs):
        output = attend(*(each if channels_last else each.mT for each in qkv))
        results.append([output, *torch.autograd.grad(output.square().sum(), qkv)])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_attention_does_not_test_scores_for_a_mask() -> None:
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        AttentionBlock(SMALL, 8)(torch.randn(2, 8, 3, 5))
    assert "aten::softmax" in (names := {event.key for event in profile.key_averages()})
    assert "aten::isneginf" not in names  # of _safe_softmax


@torch.no_grad()
def test_downsampling_pads_right_and_bottom() -> None:
    down = Downsample(1)
    down.conv.bias.zero_()
    x = torch.randn(1, 1, 4, 6)
    down.conv.weight.copy_(F.one_hot(torch.tensor(0), 9).view(1, 1, 3, 3))  # the top left tap: no shift
    assert torch.equal(down(x), x[..., ::2, ::2])
    down.conv.weight.copy_(F.one_hot(torch.tensor(8), 9).view(1, 1, 3, 3))  # the bottom right tap: shift by two
    assert torch.equal(down(x), F.pad(x[..., 2::2, 2::2], (0, 1, 0, 1)))


@torch.no_grad()
def test_upsampling_repeats_pixels() -> None:
    up = Upsample(2)
    nn.init.dirac_(up.conv.weight)
    up.conv.bias.zero_()
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


# ----------------------------------------------------------------------------------------------------- properties


@torch.no_grad()
def test_output_depends_on_time_and_every_channel() -> None:
    network = small_net()
    x, t = inputs()
    reference = network(x, t)
    assert reference.shape == x.shape
    per_image = (network(x, t + 1) - reference).abs().amax((1, 2, 3))
    assert per_image.min() > 1e-3
    for channel in range(x.shape[1]):
        changed = x.clone()
        changed[:, channel, 0, 0] += 1
        assert (network(changed, t) - reference).abs().max() > 1e-3


@torch.no_grad()
def test_output_depends_on_the_label_of_each_image() -> None:
    network = small_net(classes=3)
    x, t = inputs()
    outputs = torch.stack([network(x, t, torch.full((3,), y)) for y in range(4)])
    differences = (outputs[:, None] - outputs[None]).abs().amax((3, 4, 5))
    assert differences[~torch.eye(4, dtype=torch.bool)].min() > 1e-3
    mixed = network(x, t, torch.tensor([2, 3, 0]))
    torch.testing.assert_close(mixed, outputs[[2, 3, 0], range(3)], atol=1e-6, rtol=1e-5)


def test_unconditional_networks_keep_their_names_and_weights() -> None:
    for init in ("ddpm", "torch"):
        torch.manual_seed(0)
        plain = UNet(dataclasses.replace(SMALL, init=init))
        torch.manual_seed(0)
        conditional = UNet(dataclasses.replace(SMALL, init=init, classes=10)).state_dict()
        assert conditional.pop("class_emb.weight").shape == (11, 32)
        assert conditional.keys() == plain.state_dict().keys()
        assert all(torch.equal(value, conditional[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(("classes", "shape"), [(None, (3,)), (3, None), (3, (1,)), (3, (3, 1))])
def test_labels_belong_to_conditional_networks(classes: int | None, shape: tuple[int, ...] | None) -> None:
    y = None if shape is None else torch.zeros(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=f"one label per image.*this one has classes={classes}"):
        small_net(classes=classes)(*inputs(), y)


def test_gradients_reach_every_parameter() -> None:
    network = small_net(classes=3)
    network(*inputs(), torch.tensor([0, 1, 3])).square().sum().backward()
    largest = {name: p.grad.abs().max().item() for name, p in network.named_parameters() if p.grad is not None}
    assert set(largest) == set(network.state_dict())
    # Softmax does not see a bias of the keys: it adds the same number to a query's every score.
    blind = {name for name in largest if name.endswith(".k.bias")}
    assert len(blind) == 6
    assert max(largest[name] for name in blind) < 1e-4
    assert min(value for name, value in largest.items() if name not in blind) > 1e-3


@torch.no_grad()
def test_images_of_a_batch_do_not_mix() -> None:
    network = small_net()
    x, t = inputs(4)
    order = torch.tensor([2, 0, 3, 1])
    reference = network(x, t)
    torch.testing.assert_close(network(x[order], t[order]), reference[order], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(network(x[1:2], t[1:2]), reference[1:2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    network, plain = small_net(), small_net(dropout=0.0)
    x, t = inputs()
    assert torch.equal(network(x, t), network(x, t))
    assert torch.equal(network(x, t), plain(x, t))
    network.train()
    plain.train()
    assert not torch.allclose(network(x, t), network(x, t), atol=1e-3)
    assert torch.equal(plain(x, t), plain(x, t))


@torch.no_grad()
def test_memory_format_is_kept_through_the_network() -> None:
    x, t = inputs()
    results = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = small_net().to(memory_format=memory_format)
        kept: list[bool] = []
        for module in network.modules():
            if isinstance(module, ResidualBlock | AttentionBlock | Downsample | Upsample):
                module.register_forward_hook(
                    lambda _m, _i, out, kept=kept, wanted=memory_format: kept.append(
                        out.is_contiguous(memory_format=wanted)
                    )
                )
        results[memory_format] = network(x.contiguous(memory_format=memory_format), t)
        assert len(kept) == 17 + 6 + 2 + 2  # levels 6 + 9 and middle 2; attention 2 + 3 + 1; two changes each way
        assert all(kept)
    torch.testing.assert_close(*results.values(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_runs_in_other_precisions() -> None:
    network = small_net()
    x, t = inputs()
    reference = network(x, t)
    torch.testing.assert_close(network.double()(x.double(), t).float(), reference, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = network.float()(x, t)
    assert low.dtype == torch.bfloat16
    assert 0 < (low - reference).square().mean().sqrt() < 0.03 * reference.std()


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_compiles_to_one_graph(autocast: bool) -> None:
    network = small_net(ch_mult=(1, 2), num_res_blocks=1)
    x, t = inputs()
    compiled = torch.compile(network, fullgraph=True, backend="eager")  # a graph break is an error
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(compiled(x, t), network(x, t))


# ------------------------------------------------------------------------------------------------- initialisation


def weighted_layers(network: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


@torch.no_grad()
def test_ddpm_initialisation_is_xavier_with_zero_last_layers() -> None:
    network = UNet(dataclasses.replace(SMALL, init="ddpm"))
    zeroed = {name for name in weighted_layers(network) if re.search(r"(^|\.)(conv2|proj_out|conv_out)$", name)}
    assert len(zeroed) == 17 + 6 + 1
    for name, layer in weighted_layers(network).items():
        assert not layer.bias.any(), name
        if name in zeroed:
            assert not layer.weight.any(), name
            continue
        taps = layer.weight[0, 0].numel()
        limit = math.sqrt(6 / (taps * (layer.weight.shape[0] + layer.weight.shape[1])))
        assert 0.85 * limit < layer.weight.abs().max() <= limit, name
        assert layer.weight.square().mean().sqrt().item() == pytest.approx(limit / math.sqrt(3), rel=0.25), name
    assert not network(*inputs()).any()


@torch.no_grad()
def test_torch_initialisation_is_pytorchs_default() -> None:
    network = UNet(SMALL)
    for name, layer in weighted_layers(network).items():
        limit = 1 / math.sqrt(layer.weight[0].numel())
        assert 0.85 * limit < layer.weight.abs().max() <= limit, name
        assert 0 < layer.bias.abs().max() <= limit, name
    assert network.eval()(*inputs()).std() > 0.01


# ------------------------------------------------------------------------------------- registry and time adapter


def test_zero_based_feeds_the_papers_time_minus_one() -> None:
    model = zero_based(lambda x, t: x + t[:, None])
    t = torch.tensor([1, 2, 1000])
    assert torch.equal(model(torch.zeros(3, 1), t)[:, 0], torch.tensor([0.0, 1.0, 999.0]))
    assert t.tolist() == [1, 2, 1000]
    conditional = zero_based(lambda x, t, y: x + t[:, None] + 10 * y[:, None])
    assert conditional(torch.zeros(3, 1), t, torch.tensor([2, 0, 1]))[:, 0].tolist() == [20, 1, 1009]


def test_networks_are_built_by_name() -> None:
    assert isinstance(build_network("unet", SMALL), UNet)
    with pytest.raises(UserError, match=r"unknown network 'unett' \(did you mean unet\?\)"):
        build_network("unett", SMALL)
    with pytest.raises(TypeError, match="takes a UNetSpec, not a dict"):
        build_network("unet", {"ch": 8})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": (8, 10)}, "image_size 8x10 does not fit 3 levels: both sides must be divisible by 4; resize"),
        ({"image_size": (10, 8)}, "image_size 10x8 does not fit 3 levels"),
        ({"attn_resolutions": (4, 12)}, "no level has the resolution 12; choose among 8, 4, 2"),
        ({"num_groups": 3}, "num_groups=3 does not divide a width of 8 channels"),
        ({"ch": 10, "ch_mult": (2, 4, 4)}, "num_groups=4 does not divide a width of 10 channels"),
        ({"num_groups": 8}, "one channel per group at a width of 8, .* cancel the time embedding"),
        ({"dropout": 1.0}, r"dropout=1.0 must be a probability in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1 must be"),
        ({"init": "zeros"}, "init='zeros' is not known; choose one of ddpm, torch"),
        ({"ch": 6, "ch_mult": (), "num_groups": 1}, r"ch_mult=\(\) must be positive"),
        ({"ch": 2, "num_groups": 1}, "ch=2 must be even and at least 4"),
        ({"ch": 9, "num_groups": 3}, "ch=9 must be even"),
        ({"ch": 0}, "ch=0 must be positive"),
        ({"channels": 0}, "channels=0 must be positive"),
        ({"image_size": (0, 8)}, r"image_size=\(0, 8\) must be positive"),
        ({"ch_mult": (1, -2)}, r"ch_mult=\(1, -2\) must be positive"),
        ({"num_res_blocks": 0}, "num_res_blocks=0 must be positive"),
        ({"num_groups": 0}, "num_groups=0 must be positive"),
        ({"classes": 0}, "classes=0 must be positive"),
    ],
)
def test_spec_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_one_channel_per_group_would_hide_the_time() -> None:
    """The reason for one of the refusals: the normalisation after the time embedding removes it."""
    spec = dataclasses.replace(SMALL)  # a copy
    object.__setattr__(spec, "num_groups", 8)
    block = ResidualBlock(spec, 8, 8).eval()
    x, temb = torch.randn(1, 8, 8, 8), torch.randn(2, 1, 32)
    torch.testing.assert_close(block(x, temb[0]), block(x, temb[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1, 8, 12), (3, 2, 12, 8), (2, 8, 12), (), (1,), (3, 1)])
def test_forward_refuses_other_shapes_of_images_and_times(shape: tuple[int, ...]) -> None:
    images, times, expected = (shape, (3,), "(B, *(2, 8, 12))") if len(shape) > 2 else ((3, 2, 8, 12), shape, "(3,)")
    with pytest.raises(ValueError, match=f"{re.escape(str(shape))}.*{re.escape(expected)}"):
        small_net()(torch.zeros(images), torch.zeros(times, dtype=torch.long))
