"""Of several processes one fails: each says why, none waits for another, and none trains alone by mistake."""

import logging
from types import SimpleNamespace

import pytest

from ddim.config import build
from ddim.errors import Interrupted, UserError
from ddim.training import lightning_workarounds
from ddim.training.lightning_workarounds import end_alone
from ddim.training.run import build_trainer
from ddim.training.spec import TrainSpec
from ddim.training.validation import STOPPED, Validation

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
@pytest.mark.parametrize("error", [UserError("image 7 is damaged."), RuntimeError("out of memory"), Interrupted("x")])
def test_a_process_that_fails_says_why_and_leaves_the_others(monkeypatch, caplog, rank, count, error):
    killed, unregistered = [], []
    monkeypatch.setattr(lightning_workarounds.atexit, "unregister", unregistered.append)
    launcher = SimpleNamespace(kill=killed.append)
    trainer = SimpleNamespace(world_size=count, global_rank=rank, strategy=SimpleNamespace(launcher=launcher))
    with caplog.at_level(logging.WARNING), pytest.raises(type(error)) as raised, end_alone(trainer):
        raise error
    assert raised.value is error
    alone = count > 1 and not isinstance(error, Interrupted)
    assert len(killed) == len(unregistered) == alone
    assert caplog.messages == [f"process {rank} of {count} failed: {error}"] * (alone and rank > 0)


@pytest.mark.parametrize(
    ("others", "stops"),
    [([(STOPPED, False)], False), ([(STOPPED, True)], True), ([{"loss": 1.0}], False), ([True], False)],
)
@pytest.mark.parametrize("error", [OSError("No space left on device"), UserError("x"), Interrupted("x")])
def test_a_validation_ends_on_all_processes_for_one_reason(others, stops, error):
    """Also where a process fails with another kind of error, or while the others exchange something else."""
    told = []

    def gather(value):
        told.append(value)
        return [value, *others]

    def fail(*_):
        raise error

    validation = object.__new__(Validation)
    validation.labels, validation._measure = ["ema"], fail
    validation.processes = SimpleNamespace(gather=gather)
    validation.checkpoints = SimpleNamespace(stop=SimpleNamespace(received=None))
    trainer = SimpleNamespace(should_stop=False)
    if stops:
        validation._validate(trainer, None)
    else:
        with pytest.raises(type(error)):
            validation._validate(trainer, None)
    assert (told, trainer.should_stop) == ([(STOPPED, False)], stops)
