"""A checkpoint as one object: the images of the library's own functions, on the device that is asked for."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddim
from ddim import DDIM, SamplerSpec, initial_noise, linear_tau, load_model, sample
from ddim.checkpoints import load_model as load_without_sampling
from ddim.data import to_uint8
from ddim.errors import UserError
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import generate
from ddim.inference.model import Model


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Model:
    return load_model(checkpoint)


def test_its_samples_are_those_of_the_commands(loaded: Model, checkpoint: Path) -> None:
    sampler = SamplerSpec(S=4, eta=0.5)
    images = loaded.sample(range(3, 8), sampler, seed=2, batch_size=2)
    assert (images.dtype, images.shape) == (torch.uint8, (5, 1, 8, 8))
    expected = generate(load_without_sampling(checkpoint), sampler, range(3, 8), 2, ComputeSpec("cpu", 2))
    assert torch.equal(images, expected)
    assert not torch.equal(images, loaded.sample(range(3, 8), sampler, seed=3, batch_size=2))


@pytest.mark.parametrize(
    ("name", "weights_hash", "sampler", "levels"),
    [
        ("digits", "0ed0972e", SamplerSpec(S=10), 1),
        ("cifar10_small", "a6123ecb", SamplerSpec(S=5, eta=1.0, clip="x0"), 2),
    ],
)
def test_shipped_models_make_the_kept_images(
    name: str, weights_hash: str, sampler: SamplerSpec, levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any folder; up to one or two grey levels, for processors that round otherwise."""
    monkeypatch.chdir(tmp_path)
    model = load_model(name)
    assert model.weights_hash.startswith(weights_hash)
    kept = np.asarray(Image.open(Path(__file__).with_name(f"eight_{name}.png")))
    images = torch.cat(list(model.sample(range(8), sampler)), 2).permute(1, 2, 0).squeeze(2).numpy()  # in a row
    assert np.abs(kept.astype(int) - images).max() <= levels


def test_a_shipped_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint digitz; .* ship with the package: cifar10_small, digits"):
        load_model("digitz")
    (tmp_path / "digits").mkdir()  # a folder is no checkpoint
    assert load_model("digits").spec.data == "digits"
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"^there is no checkpoint mine; give the path of a file that exists, such as"):
        load_model("mine")
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").touch()
    with pytest.raises(UserError, match="digits"):  # a file of that name comes first
        load_model("digits")


@pytest.mark.parametrize("indices", [[7, 3], (7, 3), torch.tensor([7, 3])])
def test_images_are_chosen_by_number(loaded: Model, indices: list[int]) -> None:
    sampler = SamplerSpec(S=4, eta=1.0)
    among_others = loaded.sample(range(8), sampler)[[7, 3]]
    assert int((loaded.sample(indices, sampler).int() - among_others.int()).abs().max()) <= 1


def test_the_default_is_ddim_without_noise_in_50_steps(loaded: Model) -> None:
    x_T = initial_noise(range(2), loaded.spec.image_shape, seed=0)
    x_0 = sample(loaded, loaded.schedule, x_T, linear_tau(50, 50), DDIM(eta=0.0))
    assert torch.equal(loaded.sample(range(2)), to_uint8(x_0))


def test_weights_are_chosen_by_label(checkpoint: Path, loaded: Model) -> None:
    online = load_model(str(checkpoint), weights="online")
    assert (loaded.weights, online.weights) == ("ema", "online")
    assert loaded.weights_hash != online.weights_hash == load_without_sampling(checkpoint, "online").weights_hash


def test_a_model_is_moved_in_place(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    moved = model.to(torch.device("cpu"))
    assert moved is model
    assert model.device == torch.device("cpu")
    model.network.to("meta")
    assert model.device == torch.device("meta")
    with pytest.raises(UserError, match="device=cuda:77 cannot be used here"):
        load_model(checkpoint).to("cuda:77")
    with pytest.raises(ValueError, match="device=abacus is none that can compute"):
        model.to("abacus")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "n=0 images were asked for"),
        (([-1],), "every index must lie in"),
        (([0], SamplerSpec(S=51)), "S must lie in 1..50"),
        (([0], SamplerSpec(S=2), -1), "seed=-1 must lie in"),
    ],
)
def test_what_cannot_be_sampled_is_refused(loaded: Model, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded.sample(*arguments)


def test_a_missing_file_is_one_sentence() -> None:
    assert "load_model" in ddim.__all__
    with pytest.raises(UserError, match=r"there is no checkpoint nowhere\.ckpt"):
        load_model("nowhere.ckpt")


def test_the_folder_of_a_training_is_refused_with_its_newest(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.hardlink_to(checkpoint)
    with pytest.raises(UserError, match=re.escape(f"not a checkpoint; its newest one is {last}.")):
        load_model(tmp_path)
    assert load_model(last).step == load_model(checkpoint).step
