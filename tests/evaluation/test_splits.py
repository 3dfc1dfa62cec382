"""Each evaluation reads the split that it names; the digits of other tests have the same images in both."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddim.data.datasets import DataSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.evaluation import reconstruction
from ddim.evaluation.fidelity import EvaluateSpec, evaluate
from ddim.evaluation.session import Session
from ddim.inference.compute import ComputeSpec

pytestmark = pytest.mark.integration


@pytest.fixture
def data(tmp_path: Path) -> DataSpec:
    """A folder of dark training images and bright test images."""
    for k, split in enumerate(("train", "test")):
        (tmp_path / "images" / split).mkdir(parents=True)
        for i in range(8):
            pixels = torch.full((8, 8), 20 * i + 90 * k, dtype=torch.uint8)
            pixels[i] = 255
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / split / f"{i}.png")
    return DataSpec("folder", (8, 8), 1, root=str(tmp_path / "images"), flip=False)


def alone(data: DataSpec, split: str) -> DataSpec:
    return dataclasses.replace(data, root=f"{data.root}/{split}")


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_reference_is_of_the_split(spec: EvaluateSpec, data: DataSpec, split: str, tmp_path: Path) -> None:
    session = Session()
    session.images(data, "train")  # as an evaluation on the other split before it
    metric = dataclasses.replace(spec.metric, reference_split=split)
    record, _ = evaluate(dataclasses.replace(spec, data=data, metric=metric), session)
    same, _ = evaluate(dataclasses.replace(spec, data=alone(data, split), output_dir=str(tmp_path / "alone")))
    assert record["metrics"] == pytest.approx(same["metrics"], rel=1e-6)


def test_images_of_the_split_are_reconstructed(checkpoint: Path, data: DataSpec, tmp_path: Path) -> None:
    spec = reconstruction.ReconstructSpec(
        checkpoint=str(checkpoint),
        name="tiny",
        output_dir=str(tmp_path / "out"),
        data=data,
        sampler=SamplerSpec(S=5),
        compute=ComputeSpec("cpu", batch_size=8),
        grid=0,
    )
    record, _ = reconstruction.evaluate(spec)
    same, _ = reconstruction.evaluate(
        dataclasses.replace(spec, data=alone(data, "test"), output_dir=str(tmp_path / "alone"))
    )
    assert record["metrics"] == pytest.approx(same["metrics"], rel=1e-6)


def test_bfloat16_features_have_a_reference_of_their_own(spec: EvaluateSpec, data: DataSpec) -> None:
    session = Session()
    one, other = (
        session.reference_stats(data, dataclasses.replace(spec.metric, bf16=bf16), "cpu", spec.reference_dir, (1, 8, 8))
        for bf16 in (False, True)
    )
    assert not torch.equal(one.mean, other.mean)
