"""Single images of `write_samples`: those that are missing are computed, and others are not mixed with them."""

import dataclasses
import json
import os
import signal
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddim.checkpoints.model import LoadedModel
from ddim.diffusion.schedule import cosine_schedule
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference import generate as generate_module
from ddim.inference import sample_files
from ddim.inference.compute import ComputeSpec
from ddim.inference.encoded_files import EncodedImages
from ddim.inference.sample_files import SampleSpec, write_samples


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> SampleSpec:
    compute = ComputeSpec("cpu", batch_size=4)
    return SampleSpec(
        str(checkpoint), str(tmp_path / "out"), compute, SamplerSpec(S=5, eta=1.0), n=6, seed=2, format="png"
    )


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The batches that are computed in a test."""
    batches: list[range] = []
    real = generate_module.generate_batch

    def generate_batch(model: LoadedModel, sampler: SamplerSpec, indices: range, *others: Any) -> Tensor:
        batches.append(indices)
        return real(model, sampler, indices, *others)

    monkeypatch.setattr(generate_module, "generate_batch", generate_batch)
    return batches


@pytest.mark.parametrize("n", [11, 43])
def test_memory_for_single_files_does_not_grow_with_n(
    spec: SampleSpec, computed: list[range], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Two batches at most: one that is computed while the caller still has the one before."""
    alive, peak, real = [0], [0], generate_module.generate_batch

    def generate_batch(*arguments: Any) -> Tensor:
        images = real(*arguments)
        alive[0] += len(images)
        peak[0] = max(peak[0], alive[0])
        weakref.finalize(images, lambda count: alive.__setitem__(0, alive[0] - count), len(images))
        return images

    monkeypatch.setattr(generate_module, "generate_batch", generate_batch)
    write_samples(dataclasses.replace(spec, n=n))
    assert [len(batch) for batch in computed] == [4] * (n // 4) + [3]
    assert peak[0] <= 8
    assert len(list(Path(spec.output_dir).iterdir())) == n


def test_the_same_command_computes_only_missing_images(spec: SampleSpec, computed: list[range]) -> None:
    spec = dataclasses.replace(spec, n=11, first=3)
    write_samples(spec)
    folder = Path(spec.output_dir)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    for number in (3, 7, 8, 9, 10, 13):  # a batch, the end of it, and single ones: as after kills
        (folder / f"{number:06d}.png").unlink()
    kept = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    computed.clear()
    write_samples(spec)
    assert computed == [range(3, 4), range(7, 11), range(13, 14)]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    computed.clear()
    write_samples(dataclasses.replace(spec, n=13))
    assert computed == [range(14, 15), range(15, 16)]  # a longer one adds to them
    computed.clear()
    write_samples(dataclasses.replace(spec, n=5, overwrite=True))
    assert computed == []  # the same images, as of a call that was stopped


def test_images_left_of_other_settings_are_warned_of(spec: SampleSpec, caplog: pytest.LogCaptureFixture) -> None:
    spec = dataclasses.replace(spec, n=4)
    write_samples(spec)
    write_samples(dataclasses.replace(spec, first=4, n=1))
    write_samples(dataclasses.replace(spec, n=2, overwrite=True))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # all of the same settings
    write_samples(dataclasses.replace(spec, seed=3, n=2, overwrite=True))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "also has 3 images that other settings made, 000002.png the first" in warning


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 3}, "seed=2, not 3"),
        ({"sampler": SamplerSpec(S=5, eta=0.5)}, "eta=1.0, not 0.5"),
        ({"sampler": SamplerSpec(S=6, eta=1.0)}, r"S=5, not 6, tau_hash=\w+, not \w+"),
        ({"sampler": SamplerSpec(S=5, eta=1.0, spacing="quadratic")}, r"tau_hash=\w+, not \w+"),
        (
            {"sampler": SamplerSpec(S=5, eta=1.0, clip="x0", clip_range=2.0)},
            "clip=none, not x0, clip_range=None, not 2.0",
        ),
        ({"weights": "online"}, r"weights_hash=\w+, not \w+"),
        ({"compute": ComputeSpec("cpu", bf16=True)}, "bf16=False, not True"),
    ],
)
def test_single_files_of_other_settings_are_refused(
    spec: SampleSpec, computed: list[range], changes: dict[str, Any], difference: str
) -> None:
    spec = dataclasses.replace(spec, n=2)
    write_samples(spec)
    computed.clear()
    with pytest.raises(UserError, match=rf"00000[01].png exists already \({difference}\); choose another output_dir"):
        write_samples(dataclasses.replace(spec, n=4, **changes))
    assert computed == []
    write_samples(dataclasses.replace(spec, compute=ComputeSpec("cpu", batch_size=1), n=1))  # decides nothing


def test_single_files_of_another_schedule_are_refused(spec: SampleSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same weights."""
    spec = dataclasses.replace(spec, n=1)
    write_samples(spec)
    load = sample_files.load_model

    def other(*arguments: Any) -> LoadedModel:
        model = load(*arguments)
        return dataclasses.replace(model, spec=dataclasses.replace(model.spec, schedule=cosine_schedule(50)))

    monkeypatch.setattr(sample_files, "load_model", other)
    with pytest.raises(UserError, match=r"exists already \(description_hash=\w+, not \w+\)"):
        write_samples(spec)


def test_single_files_state_where_they_are_in_tf32(spec: SampleSpec, model: LoadedModel) -> None:
    of_cuda = [dataclasses.replace(spec, compute=ComputeSpec("cuda", tf32=tf32)) for tf32 in (False, True)]
    plain, tf32 = (sample_files._made_from(model, made, None) for made in of_cuda)
    assert json.loads(tf32) == {"tf32": True, **json.loads(plain)}  # files of earlier code do not have it


def test_decoded_files_state_what_decided_their_encoding(spec: SampleSpec, model: LoadedModel) -> None:
    encoding: dict[str, Any] = {
        "fingerprint": "f",
        "inversion": {"method": "paper"},
        "tau": [1, 20],
        "sampler": {"clip": "none"},
        "condition": {"label": 3, "w": 0.0},
        "bf16": False,
        "tf32": False,
    }

    def stated(**changes: Any) -> str:
        return sample_files._made_from(model, spec, EncodedImages(torch.zeros(1), None, encoding | changes))

    assert len({stated(), *(stated(**{name: "other"}) for name in encoding)}) == 1 + len(encoding)
    assert stated(files=["a.png"], revision="other") == stated()
    del encoding["condition"]  # of an unconditional model
    assert sample_files._differences(stated(), stated(bf16=True)).startswith(" (x_T=")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nno chunks", b"text"])
def test_single_files_of_unknown_origin_are_refused(spec: SampleSpec, computed: list[range], content: bytes) -> None:
    (folder := Path(spec.output_dir)).mkdir()
    (folder / "000001.png").write_bytes(content)
    with pytest.raises(UserError, match=r"000001.png exists already; choose another output_dir=..., or overwrite=true"):
        write_samples(spec)
    assert computed == []
    (folder / "000001.png").rename(folder / "0000001.png")  # no name of an image
    write_samples(spec)
    assert len(list(folder.iterdir())) == 7


def test_a_signal_waits_until_a_batch_is_written(spec: SampleSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    save, received = sample_files.save_png, []

    def save_and_stop(image: Tensor, path: Path, text: Any) -> None:
        save(image, path, text)
        if path.name == "000005.png":
            signal.raise_signal(signal.SIGTERM)
            assert received == []

    def stop(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_files, "save_png", save_and_stop)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_samples(dataclasses.replace(spec, n=20))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sorted(file.name for file in Path(spec.output_dir).iterdir()) == [f"{i:06d}.png" for i in range(8)]


def test_old_temporary_files_are_removed(spec: SampleSpec) -> None:
    folder = Path(spec.output_dir)
    folder.mkdir()
    for name, age in (("old", 7200), ("new", 0)):
        (folder / f".0123456789abcdef_{name}.png").write_text("")
        os.utime(folder / f".0123456789abcdef_{name}.png", (time.time() - age,) * 2)
    write_samples(spec)
    assert sorted(file.name for file in folder.iterdir()) == [
        ".0123456789abcdef_new.png",
        *(f"{i:06d}.png" for i in range(6)),
    ]
