"""The files that `write_figures` writes, and the errors that it reports before it samples."""

import dataclasses
import itertools
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import ddim
from ddim import GuidanceSpec
from ddim.checkpoints.model import LoadedModel
from ddim.config import build
from ddim.data.datasets import DataSpec, load_images
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.metrics import MetricSpec
from ddim.figures import panels, paper_figures
from ddim.figures.layout import animate, draw
from ddim.figures.panels import load_panel, summarize_nearest
from ddim.figures.paper_figures import FIGURES, FigureSpec, PictureSpec, numbers_of_steps, targets, write_figures
from ddim.inference import trajectories
from ddim.inference.compute import ComputeSpec
from ddim.inference.generate import to_pixels
from ddim.inference.trajectories import SamplingContext

pytestmark = pytest.mark.integration


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> FigureSpec:
    compute = ComputeSpec("cpu", batch_size=16)
    sampler = SamplerSpec(S=5)
    common = FigureSpec(PictureSpec("all"), str(checkpoint), "mine", str(tmp_path / "out"), compute, sampler)
    return dataclasses.replace(common, points=3, S=(2, 4), data=DataSpec("digits", (8, 8), 1, flip=False))


@pytest.fixture
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories, "sample_steps", lambda *_: pytest.fail("something was sampled"))


def test_all_figures_are_written_with_tensors(spec: FigureSpec, model: LoadedModel) -> None:
    folder = Path(spec.output_dir)
    written = write_figures(spec)
    assert sorted(written) == sorted(folder.iterdir())
    assert {path.name for path in written} == {
        *(f"{name}.safetensors" for name in FIGURES),
        *(f"{name}.png" for name in FIGURES if name != "trajectory"),
        "trajectory.gif",
    }
    shapes = {
        "samples": (5, 2 * 5),  # four η and σ̂; two S, five images
        "consistency": (5, 2),
        "interpolation": (4, 3),
        "interpolation_grid": (3, 3),
        "x0_strip": (2 * 4, 5),
        "trajectory": (1 + 5, 16),
        "nearest": (16, 1 + 4),
    }
    for name, shape in shapes.items():
        picture, tensors = targets(name, folder)
        panel = panels.load_panel(tensors)
        assert panel.images.shape == (*shape, 1, 8, 8)
        assert (len(panel.rows), len(panel.columns)) == shape
        assert panel.metadata["figure"] == name
        assert panel.metadata["weights_hash"] == model.weights_hash
        assert panel.metadata["versions"].keys() >= {"torch", "python"}
        if name not in ("x0_strip", "trajectory"):
            continue
        again = Path(spec.output_dir) / f"again{picture.suffix}"
        (animate if name == "trajectory" else draw)(panel, again)
        assert again.read_bytes() == picture.read_bytes()


def test_figures_are_of_the_label_asked_for(spec: FigureSpec, conditional_checkpoint: Path) -> None:
    spec = dataclasses.replace(spec, checkpoint=str(conditional_checkpoint), n=4, label="all", S=(4,), sigma_hat=False)
    spec = dataclasses.replace(spec, figure=PictureSpec("samples"), guidance=GuidanceSpec(1.0), etas=(0.0,))
    write_figures(spec)
    turns = load_panel(Path(spec.output_dir) / "samples.safetensors")
    assert turns.metadata["condition"] == {"label": "all", "w": 1.0}
    write_figures(dataclasses.replace(spec, label="2", overwrite=True))
    twos = load_panel(Path(spec.output_dir) / "samples.safetensors")
    same = [torch.allclose(a, b, atol=1e-4) for a, b in zip(turns.images[0], twos.images[0], strict=True)]
    assert same == [False, False, True, False]
    with pytest.raises(UserError, match="interpolation takes one label for all images"):
        write_figures(dataclasses.replace(spec, figure=PictureSpec("interpolation")))
    write_figures(dataclasses.replace(spec, figure=PictureSpec("interpolation"), label=3))


def test_an_image_is_the_same_in_every_figure(spec: FigureSpec, model: LoadedModel) -> None:
    spec, context = dataclasses.replace(spec, indices=(6, 2, 0, 9), S=(2, 5)), SamplingContext(model, 0, spec.compute)
    images = {name: plan(spec, context)().images for name, plan in FIGURES.items()}
    with torch.no_grad():
        x_T = ddim.initial_noise((6, 2, 0, 9), (1, 8, 8), 0)
        wanted = ddim.sample(model, model.spec.schedule, x_T, ddim.linear_tau(50, 5))
    shown = {
        "samples": images["samples"][0, 4:],
        "consistency": images["consistency"][:, 1],
        "interpolation": images["interpolation"][:, [0, -1]].flatten(0, 1),
        "interpolation_grid": images["interpolation_grid"][[0, 0, -1, -1], [0, -1, 0, -1]],
        "x0_strip": images["x0_strip"][:4, -1],
        "trajectory": images["trajectory"][-1],
        "nearest": images["nearest"][:, 0],
    }
    for name in FIGURES:
        torch.testing.assert_close(shown[name], wanted, rtol=1e-3, atol=1e-3, msg=name)


def test_nearest_states_its_distances(spec: FigureSpec) -> None:
    metric, picture = MetricSpec("digits_classifier"), PictureSpec("nearest")
    reference_dir = str(Path(spec.output_dir).with_name("reference"))
    spec = dataclasses.replace(spec, figure=picture, metric=metric, indices=(7, 2), k=3, reference_dir=reference_dir)
    panel = load_panel(write_figures(spec)[1])
    assert panel.images.shape == (2, 1 + 2 * 3, 1, 8, 8)
    pixels = to_pixels(panel.images).double().flatten(2) / 255
    train = load_images(spec.data).batch(torch.arange(1797))
    firsts = []
    for row, images in zip(panel.rows, pixels, strict=True):
        found = row["nearest"]["pixels"]
        assert found["distances"] == pytest.approx((images[1:4] - images[0]).norm(dim=1).tolist())
        assert torch.equal(to_pixels(panel.images[panel.rows.index(row), 1:4]), train[found["training_images"]])
        firsts.append([space["distances"][0] for space in row["nearest"].values()])
        assert re.fullmatch(rf"{row['index']}: \d\.\d\d, \d*\.\d+", row["label"])
    about = panel.metadata["nearest"]
    assert (about["data"], about["training_images"], about["held_out"]) == ("digits", 1797, "train")
    titles = ["sample", *["nearest in pixels"] * 3, *["nearest in digits_classifier features"] * 3]
    assert [column["label"].partition("\n")[0] for column in panel.columns] == titles
    header, *lines = summarize_nearest(panel).splitlines()
    assert header.startswith("median (smallest) distance to the nearest of 1,797 training images; relative: ")
    told = [re.fullmatch(r"(.*): (\S+) \((\S+)\), relative (\S+) \((\S+)\)", line) for line in lines]
    sides = [
        (f"{space}, {who}", *(values[f"{side}{key}"] for key in ("distance", "relative")))
        for space, values in about["spaces"].items()
        for side, who in (("", "2 samples"), ("held_out_", "1,000 training images"))
    ]
    assert [about["spaces"][space]["distance"] for space in about["spaces"]] == [*map(list, zip(*firsts, strict=True))]
    for match, (name, *numbers) in zip(told, sides, strict=True):
        assert match is not None
        wanted = [of(values) for values in numbers for of in (statistics.median, min)]
        assert match[1] == name
        assert [float(number) for number in match.groups()[1:]] == pytest.approx(wanted, rel=0.006)


def test_seed_and_weights_are_used(spec: FigureSpec) -> None:
    spec = dataclasses.replace(spec, figure=PictureSpec("consistency"))
    loaded = []
    for number, changes in enumerate(({}, {"seed": 1}, {"weights": "online"})):
        folder = f"{spec.output_dir}{number}"
        _, tensors = write_figures(dataclasses.replace(spec, output_dir=folder, **changes))  # type: ignore[arg-type]
        loaded.append(panels.load_panel(tensors))
    assert [(panel.metadata["seed"], panel.metadata["weights"]) for panel in loaded] == [
        (0, "ema"),
        (1, "ema"),
        (0, "online"),
    ]
    for one, other in itertools.combinations(loaded, 2):
        assert not torch.allclose(one.images, other.images, atol=0.1)


@pytest.mark.parametrize("name", ["samples", "trajectory"])
def test_files_are_overwritten_only_on_request(spec: FigureSpec, name: Any, request: pytest.FixtureRequest) -> None:
    spec = dataclasses.replace(spec, figure=PictureSpec(name))
    written = write_figures(spec)
    before = [path.read_bytes() for path in written]
    written[0].unlink()  # the tensors are enough
    write_figures(dataclasses.replace(spec, seed=1, overwrite=True))
    assert all(a != path.read_bytes() for a, path in zip(before, written, strict=True))
    request.getfixturevalue("no_sampling")
    written[0].unlink()
    with pytest.raises(UserError, match=r"safetensors exists already; choose another name=..., or overwrite=true"):
        write_figures(spec)
    with pytest.raises(UserError, match="exists already"):
        write_figures(dataclasses.replace(spec, figure=PictureSpec("all")))
    assert sorted(Path(spec.output_dir).iterdir()) == written[1:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"figure": PictureSpec("samples"), "S": (10, 51)}, r"S=51 .*T=50"),
        ({"figure": PictureSpec("consistency"), "S": (51,)}, r"S=51 .*T=50"),
        ({"figure": PictureSpec("all"), "S": (51,)}, r"S=51 .*T=50"),
        ({"figure": PictureSpec("interpolation"), "sampler": SamplerSpec(S=51)}, r"S=51 .*T=50"),
        ({"figure": PictureSpec("x0_strip"), "sampler": SamplerSpec(S=51)}, r"S=51 .*T=50"),
        ({"figure": PictureSpec("trajectory"), "sampler": SamplerSpec(S=51)}, r"S=51 .*T=50"),
        ({"figure": PictureSpec("interpolation"), "n": 3}, "pairs of images, not 3; give an even number"),
        ({"figure": PictureSpec("interpolation"), "indices": (4,)}, "pairs of images, not 1"),
        ({"figure": PictureSpec("interpolation_grid"), "n": 3}, "two pairs of images, not 3 images; give four"),
        (
            {"figure": PictureSpec("interpolation_grid"), "sampler": SamplerSpec(eta=0.5)},
            r"deterministic sampler, such as sampler=ddim",
        ),
        (
            {"figure": PictureSpec("interpolation"), "sampler": SamplerSpec("sigma_hat", None)},
            r"deterministic sampler, such as sampler=ddim",
        ),
        (
            {"figure": PictureSpec("consistency"), "sampler": SamplerSpec(S=None, spacing="explicit", times=(1, 9))},
            r"vary S; give a named sampler.spacing",
        ),
        ({"figure": PictureSpec("samples"), "sampler": SamplerSpec(S=None, spacing="ddim25")}, "which takes any S"),
        ({"figure": PictureSpec("samples"), "sampler": SamplerSpec(S=None, nfe=5)}, "vary S; .* and no sampler.nfe"),
        ({"figure": PictureSpec("all"), "sampler": SamplerSpec(S=None, nfe=5)}, "vary S; .* and no sampler.nfe"),
        ({"figure": PictureSpec("samples"), "sampler": SamplerSpec("heun", None)}, "DDIM by η, and σ̂, not heun; take"),
        (
            {"figure": PictureSpec("samples"), "sampler": SamplerSpec("unipc", None, order=2)},
            "DDIM by η, and σ̂, not unipc; take sampler=ddim",
        ),
        ({"figure": PictureSpec("nearest"), "sampler": SamplerSpec(S=51)}, r"S=51 .*T=50"),
        ({"figure": PictureSpec("nearest"), "data": None}, "nearest needs the training images; give data=..."),
        ({"figure": PictureSpec("nearest"), "k": 1797}, "k=1797 must be less than the number of training images"),
        ({"checkpoint": "nowhere.ckpt"}, "there is no checkpoint nowhere.ckpt"),
        ({"weights": "average"}, "weights 'average'"),
    ],
)
@pytest.mark.usefixtures("no_sampling")
def test_errors_are_reported_before_sampling(spec: FigureSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_figures(dataclasses.replace(spec, **changes))
    assert not Path(spec.output_dir).exists()


def test_all_figures_of_a_solver_leave_samples_out(spec: FigureSpec, caplog: pytest.LogCaptureFixture) -> None:
    for sampler in (SamplerSpec(S=5), SamplerSpec("sigma_hat", None, S=5)):
        assert paper_figures._every(dataclasses.replace(spec, sampler=sampler)) == [*FIGURES]
    assert not caplog.messages
    names = paper_figures._every(dataclasses.replace(spec, sampler=SamplerSpec("heun", None), data=None))
    assert names == [name for name in FIGURES if name not in ("samples", "nearest")]
    assert caplog.messages == ["samples is left out: it shows DDIM by η, and the sampler is heun."]


@pytest.mark.usefixtures("no_sampling")
def test_a_file_of_times_has_no_other_S(spec: FigureSpec, tmp_path: Path) -> None:
    (tmp_path / "tau.json").write_text('{"T": 50, "tau": [9, 30]}')
    sampler = SamplerSpec(S=None, spacing=str(tmp_path / "tau.json"))
    with pytest.raises(UserError, match=r"vary S; give a named sampler.spacing"):
        write_figures(dataclasses.replace(spec, figure=PictureSpec("samples"), sampler=sampler))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"figure": {"name": "sample"}},
            r"figure.name='sample' is not known \(did you mean samples\?\); allowed: samples",
        ),
        ({"figure": {"name": "all", "width": 0.1}}, "width=0.1 must be 1 to 40 inches"),
        ({"n": 2, "indices": [1, 2]}, r"either n=2 or indices=\[1, 2\], not both"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"indices": []}, r"indices=\[\] must hold image numbers"),
        ({"indices": [0, -1]}, r"indices=\[0, -1\] must hold image numbers, 0 .. 2\*\*32 - 1"),
        ({"indices": [1 << 32]}, "must hold image numbers"),
        ({"S": []}, r"S=\[\] must hold a number of steps"),
        ({"etas": [0.5, 2.0]}, r"eta=2.0 must lie in \[0, 1\]"),
        ({"etas": [], "sigma_hat": False}, "leave no rows"),
        ({"points": 1}, "points=1 must be at least 2"),
        ({"columns": 1}, "columns=1 must be at least 2"),
        ({"frames": 0}, "frames=0 must be at least 2"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must lie in 0"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {
        "figure": {"name": "all"},
        "checkpoint": "a.ckpt",
        "name": "a",
        "output_dir": "out",
        "compute": {"device": "cpu"},
    }
    with pytest.raises(UserError, match=message):
        build(FigureSpec, given | changes, "")
    build(FigureSpec, given | {"indices": [0, (1 << 32) - 1], "etas": [], "points": 2}, "")


def test_default_S_end_at_the_models_T(spec: FigureSpec, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(panels, "consistency", lambda context, sampler, S, indices: seen.update(S=S, indices=indices))
    context = SamplingContext(model, 0, spec.compute)
    spec = dataclasses.replace(spec, S=None)
    FIGURES["consistency"](spec, context)()
    assert seen == {"S": (10, 20, 50), "indices": (0, 1, 2, 3, 4)}
    assert numbers_of_steps(spec, context, (100, 1000)) == (50,)
