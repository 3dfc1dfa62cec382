"""The files that `write_samples` writes show the images that `generate` makes."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddim.checkpoints.model import LoadedModel
from ddim.diffusion.noise import initial_noise
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.image_io import grid
from ddim.inference import sample_files
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import generate
from ddim.inference.sample_files import SampleSpec, write_samples


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> SampleSpec:
    compute = ComputeSpec("cpu", batch_size=4)
    return SampleSpec(str(checkpoint), str(tmp_path / "out"), compute, SamplerSpec(S=5, eta=1.0), n=6, seed=2)


def read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L")).astype(np.int16))


def wanted(model: LoadedModel, spec: SampleSpec) -> Tensor:
    indices = range(spec.first, spec.first + spec.n)
    return generate(model, spec.sampler, indices, spec.seed, ComputeSpec("cpu"))


def apart(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def test_a_grid_is_one_file_with_all_images(spec: SampleSpec, model: LoadedModel) -> None:
    [path] = write_samples(spec)
    assert path == Path(spec.output_dir) / "grid.png"
    assert apart(read(path), grid(wanted(model, spec))[0]) <= 1
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_single_files_are_named_by_the_number_of_their_image(spec: SampleSpec, model: LoadedModel) -> None:
    spec = dataclasses.replace(spec, format="png", first=98)
    assert write_samples(spec) == [Path(spec.output_dir)]
    images = wanted(model, spec)
    files = sorted(Path(spec.output_dir).iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(98, 104)]
    for file, image in zip(files, images, strict=True):
        assert apart(read(file), image[0]) <= 1


def test_a_later_call_goes_on_with_the_images_of_a_longer_one(spec: SampleSpec) -> None:
    spec = dataclasses.replace(spec, format="png")
    write_samples(spec)
    expected = {file.name: read(file) for file in Path(spec.output_dir).iterdir()}
    other = Path(spec.output_dir) / "other"
    for first, n in ((0, 1), (1, 3), (4, 2)):
        write_samples(dataclasses.replace(spec, output_dir=str(other), first=first, n=n))
    files = {file.name: read(file) for file in other.iterdir()}
    assert files.keys() == expected.keys()
    assert all(apart(files[name], expected[name]) <= 1 for name in expected)


@pytest.mark.parametrize("format", ["grid", "png", "gif"])
def test_nothing_is_overwritten_unless_that_is_wanted(
    spec: SampleSpec, format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(spec, format=format)
    write_samples(spec)
    files = sorted(Path(spec.output_dir).iterdir())
    before = [file.read_bytes() for file in files]
    other = dataclasses.replace(spec, seed=3, first=5)  # of the single files, 000005.png is there already
    with monkeypatch.context() as patch:
        for name in ("generate", "generate_batches", "_frames"):
            patch.setattr(sample_files, name, lambda *_, **__: pytest.fail("images were generated"))
        with pytest.raises(UserError, match=r"exists already.*; choose another output_dir=..., or overwrite=true"):
            write_samples(other)
    assert [file.read_bytes() for file in files] == before
    assert sorted(Path(spec.output_dir).iterdir()) == files
    write_samples(dataclasses.replace(spec, seed=3, overwrite=True))
    assert [file.read_bytes() for file in files] != before


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_animation_goes_from_noise_to_the_samples(spec: SampleSpec, model: LoadedModel, eta: float) -> None:
    # Early times, where the prediction of an untrained network is not all black and white.
    sampler = SamplerSpec(eta=eta, S=None, spacing="explicit", times=(2, 4, 6, 8, 10))
    spec = dataclasses.replace(spec, format="gif", first=3, sampler=sampler)
    [path] = write_samples(spec)
    assert path.name == "trajectory.gif"
    with Image.open(path) as movie:
        assert movie.n_frames == 6  # x_T and the prediction of each of five steps
        frames = []
        for i in range(6):
            movie.seek(i)
            frames.append(torch.from_numpy(np.array(movie.convert("L")).astype(np.int16)))
    x_T = initial_noise(range(3, 9), (1, 8, 8), spec.seed)
    start = ((x_T + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8)
    assert apart(frames[0], grid(start)[0]) <= 1
    assert apart(frames[-1], grid(wanted(model, spec))[0]) <= 1
    # The first prediction comes from x_T only: in one step it is the sample.
    one_step = generate(model, dataclasses.replace(sampler, times=(10,)), range(3, 9), spec.seed, ComputeSpec("cpu"))
    assert apart(frames[1], grid(one_step)[0]) <= 1


def test_the_weights_asked_for_are_taken(spec: SampleSpec) -> None:
    [averaged] = write_samples(spec)
    [online] = write_samples(dataclasses.replace(spec, output_dir=spec.output_dir + "2", weights="online"))
    assert apart(read(averaged), read(online)) > 1


@pytest.mark.parametrize("format", ["grid", "png", "gif"])
def test_samples_that_are_not_finite_are_not_written(
    spec: SampleSpec, format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sample_files.load_model

    def diverged(*arguments: Any) -> LoadedModel:
        model = load(*arguments)
        for parameter in model.network.parameters():
            parameter.fill_(torch.nan)
        return model

    monkeypatch.setattr(sample_files, "load_model", diverged)
    with pytest.raises(UserError, match="not finite"):
        write_samples(dataclasses.replace(spec, format=format))
    assert not Path(spec.output_dir).exists()


def test_more_steps_than_times_are_refused(spec: SampleSpec) -> None:
    with pytest.raises(UserError, match=r"S=51 .*T=50"):
        write_samples(dataclasses.replace(spec, sampler=SamplerSpec(S=51)))
    assert not Path(spec.output_dir).exists()


@pytest.mark.parametrize("format", ["grid", "png", "gif"])
def test_more_images_than_there_is_room_for_are_refused(
    spec: SampleSpec, format: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any is generated, and without a list of them."""
    monkeypatch.setattr(sample_files, "SMALLEST_FILE", 1 << 40)
    for name in ("generate", "generate_batches", "_frames", "with_batch_size"):
        monkeypatch.setattr(sample_files, name, lambda *_, **__: pytest.fail("work was started"))
    with pytest.raises(UserError, match=r"n=4000000000 .*ask for fewer"):
        write_samples(dataclasses.replace(spec, format=format, n=4_000_000_000))
    assert not Path(spec.output_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"first": -1}, "first=-1 is out of range"),
        ({"first": (1 << 32) - 5}, "out of range: image numbers"),
        ({"seed": -1}, "seed=-1 must lie in 0"),
        ({"seed": 1 << 64}, "must lie in 0"),
    ],
)
def test_values_out_of_range_are_refused(spec: SampleSpec, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, **changes)
    dataclasses.replace(spec, first=(1 << 32) - 6, seed=(1 << 64) - 1)
