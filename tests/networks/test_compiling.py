"""What torch compiled is found again by the next process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ddim.networks import CACHE, compile_network

PROGRAM = """
import torch
from torch._dynamo.utils import counters
from ddim.networks import compile_network

torch.manual_seed(0)
network = torch.nn.Linear(4, 8)
x = torch.ones(3, 4)
plain = network(x)
compile_network(network)
with torch.no_grad():
    assert torch.allclose(plain, network(x).sin().asin(), atol=1e-6)
assert network.state_dict().keys() == {"weight", "bias"}
print(counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch compiles for the CPU with a C++ compiler"
)
def test_the_next_process_compiles_nothing_again(tmp_path):
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
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "compiled", True))
        compile_network(network)
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
    monkeypatch.setattr(os, "access", lambda path, mode: seen.append(Path(path)) and False)
    assert place(None) is None
    assert seen == [tmp_path]  # the first folder above that is there
