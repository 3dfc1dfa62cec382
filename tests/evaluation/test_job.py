import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddim import SamplerSpec
from ddim.data.datasets import DataSpec
from ddim.data.images import MemoryImages
from ddim.diffusion.labels import asked_steps, row_label, spacing_name
from ddim.distributed import Processes
from ddim.evaluation.fidelity import EvaluateSpec, evaluate, generate_shards
from ddim.evaluation.job import JobSpec, check_data, run_name, sampler_settings
from ddim.evaluation.likelihood import LikelihoodSpec
from ddim.evaluation.reconstruction import ReconstructSpec
from ddim.evaluation.session import Session
from ddim.evaluation.sweep import job_id
from ddim.evaluation.trajectory_error import TrajectoryErrorSpec
from ddim.inference import auto, compute
from ddim.inference.auto import SETTINGS, Choice, Hardware, Work, choose_settings
from ddim.inference.compute import ComputeSpec
from ddim.results.records import record_key

CHOSEN = {"rule": "ddim", "eta": 0.0, "clip": "x0", "last_time": 0, "tau": [1, 2]}  # what records always stated


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({}, {}),
        ({"S": None, "spacing": "2"}, {}),  # the times decide, not their name
        ({"S": None, "nfe": 2}, {}),
        ({"clip_range": 2.0}, {"clip_range": 2.0}),
        ({"threshold_ratio": 0.9}, {"threshold_ratio": 0.9}),
        ({"threshold_ratio": 0.9, "threshold_max": 1.5}, {"threshold_ratio": 0.9, "threshold_max": 1.5}),
        ({"corrector_steps": 1}, {"corrector_steps": 1, "corrector_snr": 0.16}),
        ({"rule": "deis", "eta": None, "order": 2}, {"rule": "deis", "eta": None, "order": 2}),
    ],
)
def test_later_fields_enter_the_key_where_they_are_set(fields: dict[str, Any], added: dict[str, Any]) -> None:
    settings = sampler_settings(SamplerSpec(**{"S": 2, "clip": "x0"} | fields), (1, 2))
    assert settings == CHOSEN | added
    assert record_key(settings) == record_key(CHOSEN | added)


@pytest.mark.parametrize(
    ("fields", "label", "spacing", "steps"),
    [
        ({}, "η=0.0 (clip x0)", "linear", 50),
        ({"clip_range": 2.0}, "η=0.0 (clip x0 to ±2.0)", "linear", 50),
        ({"threshold_ratio": 0.9}, "η=0.0 (clip x0, threshold 0.9)", "linear", 50),
        ({"threshold_ratio": 0.9, "threshold_max": 2.0}, "η=0.0 (clip x0, threshold 0.9 up to 2.0)", "linear", 50),
        ({"corrector_steps": 2, "corrector_snr": 0.1}, "PC (η=0.0, M=2, r=0.1) (clip x0)", "linear", 50),
        ({"corrector_steps": 1, "nfe": 7, "S": None}, "PC (η=0.0, M=1, r=0.16) (clip x0)", "linear", 4),
        ({"spacing": "leading", "S": 5}, "η=0.0 (clip x0)", "leading", 5),
        ({"spacing": "leading", "S": 5, "steps_offset": 1}, "η=0.0 (clip x0)", "leading+1", 5),
        ({"spacing": "10,20", "S": None}, "η=0.0 (clip x0)", "10,20", 30),
        ({"nfe": 7, "S": None}, "η=0.0 (clip x0)", "linear", 7),
        ({"nfe": 7, "S": None, "rule": "heun", "eta": None}, "Heun (clip x0)", "linear", 4),
    ],
)
def test_what_differs_has_another_name(fields: dict[str, Any], label: str, spacing: str, steps: int) -> None:
    sampler = SamplerSpec(**{"clip": "x0"} | fields)
    names = (row_label(sampler), spacing_name(sampler, sampler.tau(1000), 1000), asked_steps(sampler))
    assert names == (label, spacing, steps)
    assert len(sampler.tau(1000)) == steps


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("outputs/train/lr0.1/checkpoints/last.ckpt", "lr0.1"),
        ("/a/b/checkpoints/step_00000010.ckpt", "b"),
        ("outputs/imported/ema_cifar10.safetensors", "ema_cifar10"),
    ],
)
def test_a_checkpoint_is_named_by_its_run(checkpoint: str, name: str) -> None:
    assert run_name(checkpoint) == name


@pytest.mark.integration
@pytest.mark.parametrize(("recipe", "stored"), [({"optim.lr": 0.1}, {"optim.lr": 0.1}), ({"a": torch.ones(1)}, {})])
def test_run_and_recipe_are_recorded_outside_the_key(
    spec: EvaluateSpec, tmp_path: Path, recipe: dict[str, Any], stored: dict[str, Any]
) -> None:
    content = torch.load(spec.checkpoint, weights_only=True)
    content["ddim"]["recipe"] = recipe
    path = tmp_path / "mine" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(content, path)
    spec = dataclasses.replace(spec, n=4)
    without, _ = evaluate(spec)
    record, new = evaluate(dataclasses.replace(spec, checkpoint=str(path), output_dir=str(tmp_path / "other")))
    assert new
    assert (record["run"], record["recipe"]) == ("mine", stored)
    assert (without["run"], without["recipe"]) == ("tiny", {})
    assert record["key"] == without["key"]


AUTO = ComputeSpec("cpu", 0, **dict.fromkeys(SETTINGS))


def on(hardware: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything be chosen for a device that is not here."""
    monkeypatch.setattr(auto, "this_hardware", lambda device: hardware)


@pytest.mark.integration
def test_what_was_chosen_is_recorded_outside_the_key(spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    on(Hardware("cpu", "some CPU"), monkeypatch)
    spec = dataclasses.replace(spec, n=4, grid=0)
    record, new = evaluate(dataclasses.replace(spec, compute=AUTO))
    assert new
    settings, reason = "float32", "some CPU: no C++ loops: they need a compiler"
    assert record["compute"] | {"device": ""} == {
        "device": "",
        "processes": 1,
        "batch_size": 4,
        "settings": settings,
        "reason": reason,
    }
    assert record["config"]["compute"]["compile"] is None
    again, new = evaluate(dataclasses.replace(spec, compute=ComputeSpec("cpu", 3)))  # exact
    assert (new, again["key"]) == (False, record["key"])


def test_bfloat16_is_in_the_key_where_it_was_chosen(spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(spec, compute=AUTO)
    exact = dataclasses.replace(spec, compute=ComputeSpec("cpu")).prepare(Session())
    on(Hardware("cpu", "some CPU"), monkeypatch)
    assert spec.prepare(Session()).key == exact.key
    settings = dict.fromkeys(SETTINGS, False) | {"bf16": True}
    monkeypatch.setattr(compute, "choose_for", lambda *_, **__: Choice(settings, 7, ""))
    bf16 = spec.prepare(Session())
    assert bf16.key != exact.key
    assert bf16.key == dataclasses.replace(spec, compute=ComputeSpec("cpu", bf16=True)).prepare(Session()).key


@pytest.mark.parametrize("kind", [EvaluateSpec, ReconstructSpec, LikelihoodSpec, TrajectoryErrorSpec])
def test_tf32_is_in_the_key_where_it_is_used(spec: EvaluateSpec, kind: type[JobSpec]) -> None:
    """A table mixes it with nothing else, and the manifest tells such jobs apart; bfloat16 leaves it without effect."""
    fields = {f.name for f in dataclasses.fields(kind)}
    values = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec) if f.name in fields}
    job = kind(**values | {"sampler": SamplerSpec()})
    precisions: list[dict[str, Any]] = [{}, {"tf32": True}, {"bf16": True}, {"bf16": True, "tf32": True}]
    specs = [dataclasses.replace(job, compute=ComputeSpec("cpu", **given)) for given in precisions]
    exact, tf32, bf16, both = (one.prepare(Session()) for one in specs)
    assert tf32.settings == exact.settings | {"tf32": True}
    assert both.settings == bf16.settings == exact.settings | {"bf16": True}
    assert len({*map(job_id, specs)}) == 3


def test_all_jobs_of_a_command_are_computed_alike(spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def choose(model: object, network: object, device: object, evaluations: int, *_: object, **__: object) -> Choice:
        asked.append(evaluations)
        return choose_settings(Hardware("cpu", ""), Work(1, evaluations, 1))

    monkeypatch.setattr(compute, "choose_for", choose)
    session = Session()
    session.planned = 12_345
    for S in (2, 3):
        dataclasses.replace(spec, compute=AUTO, sampler=SamplerSpec(S=S)).prepare(session)
    dataclasses.replace(spec, compute=AUTO, n=6).prepare(Session())
    assert asked == [12_345, 6 * spec.network_evaluations // spec.n]


def test_a_sweep_warns_once_of_times_that_are_not_the_papers(
    spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ddim.evaluation.fidelity.times_warning", lambda *asked: f"these are {asked}")
    for processes, warnings in ((Processes(), 1), (Processes(rank=1, world_size=2), 0)):
        caplog.clear()
        session = Session(processes)
        for name in ("a", "b"):
            dataclasses.replace(spec, name=name).prepare(session)
        assert caplog.messages == ["these are ('digits', 'digits_classifier', 'linear')"] * warnings
    sigma_hat = SamplerSpec("sigma_hat", eta=None, S=4)  # nobody knows its times in the paper
    dataclasses.replace(spec, sampler=sigma_hat).prepare(Session())
    assert not caplog.messages


@pytest.mark.parametrize(("trained_on", "expected"), [("digits", "digits"), ("", "cifar10")])
def test_times_are_compared_for_the_data_of_the_model(
    spec: EvaluateSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trained_on: str,
    expected: str,
) -> None:
    """Beside published statistics the data set is not read, and stays the default, cifar10; imports may state none."""
    session = Session()
    model, compute = session.model(spec.checkpoint, spec.weights, spec.compute, 1, spec.n)
    model = dataclasses.replace(model, spec=dataclasses.replace(model.spec, data=trained_on))
    monkeypatch.setattr(session, "model", lambda *_: (model, compute))
    monkeypatch.setattr("ddim.evaluation.fidelity.times_warning", lambda *asked: f"these are {asked}")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    metric = dataclasses.replace(spec.metric, reference_npz=str(tmp_path / "statistics.npz"))
    data = DataSpec("cifar10", (32, 32), 3, root=str(tmp_path))
    dataclasses.replace(spec, data=data, metric=metric).prepare(session)
    assert caplog.messages == [f"these are ('{expected}', 'digits_classifier', 'linear')"]


@pytest.mark.parametrize(
    ("trained_on", "category", "data", "warned"),
    [
        ("digits", None, DataSpec("digits", (8, 8), 1, flip=False), ""),
        (
            "cifar10",
            None,
            DataSpec("digits", (8, 8), 1, flip=False),
            "trained on cifar10, and is compared with images of x",
        ),
        ("lsun_bedroom", None, DataSpec("lsun", (8, 8), 3, flip=False, category="bedroom"), ""),  # imported
        ("", None, DataSpec("digits", (8, 8), 1, flip=False), ""),
        ("folder", None, DataSpec("digits", (8, 8), 1, flip=False), ""),
        ("cifar10", None, DataSpec("folder", (8, 8), 1, flip=False, root="."), ""),
        (
            "lsun",
            "bedroom",
            DataSpec("lsun", (8, 8), 3, flip=False, category="church_outdoor"),
            "trained on lsun (bedroom)",
        ),
        ("lsun", "bedroom", DataSpec("lsun", (8, 8), 3, flip=False, category="bedroom"), ""),
        ("lsun", None, DataSpec("lsun", (8, 8), 3, flip=False, category="bedroom"), ""),
    ],
)
def test_another_data_set_is_warned_of(
    spec: EvaluateSpec,
    caplog: pytest.LogCaptureFixture,
    trained_on: str,
    category: str | None,
    data: DataSpec,
    warned: str,
) -> None:
    model, _ = Session().model(spec.checkpoint, "ema", ComputeSpec("cpu"))
    model = dataclasses.replace(
        model, spec=dataclasses.replace(model.spec, data=trained_on), recipe={"data.category": category}
    )
    images = MemoryImages("x", torch.zeros(3, *model.spec.image_shape, dtype=torch.uint8))
    check_data(Session(), model, data, images)
    assert (warned in caplog.text) if warned else not caplog.messages


def test_parts_of_other_code_are_warned_of_and_recorded(
    spec: EvaluateSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = dataclasses.replace(spec, n=6, compute=ComputeSpec("cpu", batch_size=2))
    monkeypatch.setattr("ddim.evaluation.shards.code_revision", lambda: "older")
    job = spec.prepare(Session())
    generate_shards(spec, job, Processes())
    job.shards.path(range(2, 4)).unlink()
    monkeypatch.undo()
    caplog.clear()
    record, _ = evaluate(spec)
    assert "a part of it was computed by the code of older and stays as it is" in caplog.text
    assert record["other_revisions"] == ["older"]
    caplog.clear()
    record, _ = evaluate(dataclasses.replace(spec, seed=1))
    assert "other_revisions" not in record
    assert not caplog.messages


def test_a_model_is_prepared_again_when_more_work_is_planned(spec: EvaluateSpec) -> None:
    """Its settings are chosen by the work; that of a reconstruction is known when the images are."""
    session = Session()
    assert not session.plan(10)  # there is no model yet
    model = spec.prepare(session).model
    assert spec.prepare(session).model is model
    assert session.plan(10**6)
    assert spec.prepare(session).model is not model
    assert not session.plan(10**6)
