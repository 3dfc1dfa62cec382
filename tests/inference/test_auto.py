"""What compute=auto and trainer=auto choose, for devices that are here and for others."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddim import SamplerSpec, linear_schedule
from ddim.checkpoints import LoadedModel, ModelSpec, load_model
from ddim.inference import auto
from ddim.inference import compute as compute_module
from ddim.inference.auto import SETTINGS, Choice, Hardware, Seconds, Work, choose_for, choose_settings, words
from ddim.inference.compute import ComputeSpec, autocast, prepare_model, with_batch_size
from ddim.inference.generate import generate
from ddim.networks import NETWORKS, UNet, UNetSpec, build_network

H100 = Hardware("cuda", "H100", bf16=True, compiler=True)
V100 = Hardware("cuda", "V100", compiler=True)
AVX2 = Hardware("cpu", "AVX2", compiler=True, cpp_loops=True)
AVX512_BF16 = dataclasses.replace(AVX2, name="AVX512-bf16", bf16=True)
NO_COMPILER = Hardware("cpu", "laptop")
MPS = Hardware("mps", "mps")
CIFAR10 = 12_440_000_000  # operations of an evaluation of one image
SHORT, LONG = Work(CIFAR10, 1000, 1000), Work(CIFAR10, 50_000_000, 50_000)
AUTO = ComputeSpec("cpu", 0, **dict.fromkeys(SETTINGS))


def chosen(hardware: Hardware, work: Work, seconds: Seconds | None = None, **given: bool) -> tuple[str, int]:
    choice = choose_settings(hardware, work, given, seconds)
    return words(choice.settings), choice.batch_size


def test_a_gpu_compiles_for_long_work_only() -> None:
    bare = dataclasses.replace(H100, compiler=False)
    assert chosen(H100, LONG) == ("bf16+channels_last+compile", 0)
    assert chosen(H100, SHORT) == ("bf16+channels_last", 0)
    assert chosen(bare, LONG) == ("bf16+channels_last", 0)
    assert "too short to compile for" in choose_settings(H100, SHORT).reason
    assert "triton or a C compiler is missing" in choose_settings(bare, LONG).reason


@pytest.mark.parametrize("hardware", [H100, V100, AVX2, NO_COMPILER, MPS], ids=lambda hardware: hardware.name)
def test_the_precision_of_a_record_does_not_depend_on_the_work(hardware: Hardware) -> None:
    works = [Work(flops, n * S, n) for flops in (10**7, CIFAR10, 10**12) for n in (1, 64, 50_000) for S in (1, 1000)]
    assert len({choose_settings(hardware, work).settings["bf16"] for work in works}) == 1


def test_graphs_are_for_small_batches_that_are_sampled_for_long() -> None:
    small = Work(CIFAR10, 10_000_000, 16)
    assert chosen(H100, small) == ("bf16+channels_last+compile+graphs", 16)
    assert chosen(H100, dataclasses.replace(small, evaluations=16)) == ("bf16+channels_last", 16)
    assert chosen(H100, dataclasses.replace(small, training=True))[0] == "bf16+channels_last+compile"
    assert chosen(V100, small)[0] == "float32+channels_last+compile+graphs"
    assert chosen(H100, small, bf16=False)[0] == "tf32+channels_last+compile+graphs"
    assert chosen(H100, SHORT, graphs=True)[0] == "bf16+channels_last+compile+graphs"  # which compile
    assert "too short" not in choose_settings(H100, SHORT, {"graphs": True}).reason
    tiny = Work(16_000_000, 50_000_000, 50_000)  # a GPU waits for the host even with the most images
    assert chosen(H100, tiny) == ("bf16+channels_last", auto.GPU_MOST)  # 500 s of launches


def test_a_cpu_uses_cpp_loops_where_there_is_a_compiler() -> None:
    for work in (SHORT, LONG):
        assert chosen(AVX2, work) == ("float32+channels_last+winograd", 32)
        assert chosen(NO_COMPILER, work) == ("float32", 32)
    assert "they need a compiler" in choose_settings(NO_COMPILER, LONG).reason


@pytest.mark.parametrize(("flops", "images", "size"), [(16_000_000, 1000, 250), (CIFAR10, 8, 8), (10**12, 1000, 1)])
def test_batches_of_a_cpu_are_of_similar_work(flops: int, images: int, size: int) -> None:
    assert choose_settings(AVX2, Work(flops, 1, images)).batch_size == size


def test_a_timing_decides_on_bfloat16_on_cpus() -> None:
    fast, slow = Seconds(0.1, 0.05), Seconds(0.05, 0.1)
    assert chosen(AVX512_BF16, LONG, fast)[0] == "bf16+channels_last+compile"
    assert chosen(AVX512_BF16, LONG, slow)[0] == "float32+channels_last+winograd"
    assert chosen(AVX512_BF16, SHORT, fast)[0] == "float32+channels_last+winograd"  # compiling would take longer
    assert "a timing finds faster" in choose_settings(AVX512_BF16, LONG, {}, slow).reason


@pytest.mark.parametrize(
    ("hardware", "work", "given", "needed"),
    [
        (AVX512_BF16, LONG, {}, True),
        (AVX512_BF16, SHORT, {}, False),
        (AVX2, LONG, {}, False),
        (H100, LONG, {}, False),
        (dataclasses.replace(AVX512_BF16, compiler=False), LONG, {}, False),
        (AVX512_BF16, LONG, {"bf16": False}, False),
        (AVX512_BF16, LONG, {"winograd": True}, False),
        (AVX512_BF16, LONG, {"winograd": False}, True),
    ],
)
def test_only_long_work_on_cpus_with_bfloat16_is_timed(
    hardware: Hardware, work: Work, given: dict[str, bool], needed: bool
) -> None:
    assert auto.needs_timing(hardware, work, given) is needed


@pytest.mark.parametrize("hardware", [H100, V100, AVX2, AVX512_BF16, NO_COMPILER, MPS], ids=lambda h: h.name)
def test_what_is_given_is_kept_and_the_rest_fits_it(hardware: Hardware) -> None:
    for name, value, work in itertools.product(SETTINGS, (True, False), (SHORT, LONG)):
        choice = choose_settings(hardware, work, {name: value}, Seconds(0.1, 0.05))
        assert choice.settings[name] is value
        assert f"{name}={str(value).lower()} as given" in choice.reason
        ComputeSpec("cpu", choice.batch_size, **choice.settings)  # raises where settings exclude each other
        assert set(choice.settings) == set(SETTINGS)


def test_the_rough_count_lacks_the_products_of_attention() -> None:
    network = UNet(UNetSpec((16, 16), ch=32, num_groups=8)).eval()
    attention = 2 * 2 * (5 * 32 * 256**2 + 64 * 4**2)  # five blocks at 16 x 16, one in the middle at 2 x 2
    assert auto.flops(network, (3, 16, 16)) - auto.rough_flops(network, (3, 16, 16)) == attention
    assert not any(module._forward_hooks for module in network.modules())


@dataclasses.dataclass(frozen=True)
class PluginSpec:
    """Of a network as docs/plugins.md describes it."""

    image_size: tuple[int, int] = (4, 4)
    channels: int = 1
    classes: int | None = 3


class Plugin(nn.Module):
    """It takes labels, does not keep its spec, and in training needs several images."""

    def __init__(self, spec: PluginSpec) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.shape == y.shape == x.shape[:1]
        return self.layers(x).view_as(x)


def test_networks_with_labels_are_counted_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "this_hardware", lambda device: dataclasses.replace(AVX512_BF16, cpp_loops=False))
    monkeypatch.setitem(NETWORKS, "plugin", (PluginSpec, Plugin))
    unet = UNetSpec((4, 4), 1, ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=4, classes=3)
    for name, spec in (("plugin", PluginSpec()), ("unet", unet)):
        model = ModelSpec(name, spec, linear_schedule(10))
        network = build_network(name, spec).eval()
        assert auto.flops(network, (1, 4, 4), 3) >= auto.rough_flops(network, (1, 4, 4), 3) >= 2 * 16 * 16
        for training in (False, True):
            choose_for(model, network, torch.device("cpu"), 10**15, 8, {}, training)
    assert len(list((tmp_path / "ddim").iterdir())) == 4


def test_an_unknown_device_is_left_as_it_is() -> None:
    assert chosen(MPS, LONG) == ("float32", 0)


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_the_processor_tells_whether_it_has_bfloat16(flag: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx512_bf16x {flag or ''} sse\n"
    monkeypatch.setattr(auto, "has_cpp_loops", lambda: True)
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: text)
    hardware = auto.this_hardware(torch.device("cpu"))
    assert (hardware.name, hardware.bf16, hardware.cpp_loops) == ("Some CPU", flag is not None, True)


@pytest.mark.parametrize("training", [False, True])
def test_a_timing_is_kept_by_processor_network_and_batch(
    model: LoadedModel, training: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    hardware, work = dataclasses.replace(AVX512_BF16, cpp_loops=False), Work(1, 1, 2, training)
    state = torch.get_rng_state()
    times = auto.timing(hardware, model.spec, work)
    assert torch.equal(torch.get_rng_state(), state)
    assert min(times) > 0
    monkeypatch.setattr(auto, "_time_network", lambda *_, **options: 2.0 if "bf16" in options else 1.0)
    assert auto.timing(hardware, model.spec, work) == times
    (file,) = (tmp_path / "ddim").iterdir()
    wider = dataclasses.replace(model.spec, network_spec=dataclasses.replace(model.spec.network_spec, ch=64))
    for other in (
        (dataclasses.replace(hardware, name="another"), model.spec, work),
        (hardware, wider, work),
        (hardware, model.spec, dataclasses.replace(work, images=1)),
        (hardware, model.spec, dataclasses.replace(work, training=not training)),
    ):
        assert auto.timing(*other) == Seconds(1.0, 2.0)
    for damaged in ("", "[1]", '{"cpp_loops": 1}', '{"cpp_loops": "x", "bf16": 1}'):
        file.write_text(damaged)
        assert auto.timing(hardware, model.spec, work) == Seconds(1.0, 2.0)
        assert json.loads(file.read_text()) == {"cpp_loops": 1.0, "bf16": 2.0}


def test_the_choice_is_logged_in_one_line(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "this_hardware", lambda device: AVX512_BF16)
    monkeypatch.setattr(auto, "timing", lambda *_: Seconds(0.1, 0.05))
    with caplog.at_level(logging.INFO):
        alone = choose_for(model.spec, model.network, torch.device("cpu"), 10**15, 8, {})
        several = choose_for(model.spec, model.network, torch.device("cpu"), 10**15, 8, {}, alone=False)
    assert (alone.settings["bf16"], several.settings["bf16"]) == (True, False)
    assert [message.partition(":")[0] for message in caplog.messages] == ["chosen", "chosen"]
    assert "bf16+channels_last+compile on AVX512-bf16: bfloat16 saves about" in caplog.messages[0]


def test_prepare_model_does_what_was_chosen(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    settings = dict.fromkeys(SETTINGS, False) | {"channels_last": True, "bf16": True}

    def choose(*arguments: object, alone: bool) -> Choice:
        asked.append((*arguments[1:], alone))
        return Choice(settings, 5, "why")

    monkeypatch.setattr(compute_module, "choose_for", choose)
    loaded = load_model(checkpoint)
    compute = prepare_model(loaded, dataclasses.replace(AUTO, compile=False), 100, 10, alone=False)
    assert asked == [(loaded.network, torch.device("cpu"), 100, 10, {"compile": False}, False)]
    assert (compute.bf16, compute.compile, compute.batch_size, compute.reason) == (True, False, 5, "why")
    assert next(p for p in loaded.network.parameters() if p.dim() == 4).is_contiguous(memory_format=torch.channels_last)
    prepare_model(loaded, ComputeSpec("cpu"))  # nothing is left to choose
    assert len(asked) == 1


def test_compiling_waits_for_the_search_for_a_batch_size(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(compute_module, "accelerate", lambda *_, compile, **__: steps.append(f"compile={compile}"))
    monkeypatch.setattr(compute_module, "evaluate_zeros", lambda *_: steps.append("evaluate"))
    compute = prepare_model(model, ComputeSpec("cpu", 0, compile=True))
    assert with_batch_size(model, compute, most=1).batch_size == 1
    assert steps == ["compile=False", "evaluate", "evaluate", "compile=True"]


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_used_inside_the_block_only(tf32: bool) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    with autocast(ComputeSpec("cpu", tf32=tf32)):
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (tf32, tf32)
    assert (cudnn.allow_tf32, matmul.allow_tf32) == before


class Elsewhere(torch.nn.Module):
    """A network on a device of which nothing can be read: a stand-in for Apple's GPUs, which have no float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, device="meta"))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert {(x.device.type, x.dtype), (t.device.type, t.dtype)} == {("meta", torch.float32), ("meta", torch.int64)}
        return torch.full(x.shape, 0.25)


class Here(Elsewhere):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.full(x.shape, 0.25)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_without_float64_only_the_network_is_on_the_device(model: LoadedModel, eta: float) -> None:
    compute, sampler = ComputeSpec("mps"), SamplerSpec(S=3, eta=eta)
    assert (compute.state_device, ComputeSpec("cuda:1").state_device) == ("cpu", "cuda:1")
    there = dataclasses.replace(model, network=Elsewhere())
    here = dataclasses.replace(model, network=Here().to_empty(device="cpu"))
    images = [generate(one, sampler, range(3), 0, used) for one, used in ((there, compute), (here, ComputeSpec("cpu")))]
    assert torch.equal(*images)


def test_a_network_computes_nothing_in_float64(model: LoadedModel) -> None:
    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            assert not any(isinstance(one, Tensor) and one.dtype == torch.float64 for one in (*args, result)), function
            return result

    with NoFloat64(), torch.no_grad():
        model.network(torch.zeros(2, *model.spec.image_shape), torch.ones(2, dtype=torch.int64))
