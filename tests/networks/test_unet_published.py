"""The U-Net against an independent transcription of the publication: parameter counts, names, formulas, configs."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from composed import group_values
from torch import Tensor, nn

from ddim.config import build
from ddim.networks import NETWORKS, UNet, UNetSpec, build_network
from ddim.networks.categorical import CategoricalUNetSpec

CONFIGS = Path(__file__).parents[2] / "configs" / "network"
CIFAR10 = UNetSpec(image_size=(32, 32))
CELEBA = UNetSpec(image_size=(64, 64), ch_mult=(1, 2, 2, 2, 4))
LSUN = UNetSpec(image_size=(256, 256), ch_mult=(1, 1, 2, 2, 4, 4), dropout=0.0)
DIGITS = UNetSpec((8, 8), 1, 32, (1, 1), 1, (4,), 0.0, 8)


def published_cifar10_layout() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the original CIFAR-10 file, from the published layout: widths 128, 256, 256, 256."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = weight[:1]

    def res(name: str, n_in: int, n_out: int) -> None:
        layer(f"{name}.norm1", n_in)
        layer(f"{name}.conv1", n_out, n_in, 3, 3)
        layer(f"{name}.temb_proj", n_out, 512)
        layer(f"{name}.norm2", n_out)
        layer(f"{name}.conv2", n_out, n_out, 3, 3)
        if n_in != n_out:
            layer(f"{name}.nin_shortcut", n_out, n_in, 1, 1)

    def attention(name: str) -> None:
        layer(f"{name}.norm", 256)
        for projection in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{projection}", 256, 256, 1, 1)

    layer("temb.dense.0", 512, 128)
    layer("temb.dense.1", 512, 512)
    layer("conv_in", 128, 3, 3, 3)
    down = [[(128, 128), (128, 128)], [(128, 256), (256, 256)], [(256, 256)] * 2, [(256, 256)] * 2]
    up = [
        [(384, 128), (256, 128), (256, 128)],  # 256 from below + 128, then 128 + 128
        [(512, 256), (512, 256), (384, 256)],  # the last skip is the 128-wide output of the first downsampling
        [(512, 256)] * 3,
        [(512, 256)] * 3,
    ]
    for side, levels in (("down", down), ("up", up)):
        for i, blocks in enumerate(levels):
            for j, (n_in, n_out) in enumerate(blocks):
                res(f"{side}.{i}.block.{j}", n_in, n_out)
                if i == 1:  # 16 x 16
                    attention(f"{side}.{i}.attn.{j}")
    for i, width in enumerate((128, 256, 256)):
        layer(f"down.{i}.downsample.conv", width, width, 3, 3)
    for i in (1, 2, 3):
        layer(f"up.{i}.upsample.conv", 256, 256, 3, 3)
    res("mid.block_1", 256, 256)
    attention("mid.attn_1")
    res("mid.block_2", 256, 256)
    layer("norm_out", 128)
    layer("conv_out", 3, 128, 3, 3)
    return shapes


def test_state_dict_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        network = UNet(CIFAR10)
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == published_cifar10_layout()


CONFIG_CASES = {
    "unet_cifar10": (CIFAR10, 35_746_307),
    "unet_celeba": (CELEBA, 78_700_803),
    "unet_lsun": (LSUN, 113_673_219),
    "unet_digits": (DIGITS, None),  # not published
    "categorical_unet_digits": (CategoricalUNetSpec(**dataclasses.asdict(DIGITS), categories=17), None),
}


def test_every_network_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(CONFIG_CASES)


@pytest.mark.parametrize("name", CONFIG_CASES)
def test_config_has_the_published_and_the_stated_count(name: str) -> None:
    expected, published = CONFIG_CASES[name]
    text = (CONFIGS / f"{name}.yaml").read_text()
    values = group_values("network", name)
    assert (values["image_size"], values["channels"]) == ("${data.size}", "${data.channels}")
    network_name = values.pop("name")
    spec_type, _ = NETWORKS[network_name]
    assert set(values) == {f.name for f in dataclasses.fields(spec_type)}
    spec = build(
        spec_type, values | {"image_size": list(expected.image_size), "channels": expected.channels}, "network"
    )
    assert spec == expected
    with torch.device("meta"):
        network = build_network(network_name, spec)
    stated = re.match(r"# ([\d,]+) parameters at (\d+)x(\d+)x(\d+)\.", text)
    assert stated is not None
    count = int(stated[1].replace(",", ""))
    assert sum(p.numel() for p in network.parameters()) == count == (published or count)
    assert (expected.channels, *expected.image_size) == tuple(int(side) for side in stated.groups()[1:])


# ---------------------------------------------------------------------------------- the complete network, transcribed


def transcribed_unet(w: dict[str, Tensor], spec: UNetSpec, x: Tensor, t: Tensor) -> Tensor:
    """DDPM's network as plain formulas over the state dict `w`, without dropout."""

    def swish(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    def conv(h: Tensor, name: str, **options: int) -> Tensor:
        return F.conv2d(h, w[f"{name}.weight"], w[f"{name}.bias"], **options)

    def linear(h: Tensor, name: str) -> Tensor:
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h: Tensor, name: str) -> Tensor:
        groups = h.reshape(h.shape[0], spec.num_groups, -1)
        groups = groups - groups.mean(2, keepdim=True)
        groups = groups / (groups.square().mean(2, keepdim=True) + 1e-6).sqrt()
        return groups.reshape(h.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def res(h: Tensor, name: str) -> Tensor:
        inner = conv(swish(norm(h, f"{name}.norm1")), f"{name}.conv1", padding=1)
        inner = inner + linear(swish(temb), f"{name}.temb_proj")[:, :, None, None]
        inner = conv(swish(norm(inner, f"{name}.norm2")), f"{name}.conv2", padding=1)
        return inner + (conv(h, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in w else h)

    def attention(h: Tensor, name: str) -> Tensor:
        q, k, v = (conv(norm(h, f"{name}.norm"), f"{name}.{letter}").flatten(2) for letter in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(h.shape[1])).softmax(2)
        return h + conv(torch.einsum("bij,bcj->bci", weights, v).reshape(h.shape), f"{name}.proj_out")

    frequencies = torch.tensor([10000 ** (-k / (spec.ch / 2 - 1)) for k in range(spec.ch // 2)])
    temb = torch.cat([torch.sin(t[:, None] * frequencies), torch.cos(t[:, None] * frequencies)], 1)
    temb = linear(swish(linear(temb, "temb.dense.0")), "temb.dense.1")

    levels = len(spec.ch_mult)
    skips = [conv(x, "conv_in", padding=1)]
    for i in range(levels):
        for j in range(spec.num_res_blocks):
            h = res(skips[-1], f"down.{i}.block.{j}")
            skips.append(attention(h, f"down.{i}.attn.{j}") if min(h.shape[2:]) in spec.attn_resolutions else h)
        if i < levels - 1:
            skips.append(conv(F.pad(skips[-1], (0, 1, 0, 1)), f"down.{i}.downsample.conv", stride=2))
    h = res(attention(res(skips[-1], "mid.block_1"), "mid.attn_1"), "mid.block_2")
    for i in reversed(range(levels)):
        for j in range(spec.num_res_blocks + 1):
            h = res(torch.cat([h, skips.pop()], 1), f"up.{i}.block.{j}")
            h = attention(h, f"up.{i}.attn.{j}") if min(h.shape[2:]) in spec.attn_resolutions else h
        if i > 0:
            h = conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3), f"up.{i}.upsample.conv", padding=1)
    return conv(swish(norm(h, "norm_out")), "conv_out", padding=1)


@pytest.mark.parametrize(
    "spec",
    [
        UNetSpec((8, 12), 2, 8, (1, 2, 2), attn_resolutions=(4,), num_groups=4),
        UNetSpec((8, 8), 1, 8, (2, 1), 1, attn_resolutions=(8, 4), num_groups=2),
        UNetSpec((5, 3), 3, 8, (1,), attn_resolutions=(), num_groups=4),
    ],
)
@torch.no_grad()
def test_agrees_with_a_transcription_over_its_state_dict(spec: UNetSpec) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = UNet(dataclasses.replace(spec, init="torch")).eval()
        for parameter in network.parameters():  # move the biases and norms away from 0 and 1
            parameter += 0.05 * torch.randn_like(parameter)
        x, t = torch.randn(3, spec.channels, *spec.image_size), torch.tensor([0, 7, 999])
    expected = transcribed_unet(network.state_dict(), spec, x, t)
    assert expected.std() > 0.1
    torch.testing.assert_close(network(x, t), expected, atol=1e-5, rtol=1e-5)


def test_every_normalisation_has_the_published_epsilon() -> None:
    network = UNet(UNetSpec((8, 8), 1, 8, (1, 1), 1, (4,), num_groups=4))
    assert {module.eps for module in network.modules() if isinstance(module, nn.GroupNorm)} == {1e-6}


@pytest.mark.parametrize("size", [(8, 16), (16, 8)])
def test_a_level_is_named_by_its_shorter_side(size: tuple[int, int]) -> None:
    assert UNetSpec(size, 1, 8, (1, 1), attn_resolutions=(4,), num_groups=4).resolutions == (8, 4)
