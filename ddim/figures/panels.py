"""The figures of the paper as tensors: images in rows and columns, with what each row and column shows.

All of them start from addressed noise, so image i has the same x_T in every figure. What they hold are samples before
rounding; `ddim.figures.layout` makes pictures of them.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddim.diffusion.interpolation import slerp
from ddim.diffusion.labels import row_label
from ddim.diffusion.sampling import State
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.inference.generate import progress
from ddim.inference.trajectories import Source, along, samples_from
from ddim.io import read_safetensors, write_safetensors

AXES = ("row", "column", "channel", "height", "width")
Axis = tuple[dict[str, Any], ...]  # a row or column each: its "label", and the facts that the label stands for


@dataclass(frozen=True, eq=False)
class Panel:
    """Images in rows and columns.

    Attributes:
        cells: float32 (rows, columns, C, H, W), samples in about [-1, 1], not rounded.
        rows, columns: what each shows, in plain values; neighbours with the same label belong together.
        facts: what all cells share: the sampler, the seed, the weights.
    """

    cells: Tensor
    rows: Axis
    columns: Axis
    facts: dict[str, Any]


def samples(source: Source, samplers: Sequence[SamplerSpec], S: Sequence[int], indices: Sequence[int]) -> Panel:
    """Return the same images sampled in many ways (paper, Fig. 3): a row for each sampler, S and images in columns.

    Args:
        source: model and seed.
        samplers: of the rows; their own S does not count.
        S: numbers of steps; each has a column for every image.
        indices: image numbers.
    """
    x_T = source.x_T(indices)
    chosen = [[dataclasses.replace(sampler, S=count) for count in S] for sampler in samplers]
    cells = [cell for row in chosen for cell in row]
    with progress(_evaluations(source, cells, len(x_T)), "samples") as bar:
        rows = [[samples_from(source, cell, x_T, indices, bar.update) for cell in row] for row in chosen]
    return Panel(
        torch.stack([torch.cat(row) for row in rows]),
        tuple({"label": row_label(s), "rule": s.rule, "eta": s.eta} for s in samplers),
        tuple({**_steps(source, cell), "index": i} for cell in chosen[0] for i in indices),
        _facts("samples", source, cells),
    )


def consistency(source: Source, sampler: SamplerSpec, S: Sequence[int], indices: Sequence[int]) -> Panel:
    """Return the same x_T sampled in ever more steps (paper, Fig. 5): a row for each image, S in columns."""
    x_T = source.x_T(indices)
    chosen = [dataclasses.replace(sampler, S=count) for count in S]
    with progress(_evaluations(source, chosen, len(x_T)), "consistency") as bar:
        columns = [samples_from(source, cell, x_T, indices, bar.update) for cell in chosen]
    return Panel(
        torch.stack(columns, dim=1),
        _images(indices),
        tuple(_steps(source, cell) for cell in chosen),
        _facts("consistency", source, chosen),
    )


def interpolation(
    source: Source, sampler: SamplerSpec, pairs: Sequence[tuple[int, int]], weights: Sequence[float]
) -> Panel:
    """Return samples between images (paper, Eq. 67 and Fig. 6, left): a row for each pair, the weights in columns.

    Args:
        source: model and seed.
        sampler: deterministic.
        pairs: image numbers; weight 0 is the first of a pair, 1 the second.
        weights: of the spherical interpolation of x_T.
    """
    x, y = (source.x_T([pair[side] for pair in pairs]) for side in (0, 1))
    starts = torch.stack([slerp(x, y, weight) for weight in weights], dim=1)
    return Panel(
        _from_starts("interpolation", source, sampler, starts),
        tuple({"label": f"image {i} → {j}", "indices": [i, j]} for i, j in pairs),
        _weights("w", weights),
        _facts("interpolation", source, [sampler]),
    )


def interpolation_grid(
    source: Source,
    sampler: SamplerSpec,
    corners: tuple[int, int, int, int],
    across: Sequence[float],
    within: Sequence[float],
) -> Panel:
    """Return samples between two pairs of images (paper, Eq. 67, Fig. 6, right, and 11-13).

    Args:
        source: model and seed.
        sampler: deterministic.
        corners: image numbers: the two of the first pair, upper left and right; the two of the second, below.
        across: the weights v between the pairs; each has a row.
        within: the weights w within both pairs; each has a column.
    """
    a, b, c, d = (source.x_T([i]) for i in corners)
    pairs = [(slerp(a, b, w), slerp(c, d, w)) for w in within]
    starts = torch.stack([torch.cat([slerp(upper, lower, v) for upper, lower in pairs]) for v in across])
    return Panel(
        _from_starts("interpolation_grid", source, sampler, starts),
        _weights("v", across),
        _weights("w", within),
        _facts("interpolation_grid", source, [sampler]) | {"corners": list(corners)},
    )


def x0_strip(source: Source, sampler: SamplerSpec, indices: Sequence[int], steps: Sequence[int]) -> Panel:
    """Return x̂0 and the x_t that it was predicted from: a row of each for every image, the times t in columns.

    Args:
        source: model and seed.
        sampler: how to sample.
        indices: image numbers.
        steps: which steps, rising, of 1..len(tau).
    """
    seen = _seen("x0_strip", source, sampler, indices, steps)
    rows = [{"label": name, "index": i} for name in ("x̂0", "x_t") for i in indices]
    return Panel(
        seen.permute(2, 0, 1, 3, 4, 5).flatten(0, 1),
        tuple(rows),
        _times(source, sampler, steps),
        _facts("x0_strip", source, [sampler]),
    )


def trajectory(source: Source, sampler: SamplerSpec, indices: Sequence[int], steps: Sequence[int]) -> Panel:
    """Return x_T, then x̂0 as predicted at the times t: a row for each moment, the images in columns; see `x0_strip`."""
    seen = _seen("trajectory", source, sampler, indices, steps)[:, :, 0].transpose(0, 1)
    start = {"label": "x_T", "t": source.tau(sampler)[-1]}
    return Panel(
        torch.cat([source.x_T(indices)[None], seen]),
        (start, *_times(source, sampler, steps)),
        _images(indices),
        _facts("trajectory", source, [sampler]),
    )


def save_panel(panel: Panel, path: Path) -> None:
    """Write a panel as safetensors: the tensor `cells`, everything else in the metadata, each value as JSON."""
    metadata = {"axes": AXES, "rows": panel.rows, "columns": panel.columns, **panel.facts}
    written = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    write_safetensors(path, {"cells": panel.cells}, written)


def load_panel(path: str | Path) -> Panel:
    """Read what `save_panel` wrote.

    Raises:
        UserError: no such file, or one that is no panel.
    """
    tensors, metadata = read_safetensors(Path(path))
    if not {"rows", "columns", "axes"} <= metadata.keys() or "cells" not in tensors:
        raise UserError(f"{path} holds no figure; give a file that scripts/figures.py wrote.")
    facts = {key: json.loads(value) for key, value in metadata.items() if key not in ("format", "axes")}
    return Panel(tensors["cells"], tuple(facts.pop("rows")), tuple(facts.pop("columns")), facts)


def _from_starts(title: str, source: Source, sampler: SamplerSpec, starts: Tensor) -> Tensor:
    """Sample from x_T in rows and columns; they have no image number, so there is no noise for the steps."""
    if sampler.rule != "ddim" or sampler.eta != 0:
        raise ValueError(f"interpolation is between deterministic samples; choose eta=0, not {row_label(sampler)}.")
    x_T = starts.flatten(0, 1)
    with progress(_evaluations(source, [sampler], len(x_T)), title) as bar:
        return samples_from(source, sampler, x_T, range(len(x_T)), bar.update).unflatten(0, starts.shape[:2])


def _seen(title: str, source: Source, sampler: SamplerSpec, indices: Sequence[int], steps: Sequence[int]) -> Tensor:
    """Return x̂0 and x_t before the given steps, (images, steps, 2, C, H, W)."""

    def both(x_t: Tensor, state: State) -> Tensor:
        return torch.stack((state.x0, x_t), dim=1)

    with progress(_evaluations(source, [sampler], len(indices)), title) as bar:
        return along(source, sampler, source.x_T(indices), indices, steps, both, bar.update)


def _evaluations(source: Source, samplers: Sequence[SamplerSpec], images: int) -> int:
    return images * sum(len(source.tau(sampler)) for sampler in samplers)


def _images(indices: Sequence[int]) -> Axis:
    return tuple({"label": f"image {i}", "index": i} for i in indices)


def _steps(source: Source, sampler: SamplerSpec) -> dict[str, Any]:
    return {"label": f"S={sampler.S}", "S": sampler.S, "tau": list(source.tau(sampler))}


def _weights(name: str, weights: Sequence[float]) -> Axis:
    return tuple({"label": f"{name}={weight:.3g}", "weight": weight} for weight in weights)


def _times(source: Source, sampler: SamplerSpec, steps: Sequence[int]) -> Axis:
    tau = source.tau(sampler)
    return tuple({"label": f"t={tau[-k]}", "t": tau[-k], "step": k} for k in steps)


def _facts(name: str, source: Source, samplers: Sequence[SamplerSpec]) -> dict[str, Any]:
    """Return what decided all cells; of the sampler, what does not change from cell to cell."""
    model = source.model
    described = [dataclasses.asdict(sampler) for sampler in samplers]
    shared = {key: value for key, value in described[0].items() if all(other[key] == value for other in described)}
    return {
        "figure": name,
        "seed": source.seed,
        "sampler": shared,
        **({"tau": list(source.tau(samplers[0]))} if len(samplers) == 1 else {}),
        "weights": model.weights,
        "weights_hash": model.weights_hash,
        "step": model.step,
        "schedule": model.spec.schedule.name,
        "T": model.spec.schedule.T,
        "prediction": model.spec.prediction,
        "data": model.spec.data,
        "bf16": source.compute.bf16,
    }
