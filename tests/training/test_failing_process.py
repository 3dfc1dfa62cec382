"""Of several processes one fails: it says why and ends, and none trains alone by mistake."""

import logging
from types import SimpleNamespace

import pytest

from ddim.config import build
from ddim.errors import Interrupted, PeerFailed, UserError
from ddim.training import lightning_workarounds
from ddim.training.lightning_workarounds import end_alone
from ddim.training.run import build_trainer
from ddim.training.spec import TrainSpec

pytestmark = pytest.mark.integration


def torchrun(monkeypatch, count):
    for name, value in {"RANK": 0, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("count", [1, 8])
def test_processes_that_would_each_train_alone_are_refused(config, tmp_path, monkeypatch, count):
    spec = build(TrainSpec, config(), "")
    torchrun(monkeypatch, count)
    if count == 1:
        assert build_trainer(spec, tmp_path, [], []).world_size == 1
    else:
        with pytest.raises(
            UserError, match=r"8 processes were started for this training, which is one of 1, .*trainer=ddp"
        ):
            build_trainer(spec, tmp_path, [], [])


@pytest.mark.parametrize(("rank", "count"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize(
    "error",
    [
        UserError("image 7 is damaged."),
        RuntimeError("out of memory"),
        PeerFailed("process 0"),
        Interrupted("x"),
    ],
)
def test_a_process_that_fails_says_why_and_leaves_the_others(monkeypatch, caplog, rank, count, error):
    killed, unregistered = [], []
    monkeypatch.setattr(lightning_workarounds.atexit, "unregister", unregistered.append)
    launcher = SimpleNamespace(kill=killed.append, procs=["child"])
    trainer = SimpleNamespace(world_size=count, global_rank=rank, strategy=SimpleNamespace(launcher=launcher))
    with caplog.at_level(logging.WARNING), pytest.raises(type(error)) as raised, end_alone(trainer):
        raise error
    assert raised.value is error
    alone = count > 1 and not isinstance(error, Interrupted)
    assert len(killed) == len(unregistered) == alone
    assert bool(launcher.procs) is not alone
    says_why = alone and rank > 0 and not isinstance(error, PeerFailed)
    assert caplog.messages == [f"process {rank} of {count} failed: {error}"] * says_why
