"""Each image of a figure is what `ddim.sample` makes of the right x_T."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ddim
from ddim.checkpoints.model import LoadedModel
from ddim.diffusion.rules import Rule
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.figures import panels
from ddim.figures.panels import Panel
from ddim.inference.compute import ComputeSpec
from ddim.inference.trajectories import SamplingContext, evenly_spaced
from ddim.io import read_safetensors

SEED = 3
WEIGHTS = [0.0, 0.25, 0.5, 1.0]


@pytest.fixture(params=[3, 64])
def context(model: LoadedModel, request: pytest.FixtureRequest) -> SamplingContext:
    """With two batch sizes, on which nothing may depend: the expected images are sampled one by one."""
    return SamplingContext(model, SEED, ComputeSpec("cpu", request.param))


def noise(*indices: int) -> Tensor:
    return ddim.initial_noise(indices, (1, 8, 8), SEED)


def sampled(model: LoadedModel, x_T: Tensor, S: int, rule: Rule | None = None, index: int = 0) -> Tensor:
    """Return one image (C, H, W); `index` addresses the noise of its steps."""
    tau = ddim.linear_tau(50, S)
    with torch.no_grad():
        return ddim.sample(model, model.spec.schedule, x_T, tau, rule, seed=SEED, indices=[index])[0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def between(x: Tensor, y: Tensor, weight: float) -> Tensor:
    """Eq. 67 without its sines: turn the direction of x towards that of y in their plane, by Gram-Schmidt.

    The coefficients of the two directions are applied to the vectors, whose lengths differ slightly.
    """
    a, b = x.double().flatten().numpy(), y.double().flatten().numpy()
    u, v = a / np.linalg.norm(a), b / np.linalg.norm(b)
    side = v - (u @ v) * u
    angle = weight * math.atan2(np.linalg.norm(side), u @ v)
    turned = math.cos(angle) * u + math.sin(angle) * side / np.linalg.norm(side)
    of_a, of_b = np.linalg.lstsq(np.stack([u, v], axis=1), turned, rcond=None)[0]
    return torch.from_numpy(of_a * a + of_b * b).float().reshape(x.shape)


def test_samples_share_x_T_across_rules_and_S(context: SamplingContext) -> None:
    rows = [SamplerSpec(), SamplerSpec(eta=0.5), SamplerSpec("sigma_hat", None)]
    panel = panels.samples(context, rows, [2, 5], [7, 0])
    assert panel.images.shape == (3, 4, 1, 8, 8)
    assert panel.images.dtype == torch.float32
    assert [row["label"] for row in panel.rows] == ["η=0.0", "η=0.5", "σ̂"]
    assert [row["eta"] for row in panel.rows] == [0.0, 0.5, None]
    assert [column["label"] for column in panel.columns] == ["S=2", "S=2", "S=5", "S=5"]
    rules = [ddim.DDIM(0.0), ddim.DDIM(0.5), ddim.SigmaHat()]
    for row, rule in zip(panel.images, rules, strict=True):
        for image, column in zip(row, panel.columns, strict=True):
            i, S = column["index"], column["S"]
            close(image, sampled(context.model, noise(i), S, rule, i))
            assert column["tau"] == list(ddim.linear_tau(50, S))
    assert panel.metadata["sampler"].items() >= {"spacing": "linear", "clip": "none", "last_time": 0}.items()
    assert panel.metadata["seed"] == SEED
    assert panel.metadata["weights_hash"] == context.model.weights_hash


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_consistency_has_one_x_T_in_a_row(context: SamplingContext, eta: float) -> None:
    panel = panels.consistency(context, SamplerSpec(eta=eta), [1, 4, 10], [2, 9, 4])
    assert panel.images.shape == (3, 3, 1, 8, 8)
    for row, i in zip(panel.images, (2, 9, 4), strict=True):
        for image, S in zip(row, (1, 4, 10), strict=True):
            close(image, sampled(context.model, noise(i), S, ddim.DDIM(eta), i))
    assert [row["index"] for row in panel.rows] == [2, 9, 4]
    assert [column["S"] for column in panel.columns] == [1, 4, 10]
    assert panel.metadata["sampler"]["eta"] == eta
    assert "S" not in panel.metadata["sampler"]


def test_figures_share_images(context: SamplingContext) -> None:
    one = panels.samples(context, [SamplerSpec(), SamplerSpec(eta=1.0)], [4], [3, 5])
    other = panels.consistency(context, SamplerSpec(eta=1.0), [2, 4], [5, 6])
    close(one.images[1, 1], other.images[0, 1])


def test_interpolation_ends_are_the_samples_of_its_pair(context: SamplingContext) -> None:
    panel = panels.interpolation(context, SamplerSpec(S=4), [(0, 1), (8, 3)], WEIGHTS)
    assert panel.images.shape == (2, 4, 1, 8, 8)
    for row, (i, j) in zip(panel.images, ((0, 1), (8, 3)), strict=True):
        close(row[0], sampled(context.model, noise(i), 4))
        close(row[-1], sampled(context.model, noise(j), 4))
        for image, weight in zip(row, WEIGHTS, strict=True):
            close(image, sampled(context.model, between(noise(i), noise(j), weight), 4))
    assert [row["indices"] for row in panel.rows] == [[0, 1], [8, 3]]
    assert [column["weight"] for column in panel.columns] == WEIGHTS
    assert panel.metadata["tau"] == list(ddim.linear_tau(50, 4))


def test_interpolation_grid_is_slerp_of_slerps(context: SamplingContext) -> None:
    panel = panels.interpolation_grid(context, SamplerSpec(S=4), (5, 1, 0, 7), WEIGHTS, [0.0, 0.3, 1.0])
    assert panel.images.shape == (4, 3, 1, 8, 8)
    for i, image in zip((5, 1, 0, 7), panel.images[[0, 0, -1, -1], [0, -1, 0, -1]], strict=True):
        close(image, sampled(context.model, noise(i), 4))
    for row, v in zip(panel.images, WEIGHTS, strict=True):
        for image, w in zip(row, (0.0, 0.3, 1.0), strict=True):
            upper, lower = between(noise(5), noise(1), w), between(noise(0), noise(7), w)
            close(image, sampled(context.model, between(upper, lower, v), 4))
    assert panel.metadata["corners"] == [5, 1, 0, 7]
    assert [row["label"] for row in panel.rows] == ["v=0", "v=0.25", "v=0.5", "v=1"]
    assert [column["label"] for column in panel.columns] == ["w=0", "w=0.3", "w=1"]


@pytest.mark.parametrize("sampler", [SamplerSpec(eta=0.5), SamplerSpec("sigma_hat", None)])
def test_interpolation_needs_a_deterministic_sampler(model: LoadedModel, sampler: SamplerSpec) -> None:
    context = SamplingContext(model, SEED, ComputeSpec("cpu"))
    with pytest.raises(ValueError, match="needs a deterministic sampler such as ddim with eta=0, not "):
        panels.interpolation(context, sampler, [(0, 1)], WEIGHTS)
    with pytest.raises(ValueError, match="needs a deterministic sampler such as ddim with eta=0, not "):
        panels.interpolation_grid(context, sampler, (0, 1, 2, 3), WEIGHTS, WEIGHTS)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_x0_strip_shows_x_t_and_its_prediction(context: SamplingContext, eta: float) -> None:
    model, steps = context.model, (1, 2, 5)
    panel = panels.x0_strip(context, SamplerSpec(S=5, eta=eta), [6, 2, 1, 9], steps)
    assert panel.images.shape == (8, 3, 1, 8, 8)
    assert [row["label"] for row in panel.rows] == ["x̂0"] * 4 + ["x_t"] * 4
    assert [row["index"] for row in panel.rows] == [6, 2, 1, 9] * 2
    assert [column["t"] for column in panel.columns] == [50, 40, 10]
    predicted, states = panel.images.split(4)
    close(states[:, 0], noise(6, 2, 1, 9))
    for n, i in enumerate((6, 2, 1, 9)):
        close(predicted[n, -1], sampled(model, noise(i), 5, ddim.DDIM(eta), i))
    for column, t in enumerate((50, 40, 10)):
        a_t = float(model.spec.schedule.alpha_bar[t])
        x_t = states[:, column]
        with torch.no_grad():
            eps = model(x_t, torch.full((4,), t))
        torch.testing.assert_close(
            predicted[:, column] * math.sqrt(a_t) + math.sqrt(1 - a_t) * eps, x_t, rtol=0, atol=1e-3
        )


def test_trajectory_is_x_T_and_the_transposed_strip(context: SamplingContext) -> None:
    sampler = SamplerSpec(S=5, eta=1.0)
    strip = panels.x0_strip(context, sampler, [4, 8], (1, 3, 5))
    panel = panels.trajectory(context, sampler, [4, 8], (1, 3, 5))
    assert panel.images.shape == (4, 2, 1, 8, 8)
    assert torch.equal(panel.images[0], noise(4, 8))
    assert torch.equal(panel.images[1:].transpose(0, 1), strip.images[:2])
    assert [row["t"] for row in panel.rows] == [50, 50, 30, 10]
    assert [column["index"] for column in panel.columns] == [4, 8]


def test_spacing_clip_and_last_time_are_used(model: LoadedModel) -> None:
    context = SamplingContext(model, SEED, ComputeSpec("cpu"))
    sampler = SamplerSpec(S=4, spacing="quad", clip="x0_and_eps", last_time=1)
    panel = panels.consistency(context, sampler, [4], [0])
    with torch.no_grad():
        wanted = ddim.sample(
            model, model.spec.schedule, noise(0), ddim.SPACINGS["quad"](50, 4), last_time=1, clip="x0_and_eps"
        )
    close(panel.images[0, 0], wanted[0])
    assert panel.columns[0]["tau"] == list(ddim.SPACINGS["quad"](50, 4))


@pytest.mark.parametrize(("count", "steps"), [(2, 9), (10, 50), (10, 10), (10, 3), (7, 1000), (2, 1)])
def test_evenly_takes_first_last_and_equal_distances(count: int, steps: int) -> None:
    chosen = evenly_spaced(count, steps)
    assert len(chosen) == min(count, steps)
    assert (chosen[0], chosen[-1]) == (1, steps)
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


def test_panel_file_round_trip(model: LoadedModel, tmp_path: Path) -> None:
    context = SamplingContext(model, SEED, ComputeSpec("cpu"))
    panel = panels.samples(context, [SamplerSpec(), SamplerSpec("sigma_hat", None)], [2, 3], [1, 0])
    path = tmp_path / "new" / "samples.safetensors"
    panels.save_panel(panel, path)
    loaded = panels.load_panel(path)
    assert torch.equal(loaded.images, panel.images)
    assert dataclasses.replace(loaded, images=panel.images).__dict__ == panel.__dict__
    tensors, metadata = read_safetensors(path)
    assert list(tensors) == ["cells"]
    assert json.loads(metadata["axes"]) == ["row", "column", "channel", "height", "width"]
    assert json.loads(metadata["weights_hash"]) == model.weights_hash
    assert json.loads(metadata["columns"])[2]["tau"] == list(ddim.linear_tau(50, 3))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    panels.save_panel(Panel(torch.zeros(1, 1, 1, 2, 2), ({"label": ""},), ({"label": ""},), {}), path)
    assert panels.load_panel(path).metadata == {}
    from safetensors.torch import save_file

    save_file({"cells": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="holds no figure"):
        panels.load_panel(path)
