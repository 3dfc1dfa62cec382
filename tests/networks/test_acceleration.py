"""What torch compiled is found again by the next process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddim.errors import UserError
from ddim.networks.acceleration import CACHE, tune_network
from ddim.networks.cpu import native

PROGRAM = """
import torch
from torch._dynamo.utils import counters
from ddim.networks import tune_network

torch.manual_seed(0)
network = torch.nn.Linear(4, 8)
x = torch.ones(3, 4)
plain = network(x)
tune_network(network, torch.device("cpu"), compile=True)
with torch.no_grad():
    assert torch.allclose(plain, network(x).sin().asin(), atol=1e-6)
assert network.state_dict().keys() == {"weight", "bias"}
print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_the_next_process_compiles_nothing_again(tmp_path, compiler):
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


@pytest.fixture
def place(monkeypatch, tmp_path):
    """place(value): where a network is compiled to, when the variable had a value before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/temporary")

    def place(value):
        monkeypatch.delenv(CACHE, raising=False)
        if value is not None:
            monkeypatch.setenv(CACHE, value)
        network = torch.nn.Linear(2, 2)
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: setattr(self, "compiled", True))
        tune_network(network, torch.device("cpu"), compile=True)
        assert network.compiled
        return os.environ.get(CACHE)

    return place


@pytest.mark.parametrize("value", [None, "/temporary/torchinductor_somebody"])
def test_the_cache_lies_where_it_stays_also_after_torch_has_named_its_own(place, value, tmp_path):
    assert place(value) == str(tmp_path / "home" / "inductor")


def test_a_place_that_somebody_named_is_used(place):
    assert place("/named") == "/named"


def test_where_home_cannot_be_written_torch_decides(place, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("ddim.networks.acceleration.find_compiler", lambda: None)  # which looks for files too
    monkeypatch.setattr(os, "access", lambda path, mode: seen.append(Path(path)) and False)
    assert place(None) is None
    assert seen == [tmp_path]  # the first folder above that is there


@pytest.mark.parametrize("way", ["compile", "winograd"])
def test_a_missing_compiler_is_told_before_any_work(monkeypatch, tmp_path, way):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where nothing is kept
    native.load.cache_clear()
    with pytest.raises(UserError, match=r"need a C\+\+ compiler"):
        tune_network(torch.nn.Linear(2, 2), torch.device("cpu"), **{way: True})
    tune_network(torch.nn.Linear(2, 2), torch.device("cpu"))


def test_winograd_is_for_cpus_and_graphs_are_for_cuda(monkeypatch):
    with pytest.raises(UserError, match="winograd=true is for CPUs, and the device is cuda"):
        tune_network(torch.nn.Linear(2, 2), torch.device("cuda"), winograd=True)
    with pytest.raises(UserError, match="graphs=true is for CUDA devices, and the device is cpu"):
        tune_network(torch.nn.Linear(2, 2), torch.device("cpu"), graphs=True)
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: asked.append(options))
    for way in ("compile", "graphs"):
        tune_network(torch.nn.Linear(2, 2), torch.device("cuda"), **{way: True})
    assert [options["mode"] for options in asked] == [None, "reduce-overhead"]


FAULTS = """
import resource
import sys
import torch
from ddim.networks.acceleration import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
for number in range(21):
    torch.ones(16 << 20)  # 64 MB, which the C library maps anew for each tensor
    if number == 0:
        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)
"""


def test_memory_that_is_kept_is_not_mapped_again():
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
        if done.returncode == 3:
            pytest.skip("the C library has no mallopt")
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["keep"] < 0.5 * faults["leave"]
