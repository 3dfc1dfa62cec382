"""Encoding and decoding real images: the error of Table 2, against the library's own functions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import ddim
from ddim import GuidanceSpec
from ddim.checkpoints import LoadedModel, load_model
from ddim.data.datasets import DataSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS
from ddim.errors import UserError
from ddim.evaluation.reconstruction import ReconstructSpec, evaluate, reconstruct_shards
from ddim.evaluation.session import Session
from ddim.inference.compute import ComputeSpec
from ddim.results.records import RecordFile
from ddim.results.report import build_tables

pytestmark = pytest.mark.integration


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> ReconstructSpec:
    return ReconstructSpec(
        checkpoint=str(checkpoint),
        name="tiny",
        output_dir=str(tmp_path / "out"),
        data=DataSpec("digits", (8, 8), 1, flip=False),
        sampler=SamplerSpec(S=5),
        compute=ComputeSpec("cpu", batch_size=7),
        n=20,
        grid=3,
    )


def error_of(spec: ReconstructSpec) -> float:
    [error] = evaluate(spec)[0]["metrics"].values()
    return error


def test_error_equals_encode_then_sample(spec: ReconstructSpec, model: LoadedModel) -> None:
    x_0 = torch.from_numpy(load_digits().images[:20]).float()[:, None]
    x_0 = (x_0 * 255 / 16 + 0.5).floor() / 127.5 - 1
    tau = ddim.linear_tau(50, 5)
    with torch.no_grad():
        x_T = ddim.encode(model, model.spec.schedule, x_0, tau)
        x = ddim.sample(model, model.spec.schedule, x_T, tau)
    expected = float(((x + 1) / 2 - (x_0 + 1) / 2).double().square().mean())
    record, new = evaluate(spec)
    assert new
    assert record["metrics"] == {"reconstruction_mse_20": pytest.approx(expected, rel=1e-4)}
    assert record["network_evaluations"] == 20 * 2 * 5
    assert (record["kind"], record["label"], record["S"], record["n"]) == ("reconstruction", "η=0.0", 5, 20)
    assert (Path(spec.output_dir) / record["grid"]).is_file()
    assert RecordFile(Path(spec.output_dir) / "records.jsonl").read() == [json.loads(json.dumps(record))]
    assert evaluate(spec) == (json.loads(json.dumps(record)), False)


def test_images_are_encoded_with_labels_of_their_own(
    spec: ReconstructSpec, conditional_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataclasses.replace(spec.data, labels="classes")
    spec = dataclasses.replace(spec, checkpoint=str(conditional_checkpoint), data=data, label="own", grid=0)
    model, digits = load_model(conditional_checkpoint), load_digits()
    x_0 = torch.from_numpy(digits.images[:20]).float()[:, None]
    x_0 = (x_0 * 255 / 16 + 0.5).floor() / 127.5 - 1
    y = torch.from_numpy(digits.target[:20])
    with torch.no_grad():
        x_T = ddim.encode(lambda x, t: model(x, t, y), model.spec.schedule, x_0, ddim.linear_tau(50, 5))
        x = ddim.sample(lambda x, t: model(x, t, y), model.spec.schedule, x_T, ddim.linear_tau(50, 5))
    record, _ = evaluate(spec)
    expected = float(((x - x_0) / 2).double().square().mean())
    assert record["metrics"] == {"reconstruction_mse_20": pytest.approx(expected, rel=1e-4)}
    assert (record["label"], record["condition"]) == ("η=0.0, own labels, w=0", {"label": "own", "w": 0.0})
    guided, _ = evaluate(dataclasses.replace(spec, guidance=GuidanceSpec(1.0, (1, 30))))
    assert (guided["nfe_encoding"], guided["nfe_decoding"]) == (9, 8)
    assert guided["label"] == "η=0.0, own labels, w=1 in [1, 30] (up to twice the NFE)"
    assert [table.columns for table in build_tables([record, guided])] == [[5]]
    with monkeypatch.context() as relabelled:
        relabelled.setattr("ddim.inference.conditioning.labels_of", lambda images, _: tuple((images.labels + 1) % 10))
        assert evaluate(spec)[0]["metrics"] != record["metrics"]
    with pytest.raises(UserError, match="digits has no labels"):
        evaluate(dataclasses.replace(spec, data=dataclasses.replace(data, labels=None)))
    with pytest.raises(UserError, match="one label for all images, not label=all"):
        evaluate(dataclasses.replace(spec, label="all"))


def test_each_inversion_is_a_row_by_S_with_its_evaluations(spec: ReconstructSpec) -> None:
    records = {}
    for inversion, k in (("paper", None), ("diffusers", None), ("fixed_point", 4), ("bdia", None)):
        record, _ = evaluate(dataclasses.replace(spec, inversion=inversion, iterations=k))
        records[inversion] = record
        assert record["network_evaluations"] == 20 * (record["nfe_encoding"] + record["nfe_decoding"])
    assert len({record["key"] for record in records.values()}) == 4
    [table] = build_tables(list(records.values()))
    assert (table.column, table.columns) == ("S", [5])
    assert table.rows == [
        "η=0.0",
        "η=0.0, diffusers' inversion (NFE 2 S)",
        "η=0.0, fixed point, k=4 (NFE 5 S)",
        "BDIA (NFE 2 S - 1)",
    ]
    assert {m: (r["nfe_encoding"], r["nfe_decoding"]) for m, r in records.items()} == {
        "paper": (5, 5),
        "diffusers": (5, 5),
        "fixed_point": (20, 5),
        "bdia": (5, 4),
    }
    errors = {method: record["metrics"]["reconstruction_mse_20"] for method, record in records.items()}
    assert errors.pop("bdia") < 1e-9 < min(errors.values())


def test_records_of_the_papers_inversion_keep_their_keys(spec: ReconstructSpec) -> None:
    settings = spec.prepare(Session()).settings
    assert set(settings) == {"kind", "model", "sampler", "n", "bf16", "pixels", "reference", "metric"}


def test_more_steps_come_back_closer(spec: ReconstructSpec) -> None:
    one_batch = dataclasses.replace(spec, compute=ComputeSpec("cpu", 20))
    errors = [error_of(dataclasses.replace(one_batch, sampler=SamplerSpec(S=S))) for S in (5, 10, 25, 50)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3


def test_error_does_not_depend_on_the_batch_size(spec: ReconstructSpec, tmp_path: Path) -> None:
    other = dataclasses.replace(spec, compute=ComputeSpec("cpu", 64), output_dir=str(tmp_path / "other"))
    assert error_of(other) == pytest.approx(error_of(spec), rel=1e-5)


@pytest.mark.parametrize(("before", "after"), [(0, 11), (2, 11), (20, 3)])
def test_a_continued_job_shows_the_new_grid(spec: ReconstructSpec, before: int, after: int) -> None:
    grids = []
    for folder, first in (("undisturbed", after), ("begun", before)):
        mine = dataclasses.replace(spec, output_dir=f"{spec.output_dir}_{folder}")
        begun = dataclasses.replace(mine, grid=first)
        session = Session()
        job = begun.prepare(session)
        reconstruct_shards(begun, job, session.images(begun.data, begun.split), SINGLE_PROCESS)
        job.shards.path(range(14, 20)).unlink()  # interrupted before the last batch
        record, new = evaluate(dataclasses.replace(mine, grid=after))
        assert new
        grids.append((Path(mine.output_dir) / record["grid"]).read_bytes())
    assert grids[0] == grids[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"compute": ComputeSpec("cpu", 7, bf16=True)},
        {"sampler": SamplerSpec(S=5, clip="x0_and_eps")},
        {"n": 19},
        {"weights": "online"},
    ],
)
def test_what_changes_the_error_changes_the_key(spec: ReconstructSpec, changes: dict[str, object]) -> None:
    other = dataclasses.replace(spec, **changes)  # type: ignore[arg-type]
    assert other.prepare(Session()).key != spec.prepare(Session()).key
    assert error_of(other) != error_of(spec)


def test_other_images_change_the_key(spec: ReconstructSpec, tmp_path: Path) -> None:
    keys = set()
    for shade in (0, 1):
        root = tmp_path / str(shade) / "same"
        root.mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 100 * shade).save(root / f"{i}.png")
        data = DataSpec("folder", (8, 8), 1, root=str(root), flip=False)
        keys.add(dataclasses.replace(spec, data=data, n=2).prepare(Session()).key)
    assert len(keys) == 2


def test_a_network_that_predicts_x0_cannot_encode(spec: ReconstructSpec, tmp_path: Path) -> None:
    content = torch.load(spec.checkpoint, weights_only=True)
    content["ddim"]["prediction"] = "x0"
    torch.save(content, tmp_path / "x0.ckpt")
    with pytest.raises(UserError, match="gives no ε at t=0"):
        dataclasses.replace(spec, checkpoint=str(tmp_path / "x0.ckpt")).prepare(Session())


def test_all_images_are_the_default(spec: ReconstructSpec) -> None:
    job = dataclasses.replace(spec, n=None).prepare(Session())
    assert job.indices == range(1797)
    assert job.settings["n"] == 1797


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": SamplerSpec(eta=1.0)}, "deterministic"),
        ({"sampler": SamplerSpec("sigma_hat", None)}, "deterministic"),
        ({"sampler": SamplerSpec(last_time=1)}, "last_time=0"),
        ({"n": 0}, "n=0"),
        ({"inversion": "exact"}, "inversion='exact' is not known"),
        ({"iterations": 2}, "is for inversion=fixed_point"),
        ({"inversion": "bdia", "sampler": SamplerSpec(clip="x0")}, "do not clip x0"),
        ({"grid": -1}, "grid=-1"),
        ({"paper": "table9"}, "unknown table of the paper 'table9'"),
    ],
)
def test_values_out_of_range_are_refused(spec: ReconstructSpec, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"), [({"n": 1798}, "more than the 1797"), ({"sampler": SamplerSpec(S=51)}, "S=51")]
)
def test_bad_input_is_refused_before_encoding(spec: ReconstructSpec, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(spec, **changes).prepare(Session())  # type: ignore[arg-type]
    assert not Path(spec.output_dir).exists()
