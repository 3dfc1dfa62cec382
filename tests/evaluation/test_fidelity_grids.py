"""The pictures of a cell."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddim.checkpoints import LoadedModel
from ddim.evaluation.fidelity import EvaluateSpec, evaluate_cell
from ddim.image_io import grid
from ddim.inference.generate import generate


def test_the_grid_shows_the_first_images(spec: EvaluateSpec, model: LoadedModel) -> None:
    record, _ = evaluate_cell(dataclasses.replace(spec, grid=4))
    expected = grid(generate(model, spec.sampler, range(4), 0, spec.compute))
    with Image.open(Path(spec.output_dir) / record["grid"]) as picture:
        difference = np.array(picture).astype(int) - expected[0].numpy()
    assert np.abs(difference).max() <= 1
    record, _ = evaluate_cell(dataclasses.replace(spec, seed=1))
    assert "grid" not in record


def test_grids_of_different_cells_have_different_names(spec: EvaluateSpec) -> None:
    clipped = dataclasses.replace(spec.sampler, clip="x0")
    larger = dataclasses.replace(spec.sampler, rule="sigma_hat", eta=None)
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"sampler": clipped}, {"sampler": larger}]
    names = [evaluate_cell(dataclasses.replace(spec, grid=1, **change))[0]["grid"] for change in changes]
    assert len(set(names)) == len(names)
