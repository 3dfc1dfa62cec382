"""A record is located by its key and computed again: equal, or with the digit that differs and what has changed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddim.checkpoints import load_model, save_model, weights_hash
from ddim.checkpoints.model import UNLABELLED, read_model
from ddim.checkpoints.shipped import SHIPPED
from ddim.data.datasets import DataSpec
from ddim.errors import UserError
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.image_sets import MetricsSpec
from ddim.evaluation.image_sets import evaluate as evaluate_images
from ddim.evaluation.metrics import MetricSpec
from ddim.evaluation.reproduce import MOST_DIGITS, ReproduceSpec, _chosen, agreeing_digits, find_weights, reproduce
from ddim.image_io import save_png
from ddim.inference.auto import SETTINGS
from ddim.results.records import RECORDS

pytestmark = pytest.mark.integration
FD = "fd_digits_classifier_20"


@pytest.fixture
def recorded(spec: EvaluateSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A record in outputs/run, of a checkpoint that has since moved to outputs/elsewhere."""
    monkeypatch.chdir(tmp_path)
    Path("outputs/elsewhere").mkdir(parents=True)
    Path("outputs/elsewhere/damaged.ckpt").write_bytes(b"no checkpoint")
    moved = Path("outputs/elsewhere/moved.ckpt")
    moved.write_bytes(Path(spec.checkpoint).read_bytes())
    record, _ = evaluate(dataclasses.replace(spec, checkpoint=str(moved), output_dir="outputs/run"))
    record["config"]["checkpoint"] = "outputs/gone.ckpt"
    return record


def write(record: dict[str, Any], path: str = f"outputs/run/{RECORDS}") -> ReproduceSpec:
    Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return ReproduceSpec(key=record["key"], output_dir="outputs/reproduce")


def test_a_record_comes_out_again(recorded: dict[str, Any]) -> None:
    recorded["metrics"]["val_loss"] = 0.03  # as a training adds it, which no evaluation computes
    spec = write(recorded)
    done = reproduce(spec)
    assert done.agreement() == {FD: MOST_DIGITS}
    del recorded["metrics"]["val_loss"]
    assert done.now["metrics"] == recorded["metrics"]
    assert done.changes() == []
    assert str(done.checkpoint) == "outputs/elsewhere/moved.ckpt"
    assert [path.name for path in (Path("outputs/reproduce") / spec.key).iterdir()] == ["1"]
    reproduce(spec)  # is computed again, and nothing is overwritten
    assert {path.name for path in (Path("outputs/reproduce") / spec.key).iterdir()} == {"1", "2"}


def test_a_record_of_images_comes_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        save_png(torch.full((1, 8, 8), 40 * i, dtype=torch.uint8), Path("made") / f"{i}.png")
    spec = MetricsSpec(
        images="made",
        data=DataSpec("digits", (8, 8), 1, flip=False),
        metric=MetricSpec("digits_classifier"),
        device="cpu",
        name="sets",
        output_dir="outputs/sets",
    )
    record, _ = evaluate_images(spec)
    done = reproduce(ReproduceSpec(key=record["key"], output_dir="outputs/reproduce"))
    assert (done.checkpoint, done.changes()) == (None, [])
    assert done.agreement() == {"fd_digits_classifier_5": MOST_DIGITS}


def test_weights_of_a_shipped_model_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"weights_hash": load_model("digits").weights_hash, "weights": "ema", "step": 2000}
    record = {"model": model, "config": {"checkpoint": "digits"}}
    assert find_weights(ReproduceSpec(key="0" * 16, output_dir="outputs"), record) == SHIPPED["digits"]


def test_weights_of_no_known_label_are_found(tmp_path: Path) -> None:
    """As of an imported file of which it is not known whether it is an average."""
    model = dataclasses.replace(read_model(SHIPPED["digits"]), weights=UNLABELLED)
    model = dataclasses.replace(model, state={name: value + 1 for name, value in model.state.items()})
    save_model(model, path := tmp_path / "model.safetensors")
    of_record = {"weights_hash": weights_hash(model.state), "weights": UNLABELLED, "step": None}
    record = {"model": of_record, "config": {"checkpoint": "elsewhere"}}
    spec = ReproduceSpec(key="0" * 16, output_dir="outputs", folders=(str(tmp_path),))
    assert find_weights(spec, record) == path


def test_what_was_chosen_is_chosen_again(recorded: dict[str, Any]) -> None:
    recorded["config"]["compute"] |= dict.fromkeys(("bf16", "winograd", "compile")) | {"channels_last": False}
    recorded["compute"] |= {"settings": "float32+channels_last", "batch_size": 7}
    recorded["config"]["compute"]["batch_size"] = 0
    done = reproduce(write(recorded))
    assert done.now["config"]["compute"]["winograd"] is False
    assert done.now["compute"]["batch_size"] == 7
    assert (done.now["compute"]["settings"], done.now["key"]) == ("float32", recorded["key"])


def test_another_device_keeps_the_precision() -> None:
    config = {"device": "cuda", **dict.fromkeys(SETTINGS), "batch_size": 0}
    record = {"config": {"compute": config}, "compute": {"settings": "tf32+channels_last+compile", "batch_size": 7}}
    assert _chosen(record, config | {"device": "cpu"}) == {"bf16": False, "tf32": True}


def test_what_differs_is_named(recorded: dict[str, Any]) -> None:
    recorded["metrics"][FD] *= 1 + 3e-5
    recorded["versions"]["torch"] = "1.0"
    recorded["compute"]["device"] = "another"
    recorded["revision"] = "abc"
    done = reproduce(write(recorded))
    assert done.agreement() == {FD: 4}
    changes = [line.partition(":")[0] for line in done.changes()]
    assert changes == ["compute.device", "revision", "versions.torch"]
    assert "versions.torch: 1.0 -> " in "\n".join(done.changes())


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record.pop(key)


def other_weights(record: dict[str, Any]) -> None:
    record["model"]["weights_hash"] = "0" * 64


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("label"), "the record .* is damaged .*lacks label"),
        (without("config"), "has no configuration"),
        (
            other_weights,
            r"no file under outputs, docs/results and no model that ships has the ema weights 0{12} .*they were output",
        ),
        (lambda record: record.update(key="0" * 16), "has the record"),
    ],
)
def test_what_cannot_be_reproduced_is_refused(
    recorded: dict[str, Any], change: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    key = recorded["key"]
    change(recorded)
    with pytest.raises(UserError, match=sentence):
        reproduce(dataclasses.replace(write(recorded), key=key))
    assert not Path("outputs/reproduce").exists()


@pytest.mark.parametrize(
    ("b", "digits"), [(1.0, 17), (1.0 + 2**-52, 15), (1.0 - 3e-10, 9), (1.0 + 2e-5, 4), (0.0, 0), (-1.0, 0)]
)
def test_digits_that_agree_are_those_of_the_relative_difference(b: float, digits: int) -> None:
    assert (agreeing_digits(1.0, b), agreeing_digits(b, 1.0)) == (digits, digits)
    assert agreeing_digits(-1e-3, -1e-3 * b) == digits
    assert agreeing_digits(0.0, 0.0) == MOST_DIGITS


@pytest.mark.parametrize(("changes", "sentence"), [({"key": "abc"}, "16 hexadecimal"), ({"digits": 18}, "1 .. 17")])
def test_values_out_of_range_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ReproduceSpec(**{"key": "0" * 16, "output_dir": "x"} | changes)
