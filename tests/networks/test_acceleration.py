"""Options of `accelerate`: where compiled code is kept, devices, a missing compiler, freed memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import weights
from tensors import gaussian32

from ddim.errors import UserError
from ddim.networks import UNetSpec, accelerate, build_network, float32_products
from ddim.networks.acceleration import CACHE
from ddim.networks.cpu import native

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPEC = UNetSpec((16, 16), ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), num_groups=8)
# Ways to run a network on a GPU, and their largest error, relative to the output.
MODES = {
    "float32": 1e-4,
    "tf32": 5e-3,
    "channels_last+compile": 1e-4,
    "graphs": 1e-4,
    "bf16": 5e-2,
    "bf16+channels_last+compile": 5e-2,
}
PROGRAM = """
import torch
from torch._dynamo.utils import counters
from ddim.networks import accelerate


class Network(torch.nn.Module):  # torch 2.11 does not compile its own modules called alone
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, 4) / 10)

    def forward(self, x):
        return x @ self.weight.T


network = Network()
x = torch.ones(3, 4)
plain = network(x)
accelerate(network, torch.device("cpu"), compile=True)
with torch.no_grad():
    assert torch.allclose(plain, network(x).sin().asin(), atol=1e-6)
assert network.state_dict().keys() == {"weight"}
print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.integration
def test_a_second_process_reuses_compiled_code(tmp_path, compiler):
    kept = {k: v for k, v in os.environ.items() if k not in (CACHE, "TORCH_HOME", "XDG_CACHE_HOME")}
    cache = tmp_path / ".cache" / "torch" / "inductor"

    def hits(temporary):
        (tmp_path / temporary).mkdir()
        environment = kept | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path / temporary), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert hits("first job") == 0
    files = sorted(cache.rglob("*"))
    assert files
    assert hits("second job") > 0  # in another temporary folder
    assert sorted(cache.rglob("*")) == files


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_the_output_on_the_gpu_is_that_of_the_cpu(gpu, mode, record_property):
    if gpu == "cpu" and mode == "graphs":
        pytest.skip("graphs are for CUDA devices")
    words = set(mode.split("+"))
    network = build_network("unet", SPEC).eval().requires_grad_(False)
    network.load_state_dict(weights(SPEC))
    x, t = gaussian32(16, 3, 16, 16), torch.arange(0, 1000, 63)
    reference = network(x, t)
    accelerate(network.to(gpu), torch.device(gpu), **dict.fromkeys(words - {"float32", "tf32", "bf16"}, True))
    bf16 = torch.autocast(gpu, torch.bfloat16, enabled="bf16" in words)
    with torch.inference_mode(), float32_products("tf32" in words), bf16:
        network(x.flip(0).to(gpu), t.to(gpu))
        output = network(x.to(gpu), t.to(gpu)).float().cpu()  # of a graph: replayed
    error = float((output - reference).norm() / reference.norm())
    record_property("relative error", error)
    assert error <= MODES[mode]


@pytest.fixture
def compile_calls(monkeypatch):
    """The options of each torch.compile, which is not run."""
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append(options))
    return calls


@pytest.fixture
def cache_folder(monkeypatch, tmp_path, compile_calls):
    """cache_folder(value): the variable CACHE after compiling, if it was `value` before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/temporary")

    def folder(value):
        monkeypatch.delenv(CACHE, raising=False)
        if value is not None:
            monkeypatch.setenv(CACHE, value)
        accelerate(torch.nn.Linear(2, 2), CPU, compile=True)
        assert len(compile_calls) == 1
        return os.environ.get(CACHE)

    return folder


@pytest.mark.parametrize("value", [None, "/temporary/torchinductor_somebody"])
def test_compiled_code_is_kept_outside_the_temporary_folder(cache_folder, value, tmp_path):
    assert cache_folder(value) == str(tmp_path / "home" / "inductor")


def test_a_cache_folder_set_by_the_user_is_used(cache_folder):
    assert cache_folder("/named") == "/named"


def test_an_unwritable_home_leaves_the_choice_to_torch(cache_folder, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("shutil.which", lambda name: name)  # uses os.access too
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append(Path(path)) and False)
    assert cache_folder(None) is None
    assert asked == [tmp_path]  # the first existing folder above


@pytest.mark.parametrize("option", ["compile", "winograd"])
def test_a_missing_compiler_is_an_error_before_any_work(monkeypatch, tmp_path, option):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # an empty cache
    native.load.cache_clear()
    with pytest.raises(UserError, match=r"need a C\+\+ compiler"):
        accelerate(torch.nn.Linear(2, 2), CPU, **{option: True})
    accelerate(torch.nn.Linear(2, 2), CPU)


def test_winograd_needs_a_cpu_and_graphs_need_cuda(compile_calls):
    with pytest.raises(UserError, match="winograd=true is for CPUs, and the device is cuda"):
        accelerate(torch.nn.Linear(2, 2), CUDA, winograd=True)
    with pytest.raises(UserError, match="graphs=true is for CUDA devices, and the device is cpu"):
        accelerate(torch.nn.Linear(2, 2), CPU, graphs=True)


def test_a_graph_does_not_overwrite_its_last_output(monkeypatch, compile_calls):
    """It replays into one buffer; samplers with a memory use the outputs of earlier calls."""
    network, buffer = torch.nn.Linear(2, 2), torch.zeros(1, 2)

    def compile(forward, **options):
        assert options == {"mode": "reduce-overhead", "dynamic": False}
        return lambda x: buffer.copy_(forward(x))

    monkeypatch.setattr(torch, "compile", compile)
    with torch.no_grad():
        expected = [network(torch.full((1, 2), value)) for value in (1.0, 2.0)]
        accelerate(network, CUDA, graphs=True)
        outputs = [network(torch.full((1, 2), value)) for value in (1.0, 2.0)]
    assert all(map(torch.equal, outputs, expected))
    accelerate(torch.nn.Linear(2, 2), CUDA, compile=True)
    assert compile_calls == [{"dynamic": False}]


FAULTS = """
import resource
import sys
import torch
from ddim.networks.acceleration import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
for number in range(21):
    torch.ones(16 << 20)  # 64 MB, which the C library maps again for each tensor
    if number == 0:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


@pytest.mark.integration
def test_kept_memory_is_not_mapped_again():
    faults = {}
    for mode in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("the C library has no mallopt")
        assert done.returncode == 0, done.stderr
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 0.5 * faults["default"]


def test_only_acceleration_depends_on_the_cpp_loops():
    room = Path(native.__file__).parent
    sources = set(room.parents[1].rglob("*.py")) - set(room.glob("*.py"))
    assert [path.name for path in sources if "networks.cpu" in path.read_text()] == ["acceleration.py"]


def tf32_settings() -> list[object]:
    """The older settings, then the newer ones of products and convolutions; "refused" where torch refuses to read one.

    Older versions of torch have the older ones alone, and the newer ones follow from them.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    reads = [torch.get_float32_matmul_precision, lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32]
    if NEWER:
        reads += [lambda: matmul.fp32_precision, lambda: cudnn.conv.fp32_precision, lambda: cudnn.rnn.fp32_precision]
    values: list[object] = []
    for read in reads:
        try:
            values.append(read())
        except RuntimeError:
            values.append("refused")
    return values


NEWER = hasattr(torch.backends.cudnn, "conv")
SETTERS = {
    "nothing": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "everything": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.mark.parametrize("name", SETTERS if NEWER else ("nothing", "high", "medium"))
def test_tf32_is_as_asked_for_whatever_was_set_before(name: str) -> None:
    expected = {
        False: ["highest", False, False] + ["ieee"] * 3 * NEWER,
        True: ["high", True, True] + ["tf32"] * 3 * NEWER,
    }
    with float32_products(tf32=False):  # which undoes what is set here
        SETTERS[name]()
        before = tf32_settings()
        for tf32 in (False, True):
            with float32_products(tf32):
                assert tf32_settings() == expected[tf32]
                with float32_products(not tf32):
                    assert tf32_settings() == expected[not tf32]
                assert tf32_settings() == expected[tf32]
        after = tf32_settings()
        assert all(old in (new, "refused") for old, new in zip(before, after, strict=True))
        if NEWER:
            torch.backends.fp32_precision = "none"
