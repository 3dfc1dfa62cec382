"""Training on a GPU: that of the CPU up to rounding, faster ways nearly so, and resumed where it stopped."""

import pytest
import torch

from ddim.checkpoints.model import read_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.gpu]
# Where the gradient is mere rounding, a small eps makes a full step of it.
OPTIONS = {"optim": {"eps": 1e-3}, "network": {"ch": 32, "attn_resolutions": [8]}}


@pytest.fixture
def train(run):
    """train(name, device, trainer options ..., other changes): a run of 20 steps, as a checkpoint."""

    def train(name, device, changes=OPTIONS, **trainer):
        return run(name, **changes, trainer={"max_steps": 20, "batch_size": 32, "accelerator": device} | trainer)

    return train


@pytest.fixture
def apart(train):
    """apart(one, other): how far two checkpoints of this training are apart, as a part of the way of the other."""

    def weights(path):
        return torch.cat([value.double().flatten() for value in read_checkpoint(path)["state_dict"].values()])

    def apart(one, other):
        return float((weights(one) - weights(other)).norm() / (weights(other) - start).norm())

    start = weights(train("start", "cpu", max_steps=1))
    return apart


def test_training_on_the_gpu_is_that_of_the_cpu(train, apart, logged, gpu, record_property):
    error = apart(train("gpu", gpu), train("cpu", "cpu"))
    record_property("of the way trained", error)
    assert error <= 2e-2
    losses = [list(logged(name, "train/loss").values())[-1] for name in ("gpu", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("graphs", [False, True])
def test_fast_settings_train_nearly_as_float32(train, apart, logged, gpu, graphs, record_property, tmp_path):
    if graphs and gpu == "cpu":
        pytest.skip("graphs are for CUDA devices")
    grid = {"grid": {"every": 10, "n": 4, "sampler": {"S": 5}}}
    compile = gpu != "cpu"  # where that takes minutes
    fast = {"precision": "bf16-mixed", "channels_last": True, "compile": compile, "graphs": graphs}
    error = apart(train("fast", gpu, OPTIONS | grid, **fast), train("cpu", "cpu"))
    record_property("of the way trained", error)
    assert error <= 0.5
    losses = [list(logged(name, "train/loss").values())[-1] for name in ("fast", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
    assert len(list((tmp_path / "fast" / "samples").glob("*.png"))) == 2


def test_graphs_train_as_what_they_replay(train, apart, gpu, record_property):
    """Dropout too: its masks follow the seed of each step, and are not those of the step that was captured."""
    if gpu == "cpu":
        pytest.skip("graphs are for CUDA devices")
    options = OPTIONS | {"network": OPTIONS["network"] | {"dropout": 0.3}}
    error = apart(train("graphs", gpu, options, graphs=True), train("compiled", gpu, options, compile=True))
    record_property("of the way trained", error)
    assert error <= 2e-2


def test_a_run_on_the_gpu_resumes_where_it_stopped(train, apart, same, gpu, record_property):
    options = OPTIONS | {"network": OPTIONS["network"] | {"dropout": 0.3}}
    uninterrupted, again = (train(name, gpu, options) for name in ("uninterrupted", "again"))
    train("stopped", gpu, options, max_steps=10)
    resumed = train("stopped", gpu, options | {"checkpoint": "last"})
    error, bitwise = apart(resumed, uninterrupted), same(again, uninterrupted)
    record_property(f"of the way trained{', where a second run is the same bitwise' * bitwise}", error)
    assert error <= 2e-2
    assert same(resumed, uninterrupted) or not bitwise
