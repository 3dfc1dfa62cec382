"""The pictures of a cell."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddim.checkpoints import LoadedModel
from ddim.data.pictures import grid
from ddim.evaluation import cells
from ddim.evaluation.cells import EvaluateSpec, evaluate_cell
from ddim.evaluation.generate import generate


def test_the_grid_shows_the_first_images(spec: EvaluateSpec, model: LoadedModel) -> None:
    record, _ = evaluate_cell(dataclasses.replace(spec, grid=4))
    expected = grid(generate(model, spec.sampler, range(4), 0, spec.compute))
    with Image.open(Path(spec.output_dir) / record["grid"]) as picture:
        difference = np.array(picture).astype(int) - expected[0].numpy()
    assert np.abs(difference).max() <= 1
    record, _ = evaluate_cell(dataclasses.replace(spec, seed=1))
    assert "grid" not in record


@pytest.mark.parametrize(("before", "after"), [(0, 13), (4, 13), (20, 5), (13, 0)])
def test_a_cell_that_goes_on_with_another_grid_shows_that_one(
    spec: EvaluateSpec, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And pictures are of all images, where only those of the second run are asked for."""
    undisturbed = dataclasses.replace(spec, grid=after, save_images=True, output_dir=f"{spec.output_dir}_other")
    expected, _ = evaluate_cell(undisturbed)
    with monkeypatch.context() as patch:
        real, calls = cells.generate_batch, iter(range(2))

        def interrupted(*arguments: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(*arguments)

        patch.setattr(cells, "generate_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_cell(dataclasses.replace(spec, grid=before))
    assert len([*Path(spec.output_dir).glob("unfinished/*/*.safetensors")]) == 2
    record, _ = evaluate_cell(dataclasses.replace(spec, grid=after, save_images=True))
    assert record["metrics"] == expected["metrics"]
    assert record.get("grid") == expected.get("grid")
    files = [
        {path.name: path.read_bytes() for path in Path(folder).rglob("*.png")}
        for folder in (spec.output_dir, undisturbed.output_dir)
    ]
    assert len(files[0]) == 20 + (after > 0)
    assert files[0] == files[1]


def test_grids_of_different_cells_have_different_names(spec: EvaluateSpec) -> None:
    clipped = dataclasses.replace(spec.sampler, clip="x0")
    larger = dataclasses.replace(spec.sampler, rule="sigma_hat", eta=None)
    changes: list[dict[str, Any]] = [{}, {"seed": 1}, {"sampler": clipped}, {"sampler": larger}]
    names = [evaluate_cell(dataclasses.replace(spec, grid=1, **change))[0]["grid"] for change in changes]
    assert len(set(names)) == len(names)
