"""Metrics of folders and files of samples equal torch-fidelity's, and make the records that evaluations make."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from two_processes import run_in_processes

from ddim.data.datasets import DataSpec
from ddim.distributed import Processes
from ddim.errors import UserError
from ddim.evaluation.extractor_networks import register_extractors
from ddim.evaluation.image_sets import MetricsSpec, evaluate, write_statistics
from ddim.evaluation.metrics import MetricSpec
from ddim.evaluation.session import Session
from ddim.results.records import RECORDS
from ddim.results.report import build_tables
from ddim.results.schema import evaluation_records
from ddim.results.wandb import LoggerSpec

FD = "fd_digits_classifier_60"


def images(n: int, seed: int, channels: int = 3) -> torch.Tensor:
    """Digits with noise, uint8 (n, channels, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.from_numpy(load_digits().images[:n] * 15).float()[:, None].expand(-1, channels, -1, -1)
    return (digits + 30 * torch.rand(digits.shape, generator=generator)).clamp(0, 255).byte()


def folder(path: Path, pixels: torch.Tensor) -> Path:
    path.mkdir(exist_ok=True)
    for i, image in enumerate(pixels):
        save(image, path / f"{i:03d}.png")
    return path


def save(image: torch.Tensor, path: Path) -> None:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)  # unlike save_png without waiting for the disk


@pytest.fixture
def spec(tmp_path: Path) -> MetricsSpec:
    return MetricsSpec(
        images=str(folder(tmp_path / "made", images(60, 1))),
        reference=str(folder(tmp_path / "real", images(70, 2))),
        data=DataSpec("digits", (8, 8), 1, flip=False),
        metric=MetricSpec("digits_classifier"),
        device="cpu",
        name="sets",
        output_dir=str(tmp_path / "out"),
        reference_dir=str(tmp_path / "reference"),
    )


def test_numbers_of_two_folders_equal_torch_fidelity(spec: MetricsSpec) -> None:
    import torch_fidelity

    register_extractors()
    options = {"kid_subset_size": 50, "kid_subsets": 5}
    metric = MetricSpec("digits_classifier", ("fd", "kd", "is", "prc"), **options)
    record, _ = evaluate(dataclasses.replace(spec, metric=metric))
    theirs = torch_fidelity.calculate_metrics(
        input1=spec.images,
        input2=spec.reference,
        feature_extractor="digits-classifier",
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        **options,
        **{"cuda": False, "save_cpu_ram": True, "cache": False, "verbose": False},
    )
    assert record["metrics"] == {
        FD: pytest.approx(theirs["frechet_inception_distance"], rel=1e-6),
        "kd_digits_classifier_60": pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5),  # its float32
        "is_digits_classifier_60": pytest.approx(theirs["inception_score_mean"], rel=1e-6),
        "precision_digits_classifier_60": theirs["precision"],
        "recall_digits_classifier_60": theirs["recall"],
    }


def test_a_folder_against_itself_is_exactly_0(spec: MetricsSpec) -> None:
    record, _ = evaluate(dataclasses.replace(spec, reference=spec.images))
    assert record["metrics"] == {FD: 0}
    assert record["intervals"] == {FD: (0, 0)}


def test_samples_in_a_file_are_those_of_the_folder(spec: MetricsSpec, tmp_path: Path) -> None:
    """As guided-diffusion writes them: arr_0, uint8, channels last, and labels."""
    pixels = images(60, 1).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", pixels, np.zeros(60, dtype=np.int64))
    from_folder, _ = evaluate(spec)
    record, new = evaluate(dataclasses.replace(spec, images=str(tmp_path / "samples.npz")))
    assert new
    assert record["metrics"] == from_folder["metrics"]
    assert record["images"]["fingerprint"] == from_folder["images"]["fingerprint"]
    reference, _ = evaluate(dataclasses.replace(spec, reference=str(tmp_path / "samples.npz")))
    assert reference["metrics"] == {FD: 0}


def test_written_statistics_take_the_place_of_the_folder(spec: MetricsSpec, tmp_path: Path) -> None:
    out = tmp_path / "statistics.npz"
    writing = dataclasses.replace(spec, images=None, out=str(out))
    assert write_statistics(writing) == out
    with np.load(out) as arrays:
        assert (arrays["mu"].shape, arrays["sigma"].shape, int(arrays["images"])) == ((64,), (64, 64), 70)
    record, _ = evaluate(dataclasses.replace(spec, reference=str(out)))
    assert record["metrics"] == evaluate(spec)[0]["metrics"]
    assert record["reference"] == {
        "name": "statistics.npz",
        "images": None,
        "fingerprint": record["reference"]["fingerprint"],
    }
    with pytest.raises(UserError, match=r"statistics.npz exists already; .*overwrite=true"):
        write_statistics(writing)
    precision = MetricSpec("digits_classifier", ("fd", "prc"))
    with pytest.raises(UserError, match="holds mean and covariance only, and prc needs the features"):
        evaluate(dataclasses.replace(spec, reference=str(out), metric=precision))
    precision = dataclasses.replace(precision, bf16=True)  # which is refused beside such a file too
    with pytest.raises(UserError, match="holds mean and covariance only, and prc needs the features"):
        evaluate(dataclasses.replace(spec, reference=str(out), metric=precision))


def test_statistics_beside_samples_are_those_of_the_distance(spec: MetricsSpec, tmp_path: Path) -> None:
    """As in the reference batches of guided-diffusion: mu and sigma of a data set, and some of its images."""
    write_statistics(dataclasses.replace(spec, images=None, out=str(tmp_path / "all.npz")))
    with np.load(tmp_path / "all.npz") as arrays:
        moments = {name: arrays[name] for name in ("mu", "sigma")}
    some = images(20, 5).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "both.npz", some, **moments)
    np.savez(tmp_path / "some.npz", some)

    def measure(reference: str | None, *metrics: str) -> dict[str, float]:
        metric = MetricSpec("digits_classifier", metrics)
        return evaluate(dataclasses.replace(spec, reference=reference, metric=metric))[0]["metrics"]

    both = str(tmp_path / "both.npz")
    assert measure(both, "fd") == measure(spec.reference, "fd")
    assert measure(both, "fd", "is") == measure(spec.reference, "fd", "is")
    assert measure(both, "prc") == measure(str(tmp_path / "some.npz"), "prc")
    pixels = dataclasses.replace(spec, metric=MetricSpec("pixels"))  # of which the statistics are not
    assert evaluate(dataclasses.replace(pixels, reference=both))[0]["reference"]["images"] == 20
    with pytest.raises(
        UserError, match=r"holds mean and covariance, which fd takes, and samples.* which prc takes; give"
    ):
        measure(both, "fd", "prc")
    for reference in (both, str(tmp_path / "all.npz")):
        bf16 = MetricSpec("digits_classifier", ("fd",), bf16=True)
        with pytest.raises(UserError, match=r"are of float32 features; set metric\.bf16=false\."):
            evaluate(dataclasses.replace(spec, reference=reference, metric=bf16))


def test_the_record_states_what_was_compared(spec: MetricsSpec) -> None:
    record, new = evaluate(spec)
    assert new
    assert evaluate(spec) == (json.loads(json.dumps(record)), False)
    assert record["images"] == {"name": "made-train", "images": 60, "fingerprint": record["images"]["fingerprint"]}
    assert record["reference"] == {
        "name": "real-train",
        "images": 70,
        "fingerprint": record["reference"]["fingerprint"],
    }
    assert record["metric"]["extractor"] == "digits_classifier"
    low, high = record["intervals"][FD]
    assert low < record["metrics"][FD] < high
    assert not (Path(spec.output_dir) / "unfinished" / record["key"]).exists()
    [table] = build_tables(evaluation_records(Path(spec.output_dir) / RECORDS).read())
    label = f"{spec.images} ({record['images']['fingerprint'][:8]})"
    assert (table.rows, table.columns, table.column) == ([label], [60], "images")
    assert table.title() == f"{FD}: 60 images against 70 of real-train"
    assert "τ" not in dict(table.describe_protocol(full=True))


def test_changed_images_are_measured_again(spec: MetricsSpec) -> None:
    first, _ = evaluate(spec)
    folder(Path(spec.images or ""), images(60, 3))
    second, new = evaluate(spec)
    assert new
    assert first["label"] != second["label"]
    assert first["metrics"] != second["metrics"]


def in_process(processes: Processes, spec: MetricsSpec) -> dict[str, Any]:
    return evaluate(spec, Session(processes))[0]


@pytest.mark.integration
def test_two_processes_measure_as_one(spec: MetricsSpec, tmp_path: Path) -> None:
    other = dataclasses.replace(spec, output_dir=str(tmp_path / "two"), reference_dir=str(tmp_path / "reference_two"))
    two = run_in_processes(in_process, other, to=tmp_path / "results")
    one, _ = evaluate(spec)
    assert two[0] == two[1]
    assert two[0]["key"] == one["key"]
    assert two[0]["metrics"] == pytest.approx(one["metrics"], rel=1e-9)
    assert two[0]["intervals"][FD] == pytest.approx(one["intervals"][FD], rel=1e-9)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": "nowhere"}, "the folder nowhere does not exist; give a folder of images"),
        ({"images": "nowhere.npz"}, "there is no file nowhere.npz"),
        ({"reference": "nowhere.npz"}, "statistics nowhere.npz cannot be used"),
        ({"images": "empty"}, "empty holds no images"),
        ({"images": "divided"}, "images=divided holds test and train; give one of them, such as images=divided/test"),
        ({"images": "larger"}, r"\(3, 9, 9\), real-train has \(3, 8, 8\); make them alike.*size=\[H,W\] resize=true"),
        ({"images": "mixed"}, r"small.png is 8 x 9 .* but size=\[9, 9\]; set resize=true"),
        ({"images": "few"}, "at least 2 images"),
        ({"images": "floats.npz"}, "arr_0 of floats.npz is float64 of shape"),
        ({"images": "moments.npz"}, "moments.npz holds mu; samples are the array arr_0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    spec: MetricsSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for split in ("train", "test"):
        (Path("divided") / split).mkdir(parents=True)
        folder(Path("divided") / split, images(5, 1))
    larger = torch.zeros(3, 3, 9, 9, dtype=torch.uint8)
    folder(Path("larger"), larger)
    save(larger[0, :, :8], folder(Path("mixed"), larger) / "small.png")
    folder(Path("few"), images(1, 1))
    np.savez("floats.npz", np.zeros((3, 8, 8, 3)))
    np.savez("moments.npz", mu=np.zeros(64))
    with pytest.raises(UserError, match=sentence):
        evaluate(dataclasses.replace(spec, **change))
    assert not Path(spec.output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"images": None}, "one of them"), ({"out": "x.npz"}, "one of them")],
)
def test_images_or_a_file_to_write_are_needed(spec: MetricsSpec, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(spec, **changes)


@pytest.mark.parametrize("logger", [LoggerSpec(tensorboard=True), LoggerSpec(wandb=True, log_model="all")])
def test_loggers_of_a_training_are_refused(spec: MetricsSpec, logger: LoggerSpec) -> None:
    with pytest.raises(ValueError, match="is for training"):
        dataclasses.replace(spec, logger=logger)


@pytest.mark.parametrize(("suffixes", "kind"), [((".jpg", ".JPEG"), "JPEG"), ((".webp", ".jpg"), "JPEG or WebP")])
def test_lossy_samples_are_warned_of_once(
    spec: MetricsSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, suffixes: tuple[str, ...], kind: str
) -> None:
    session = Session()
    evaluate(spec, session)
    assert not caplog.records
    made = folder(tmp_path / "mixed", images(60, 3))
    for i, suffix in enumerate(suffixes):
        save(images(60, 3)[i], (made / f"{i:03d}").with_suffix(suffix))
        (made / f"{i:03d}.png").unlink()
    for _ in range(2):
        evaluate(dataclasses.replace(spec, images=str(made)), session)
    [record] = caplog.records
    assert record.getMessage().startswith(f"2 of the 60 images in {made} are {kind} files")
