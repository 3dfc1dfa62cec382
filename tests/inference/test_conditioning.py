"""Labels and guidance as commands name them, and the images that they make."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import ddim
from ddim import GuidanceSpec
from ddim.checkpoints import LoadedModel, load_model, read_model, save_model
from ddim.checkpoints.convert.exporting import ExportSpec, export_checkpoint
from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.image_io import class_grid, grid
from ddim.inference.compute import ComputeSpec
from ddim.inference.conditioning import arrange, condition_settings, conditioned, one_label, unlabelled
from ddim.inference.generate import check_sampler, generate, network_evaluations
from ddim.inference.sample_files import SampleSpec, write_samples

CPU = ComputeSpec("cpu")
ANIMALS = ("cat", "dog", "frog")
NONE = GuidanceSpec()


@pytest.fixture(scope="module")
def conditional(conditional_checkpoint: Path) -> LoadedModel:
    return load_model(conditional_checkpoint)


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> LoadedModel:
    return load_model(make_checkpoint(tmp_path_factory.mktemp("animals") / "a.ckpt", classes=ANIMALS))


@pytest.mark.parametrize(
    ("label", "labels"), [("dog", [1, 1, 1, 1]), (2, [2, 2, 2, 2]), ("all", [0, 1, 2, 0]), (None, [3, 3, 3, 3])]
)
def test_a_label_is_a_name_a_number_or_all(animals: LoadedModel, label: Any, labels: list[int]) -> None:
    condition = conditioned(animals, label, NONE).condition
    assert condition is not None
    assert condition.labels(range(4)).tolist() == labels


def test_a_name_and_its_number_are_the_same_settings(animals: LoadedModel) -> None:
    named, numbered = (condition_settings(conditioned(animals, label, NONE)) for label in ("dog", 1))
    assert named == numbered == {"condition": {"label": 1, "w": 0.0}}


def test_names_that_are_numbers_are_names(tmp_path: Path, make_checkpoint: Any) -> None:
    model = load_model(make_checkpoint(tmp_path / "a.ckpt", classes=("2", "1", "0")))
    settings = condition_settings(conditioned(model, 2, NONE))
    assert settings["condition"]["label"] == 0


@pytest.mark.parametrize(
    ("label", "guidance", "reason"),
    [
        (
            "dgo",
            NONE,
            r"label=dgo is no class of the checkpoint \(did you mean dog\?\); allowed: all, a number from 0",
        ),
        (3, NONE, "label=3 is no class .* or a name: cat, dog, frog"),
        (-1, NONE, "label=-1 is no class"),
        ("own", NONE, "label=own is no class"),
        (None, GuidanceSpec(1.0), "guidance: guidance needs a label; give label=all, a name or a number"),
        (None, GuidanceSpec(0.0, (1, 5)), "guidance needs a label"),
        ("all", GuidanceSpec(1.0, (20, 51)), r"guidance.interval=\[20, 51\] must end at T=50 or before"),
    ],
)
def test_what_the_model_does_not_know_is_refused(
    animals: LoadedModel, label: Any, guidance: GuidanceSpec, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        conditioned(animals, label, guidance)


@pytest.mark.parametrize(
    ("label", "guidance", "asked"),
    [
        ("cat", NONE, "label=cat"),
        (None, GuidanceSpec(2.0), "guidance.w=2"),
        (None, GuidanceSpec(0, (1, 5)), "w=0"),
    ],
)
def test_an_unconditional_model_takes_no_labels(
    model: LoadedModel, label: Any, guidance: GuidanceSpec, asked: str
) -> None:
    with pytest.raises(UserError, match=f"{asked}.* needs a checkpoint that was trained with classes"):
        conditioned(model, label, guidance)
    assert conditioned(model, None, NONE) is model


def test_without_dropped_labels_there_is_no_guidance(animals: LoadedModel) -> None:
    trained = dataclasses.replace(animals, recipe={"objective.label_drop": 0.0})
    conditioned(trained, "cat", NONE)
    for label, guidance in ((None, NONE), ("cat", GuidanceSpec(1.0)), ("cat", GuidanceSpec(-1.0))):
        with pytest.raises(UserError, match="no image without its label"):
            conditioned(trained, label, guidance)
    with pytest.raises(UserError, match=r"the likelihood is computed without labels, .* no image"):
        unlabelled(trained, "the likelihood")
    unlabelled(animals, "the likelihood")


@pytest.mark.parametrize("way", ["model file", "float16", "import", "diffusers"])
def test_a_copy_of_a_checkpoint_refuses_guidance_as_it_does(tmp_path: Path, make_checkpoint: Any, way: str) -> None:
    source, folder = make_checkpoint(tmp_path / "a.ckpt", classes=ANIMALS), tmp_path / "copy"
    content = torch.load(source)
    content["ddim"]["recipe"] = {"objective.label_drop": 0.0}
    torch.save(content, source)
    if way == "model file":
        save_model(read_model(source), copy := tmp_path / "copy.safetensors")
    elif way == "float16":
        [copy], _ = export_checkpoint(ExportSpec(str(source), str(folder), "safetensors", dtype="float16"))
    else:
        if way == "diffusers":
            export_checkpoint(ExportSpec(str(source), str(folder)))
            source = folder
        copy = import_checkpoint(ImportSpec(str(tmp_path / "imported"), "never used", checkpoint=str(source))).path
    model = load_model(copy)
    conditioned(model, "cat", NONE)
    with pytest.raises(UserError, match="no image without its label"):
        conditioned(model, "cat", GuidanceSpec(1.0))


@pytest.mark.parametrize("w", [0.0, -1.0])
def test_w_of_0_and_minus_1_are_one_network_bit_for_bit(conditional: LoadedModel, w: float) -> None:
    """From x_T to pixels, with the network called by hand."""
    y = torch.tensor([0, 1, 2, 3]) if w == 0 else torch.full((4,), 10)
    x_T = ddim.initial_noise(range(4), (1, 8, 8), 3)
    with torch.inference_mode():
        x = ddim.sample(lambda x, t: conditional(x, t, y), conditional.spec.schedule, x_T, ddim.linear_tau(50, 5))
    images = generate(conditioned(conditional, "all", GuidanceSpec(w)), SamplerSpec(S=5), range(4), 3, CPU)
    assert torch.equal(images, ((x + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8))
    if w == -1:
        without = generate(conditioned(conditional, None, NONE), SamplerSpec(S=5), range(4), 3, CPU)
        assert torch.equal(images, without)
        assert torch.equal(generate(conditional, SamplerSpec(S=5), range(4), 3, CPU), without)


def test_an_image_has_its_label_whatever_else_is_asked_for(conditional: LoadedModel) -> None:
    model, sampler = conditioned(conditional, "all", GuidanceSpec(1.0)), SamplerSpec(S=4, eta=1.0)
    images = generate(model, sampler, range(23), 0, CPU)
    for size in (1, 7):
        assert (generate(model, sampler, range(23), 0, ComputeSpec("cpu", size)).int() - images).abs().max() <= 1
    assert (generate(model, sampler, [13, 4], 0, CPU).int() - images[[13, 4]]).abs().max() <= 1
    alone = generate(conditioned(conditional, 3, GuidanceSpec(1.0)), sampler, [13, 4], 0, CPU)
    assert (alone[0].int() - images[13]).abs().max() <= 1
    assert (alone[1].int() - images[4]).abs().max() > 1


@pytest.mark.parametrize(
    ("guidance", "evaluations"),
    [(NONE, 10), (GuidanceSpec(-1.0), 10), (GuidanceSpec(0.5), 20), (GuidanceSpec(0.5, (11, 30)), 14)],
)
@pytest.mark.parametrize("scheduler", [None, "DDIMScheduler"])
def test_evaluations_are_those_of_the_network(
    conditional: LoadedModel, guidance: GuidanceSpec, evaluations: int, scheduler: str | None
) -> None:
    sampler = SamplerSpec(S=10)
    if scheduler is not None:
        pytest.importorskip("diffusers")
        kwargs = {"timestep_spacing": "trailing", "clip_sample": False}  # the times of S=10: 5, 10, ..., 50
        sampler = SamplerSpec("diffusers", None, 10, "scheduler", scheduler=scheduler, kwargs=kwargs)
    seen = []
    hook = conditional.network.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    model = conditioned(conditional, "all", guidance)
    generate(model, sampler, range(3), 0, CPU)
    hook.remove()
    assert network_evaluations(model, sampler) == evaluations == sum(seen) / 3


def test_a_number_of_evaluations_is_refused_with_guidance(conditional: LoadedModel) -> None:
    sampler = SamplerSpec(S=None, nfe=10)
    check_sampler(conditioned(conditional, "all", NONE), sampler)
    with pytest.raises(UserError, match=r"nfe=10 counts one evaluation .* give S"):
        check_sampler(conditioned(conditional, "all", GuidanceSpec(1.0)), sampler)


def test_a_grid_has_a_row_for_each_class(animals: LoadedModel) -> None:
    images = torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1).expand(8, 1, 2, 2)
    white = torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)
    rows = torch.cat([images[[0, 3, 6]], images[[1, 4, 7]], images[[2, 5]], white])
    assert torch.equal(class_grid(images, torch.arange(8) % 3), grid(rows, 3))
    assert torch.equal(arrange(conditioned(animals, "all", NONE), images, range(9, 17)), grid(rows, 3))
    for label, some in (("cat", images), (None, images), ("all", images[:3])):
        assert torch.equal(arrange(conditioned(animals, label, NONE), some, range(len(some))), grid(some))


def test_what_takes_one_label_refuses_all(animals: LoadedModel, model: LoadedModel) -> None:
    for fine in (model, conditioned(animals, "cat", NONE), conditioned(animals, None, NONE)):
        one_label(fine, "encoding")
    with pytest.raises(UserError, match="encoding takes one label for all images, not label=all"):
        one_label(conditioned(animals, "all", NONE), "encoding")


def test_files_state_label_and_guidance(conditional_checkpoint: Path, tmp_path: Path) -> None:
    spec = SampleSpec(str(conditional_checkpoint), str(tmp_path), CPU, SamplerSpec(S=3), n=4, format="png")
    spec = dataclasses.replace(spec, label="all", guidance=GuidanceSpec(1.0))
    write_samples(spec)
    write_samples(spec)  # the same settings: kept
    for other in ({"label": 3}, {"guidance": NONE}, {"guidance": GuidanceSpec(1.0, (1, 9))}):
        with pytest.raises(UserError, match=r"exists already \(condition="):
            write_samples(dataclasses.replace(spec, **other))
    model, guidance = ddim.load_model(conditional_checkpoint), GuidanceSpec(1.0)
    images = model.sample(range(4), SamplerSpec(S=3), label="all", guidance=guidance)
    assert torch.equal(images, generate(conditioned(model, "all", guidance), SamplerSpec(S=3), range(4), 0, CPU))
