"""The paper's figures as tensors: images in rows and columns, and a description of each row and column.

The x_T of image i depends only on the seed and i, so it is the same in every figure. The images are samples before
rounding; `ddim.figures.layout` draws them.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ddim.data.images import normalize
from ddim.diffusion.interpolation import slerp
from ddim.diffusion.labels import row_label
from ddim.diffusion.sampling import State
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.evaluation.nearest import NearestSearch
from ddim.inference.conditioning import condition_settings
from ddim.inference.generate import network_evaluations, progress, to_pixels
from ddim.inference.trajectories import SamplingContext, record_steps, sample_from
from ddim.io import read_safetensors, write_safetensors

AXES = ("row", "column", "channel", "height", "width")
TENSOR = "cells"  # name of the images in a figure's file
Axis = tuple[dict[str, Any], ...]  # for each row or column its "label", and what the label stands for


@dataclass(frozen=True, eq=False)
class Panel:
    """Images in rows and columns.

    Attributes:
        images: float32 (rows, columns, C, H, W), samples in about [-1, 1], not rounded.
        rows, columns: what each one shows, as JSON values; neighbours with the same label form a group.
        metadata: what all images share: the sampler, the seed, the weights.
    """

    images: Tensor
    rows: Axis
    columns: Axis
    metadata: dict[str, Any]


def samples(
    context: SamplingContext, samplers: Sequence[SamplerSpec], S: Sequence[int], indices: Sequence[int]
) -> Panel:
    """Return the same images from different samplers (paper, Fig. 3): samplers in rows, S and images in columns.

    Args:
        context: model and seed.
        samplers: one for each row; their own S is replaced.
        S: numbers of steps; each has a column for every image.
        indices: image numbers.
    """
    x_T = context.x_T(indices)
    grid = [[dataclasses.replace(sampler, S=count) for count in S] for sampler in samplers]
    all_samplers = [sampler for row in grid for sampler in row]
    with progress(_network_evaluations(context, all_samplers, len(x_T)), "samples") as bar:
        rows = [[sample_from(context, sampler, x_T, indices, bar.update) for sampler in row] for row in grid]
    return Panel(
        torch.stack([torch.cat(row) for row in rows]),
        tuple({"label": row_label(s), "rule": s.rule, "eta": s.eta} for s in samplers),
        tuple({**_steps_label(context, sampler), "index": i} for sampler in grid[0] for i in indices),
        _metadata("samples", context, all_samplers),
    )


def consistency(context: SamplingContext, sampler: SamplerSpec, S: Sequence[int], indices: Sequence[int]) -> Panel:
    """Return samples of the same x_T with different numbers of steps (paper, Fig. 5): images in rows, S in columns."""
    x_T = context.x_T(indices)
    samplers = [dataclasses.replace(sampler, S=count) for count in S]
    with progress(_network_evaluations(context, samplers, len(x_T)), "consistency") as bar:
        columns = [sample_from(context, sampler, x_T, indices, bar.update) for sampler in samplers]
    return Panel(
        torch.stack(columns, dim=1),
        _image_labels(indices),
        tuple(_steps_label(context, sampler) for sampler in samplers),
        _metadata("consistency", context, samplers),
    )


def interpolation(
    context: SamplingContext, sampler: SamplerSpec, pairs: Sequence[tuple[int, int]], weights: Sequence[float]
) -> Panel:
    """Return interpolations between images (paper, Eq. 67 and Fig. 6, left): pairs in rows, weights in columns.

    Args:
        context: model and seed.
        sampler: deterministic.
        pairs: image numbers; weight 0 gives the first of a pair, 1 the second.
        weights: of the spherical interpolation of x_T.

    Raises:
        ValueError: the sampler is not deterministic.
    """
    x, y = (context.x_T([pair[side] for pair in pairs]) for side in (0, 1))
    starts = torch.stack([slerp(x, y, weight) for weight in weights], dim=1)
    return Panel(
        _from_starts("interpolation", context, sampler, starts),
        tuple({"label": f"image {i} → {j}", "indices": [i, j]} for i, j in pairs),
        _weight_labels("w", weights),
        _metadata("interpolation", context, [sampler]),
    )


def interpolation_grid(
    context: SamplingContext,
    sampler: SamplerSpec,
    corners: tuple[int, int, int, int],
    across: Sequence[float],
    within: Sequence[float],
) -> Panel:
    """Return interpolations between two pairs of images (paper, Eq. 67, Fig. 6, right, and 11-13).

    Args:
        context: model and seed.
        sampler: deterministic.
        corners: image numbers: the first pair, upper left and right, and the second pair, lower left and right.
        across: the weights v between the pairs, one for each row.
        within: the weights w within both pairs, one for each column.

    Raises:
        ValueError: the sampler is not deterministic.
    """
    a, b, c, d = (context.x_T([i]) for i in corners)
    pairs = [(slerp(a, b, w), slerp(c, d, w)) for w in within]
    starts = torch.stack([torch.cat([slerp(upper, lower, v) for upper, lower in pairs]) for v in across])
    return Panel(
        _from_starts("interpolation_grid", context, sampler, starts),
        _weight_labels("v", across),
        _weight_labels("w", within),
        _metadata("interpolation_grid", context, [sampler]) | {"corners": list(corners)},
    )


def x0_strip(context: SamplingContext, sampler: SamplerSpec, indices: Sequence[int], steps: Sequence[int]) -> Panel:
    """Return x̂0, and the x_t that it was predicted from: a row of each for every image, the times t in columns.

    Args:
        context: model and seed.
        sampler: how to sample.
        indices: image numbers.
        steps: which of the steps 1..len(tau), rising.
    """
    states = _predictions_and_states("x0_strip", context, sampler, indices, steps)
    rows = [{"label": name, "index": i} for name in ("x̂0", "x_t") for i in indices]
    return Panel(
        states.permute(2, 0, 1, 3, 4, 5).flatten(0, 1),
        tuple(rows),
        _time_labels(context, sampler, steps),
        _metadata("x0_strip", context, [sampler]),
    )


def trajectory(context: SamplingContext, sampler: SamplerSpec, indices: Sequence[int], steps: Sequence[int]) -> Panel:
    """Return x_T, then x̂0 as predicted at the times t: times in rows, images in columns; see `x0_strip`."""
    predicted = _predictions_and_states("trajectory", context, sampler, indices, steps)[:, :, 0].transpose(0, 1)
    start = {"label": "x_T", "t": context.tau(sampler)[-1]}
    return Panel(
        torch.cat([context.x_T(indices)[None], predicted]),
        (start, *_time_labels(context, sampler, steps)),
        _image_labels(indices),
        _metadata("trajectory", context, [sampler]),
    )


def nearest(context: SamplingContext, sampler: SamplerSpec, indices: Sequence[int], search: NearestSearch) -> Panel:
    """Return samples, each with its nearest training images: images in rows; pixels, then features, in columns.

    Rows and metadata hold the distances under "nearest", those of held-out images too.

    Args:
        context: model and seed.
        sampler: how to sample.
        indices: image numbers.
        search: what the samples are compared with.
    """
    with progress(_network_evaluations(context, [sampler], len(indices)), "samples") as bar:
        x_0 = sample_from(context, sampler, context.x_T(indices), indices, bar.update)
    images, columns = [x_0[:, None]], [dict[str, Any](label="sample")]
    rows: list[dict[str, Any]] = [{"index": i, "nearest": {}} for i in indices]
    spaces: dict[str, dict[str, list[float]]] = {}
    for space, found in search.find(to_pixels(x_0)).items():
        images.append(normalize(search.shown(found.samples)))
        for row, *values in zip(rows, *(tensor.tolist() for tensor in found.samples), strict=True):
            row["nearest"][space] = dict(zip(("distances", "training_images", "mirrored"), values, strict=True))
        distances = {"distance": found.samples.distances[:, 0], "relative": found.relative}
        distances |= {"held_out_distance": found.held_out, "held_out_relative": found.held_out_relative}
        spaces[space] = {name: values.tolist() for name, values in distances.items()}
        title = f"nearest in {space if space == 'pixels' else f'{space} features'}"
        for name in ("distance", "relative"):
            here, there = (_three_digits(median(spaces[space][key])) for key in (name, f"held_out_{name}"))
            title += f"\n{name} {here}, {search.held_out_split} {there}"
        columns += [{"label": title, "space": space, "rank": rank + 1} for rank in range(search.k)]
    for row in rows:
        first = ", ".join(_three_digits(space["distances"][0]) for space in row["nearest"].values())
        row["label"] = f"{row['index']}: {first}"
    compared = {
        "data": search.train.name,
        "training_images": len(search.train),
        "held_out": search.held_out_split,
        "relative_to": search.among,
        "spaces": spaces,
    }
    metadata = _metadata("nearest", context, [sampler]) | {"nearest": compared}
    return Panel(torch.cat(images, dim=1), tuple(rows), tuple(columns), metadata)


def summarize_nearest(panel: Panel) -> str:
    """Return medians and smallest values of the distances of samples and held-out images, a line for each space."""
    about = panel.metadata["nearest"]
    lines = [
        f"median (smallest) distance to the nearest of {about['training_images']:,} training images; "
        f"relative: divided by the mean to the {about['relative_to']} nearest"
    ]
    held_out = {"test": "test images", "train": "training images"}[about["held_out"]]
    for space, values in about["spaces"].items():
        for key, name in (("", "samples"), ("held_out_", held_out)):
            distance, relative = (
                f"{_three_digits(median(numbers))} ({_three_digits(min(numbers))})"
                for numbers in (values[f"{key}distance"], values[f"{key}relative"])
            )
            lines.append(f"{space}, {len(values[f'{key}distance']):,} {name}: {distance}, relative {relative}")
    return "\n".join(lines)


def save_panel(panel: Panel, path: Path) -> None:
    """Write a panel as safetensors: one tensor of images, everything else in the metadata, each value as JSON."""
    metadata = {"axes": AXES, "rows": panel.rows, "columns": panel.columns, **panel.metadata}
    as_json = {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    write_safetensors(path, {TENSOR: panel.images}, as_json)


def load_panel(path: str | Path) -> Panel:
    """Read a file that `save_panel` wrote.

    Raises:
        UserError: there is no such file, or it is not the file of a panel.
    """
    tensors, as_json = read_safetensors(Path(path))
    if not {"rows", "columns", "axes"} <= as_json.keys() or TENSOR not in tensors:
        raise UserError(f"{path} holds no figure; give a file that scripts/figures.py wrote.")
    metadata = {key: json.loads(value) for key, value in as_json.items() if key not in ("format", "axes")}
    return Panel(tensors[TENSOR], tuple(metadata.pop("rows")), tuple(metadata.pop("columns")), metadata)


def _from_starts(title: str, context: SamplingContext, sampler: SamplerSpec, starts: Tensor) -> Tensor:
    """Sample from x_T in rows and columns. These have no image number, which noise in the steps would need."""
    if not sampler.deterministic:
        raise ValueError(
            f"interpolation needs a deterministic sampler such as ddim with eta=0, not {row_label(sampler)}."
        )
    x_T = starts.flatten(0, 1)
    with progress(_network_evaluations(context, [sampler], len(x_T)), title) as bar:
        return sample_from(context, sampler, x_T, range(len(x_T)), bar.update).unflatten(0, starts.shape[:2])


def _predictions_and_states(
    title: str, context: SamplingContext, sampler: SamplerSpec, indices: Sequence[int], steps: Sequence[int]
) -> Tensor:
    """Return x̂0 of the given steps and the x_t before them, (images, steps, 2, C, H, W)."""

    def both(x_t: Tensor, state: State) -> Tensor:
        return torch.stack((state.x0, x_t), dim=1)

    with progress(_network_evaluations(context, [sampler], len(indices)), title) as bar:
        return record_steps(context, sampler, context.x_T(indices), indices, steps, both, bar.update)


def _network_evaluations(context: SamplingContext, samplers: Sequence[SamplerSpec], images: int) -> int:
    return images * sum(network_evaluations(context.model, sampler) for sampler in samplers)


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def _image_labels(indices: Sequence[int]) -> Axis:
    return tuple({"label": f"image {i}", "index": i} for i in indices)


def _steps_label(context: SamplingContext, sampler: SamplerSpec) -> dict[str, Any]:
    return {"label": f"S={sampler.S}", "S": sampler.S, "tau": list(context.tau(sampler))}


def _weight_labels(name: str, weights: Sequence[float]) -> Axis:
    return tuple({"label": f"{name}={weight:.3g}", "weight": weight} for weight in weights)


def _time_labels(context: SamplingContext, sampler: SamplerSpec, steps: Sequence[int]) -> Axis:
    tau = context.tau(sampler)
    return tuple({"label": f"t={tau[-k]}", "t": tau[-k], "step": k} for k in steps)


def _metadata(figure: str, context: SamplingContext, samplers: Sequence[SamplerSpec]) -> dict[str, Any]:
    """Return what all images share: of the samplers, the values that are the same in all of them."""
    model = context.model
    first, *others = map(dataclasses.asdict, samplers)
    return {
        "figure": figure,
        "seed": context.seed,
        "sampler": {key: value for key, value in first.items() if all(other[key] == value for other in others)},
        **({} if others else {"tau": list(context.tau(samplers[0]))}),
        "weights": model.weights,
        "weights_hash": model.weights_hash,
        "step": model.step,
        "schedule": model.spec.schedule.name,
        "T": model.spec.schedule.T,
        "prediction": model.spec.prediction,
        "data": model.spec.data,
        "bf16": context.compute.bf16,
        **condition_settings(model),
    }
