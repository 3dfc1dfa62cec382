"""trainer.graphs: no gradient is read after the next replay of a CUDA graph has overwritten it, without a GPU."""

import math

import pytest
import torch
from torch.autograd import Function, grad

from ddim.training import run as run_module
from ddim.training.spec import TrainerSpec


def replayed(network):
    """The forward of a network as a graph has it: a buffer for outputs of a shape and one for each gradient.

    Each call spoils the gradients of the last one, since graphs share their memory.
    """
    parameters, forward, buffers = list(network.parameters()), network.forward, {}

    def into_buffer(key, value):
        return buffers.setdefault(key, torch.empty_like(value)).copy_(value).detach()

    def spoil():
        for key, buffer in buffers.items():
            if key[0] == "gradient":
                buffer.fill_(math.nan)

    class Replay(Function):
        @staticmethod
        def forward(ctx, x, t, *_):
            with torch.enable_grad():
                ctx.output = forward(x.detach(), t)
            return into_buffer(("output", x.shape), ctx.output.detach())

        @staticmethod
        def backward(ctx, given):
            gradients = grad(ctx.output, parameters, given)
            return None, None, *(into_buffer(("gradient", i), value) for i, value in enumerate(gradients))

    def replay(x, t):
        spoil()
        return Replay.apply(x, t, *parameters) if torch.is_grad_enabled() else forward(x, t)

    return replay


@pytest.fixture
def graphs(monkeypatch):
    """Let trainer.graphs=true run on the CPU, with such replays."""
    monkeypatch.setattr(run_module, "_device", lambda trainer: torch.device("cuda"))
    monkeypatch.setattr(torch, "compile", lambda forward, **options: replayed(forward.__self__))
    return {"graphs": True}


@pytest.mark.integration
@pytest.mark.parametrize("grad_clip", [1.0, None])
def test_no_overwritten_gradient_is_read(run, same, graphs, grad_clip):
    changes = {"optim": {"grad_clip": grad_clip}, "eval": {"every": 2, "n": 0}, "grid": {"every": 3, "n": 4}}
    plain = run("plain", **changes)
    assert same(run("graphs", trainer=graphs, **changes), plain)
    run("stopped", trainer=graphs | {"max_steps": 3}, **changes)
    assert same(run("stopped", trainer=graphs, checkpoint="last", **changes), plain)


@pytest.mark.integration
def test_accumulated_gradients_would_be_overwritten(run, same, graphs, monkeypatch):
    """Why they are refused; and shows that the replays here spoil what is kept."""
    monkeypatch.setattr(TrainerSpec, "__post_init__", lambda self: None)
    plain = run("plain", trainer={"accumulate": 2})
    assert not same(run("graphs", trainer=graphs | {"accumulate": 2}), plain)
