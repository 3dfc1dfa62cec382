"""Images from a checkpoint as files: a grid, single PNGs, or an animation of the trajectory."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from ddim.checkpoints import LoadedModel, load_model
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.image_io import grid, save_gif, save_png
from ddim.inference.compute import ComputeSpec, prepare_model, with_batch_size
from ddim.inference.generate import check_sampler, generate, network_evaluations, progress, to_pixels
from ddim.inference.trajectories import SamplingContext, record_steps
from ddim.random import check_seed


@dataclass(frozen=True)
class SampleSpec:
    """See configs/sample.yaml.

    Attributes:
        checkpoint: path of the model.
        output_dir: gets the files.
        compute, sampler: how.
        n: images, exactly.
        first: number of the first image; image i of a seed is the same in every call.
        seed: of the noise, 0 .. 2**64 - 1.
        weights: ema, online, or ema_RATE for an additional EMA.
        format: grid (one PNG), png (one file for each image, named by its number), or gif (x̂0 along the trajectory).
        overwrite: replace files of an earlier call.

    Raises:
        ValueError: n below 1, or image numbers or a seed out of range.
    """

    checkpoint: str
    output_dir: str
    compute: ComputeSpec
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    n: int = 64
    first: int = 0
    seed: int = 0
    weights: str = "ema"
    format: Literal["grid", "png", "gif"] = "grid"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1.")
        if not 0 <= self.first <= (1 << 32) - self.n:
            raise ValueError(f"first={self.first} is out of range: image numbers lie in 0 .. 2**32 - 1.")
        check_seed(self.seed)


def write_samples(spec: SampleSpec) -> list[Path]:
    """Sample and write; return the path of the grid or animation, or the folder of the single images.

    Raises:
        UserError: bad input, or files that would be overwritten; before any image is generated.
    """
    model = prepare_model(load_model(spec.checkpoint, spec.weights), spec.compute)
    check_sampler(model, spec.sampler)
    indices = range(spec.first, spec.first + spec.n)
    folder = Path(spec.output_dir)
    targets = _targets(spec, folder, indices)
    if not spec.overwrite and (present := next((path for path in targets if path.exists()), None)) is not None:
        raise UserError(f"{present} exists already; choose another output_dir=..., or overwrite=true to replace it.")
    spec = dataclasses.replace(spec, compute=with_batch_size(model, spec.compute, spec.n))
    if spec.format == "gif":
        save_gif(_frames(model, spec, indices), targets[0])
        return targets
    images = generate(model, spec.sampler, indices, spec.seed, spec.compute)
    if spec.format == "grid":
        save_png(grid(images), targets[0])
        return targets
    for path, image in zip(targets, images, strict=True):
        save_png(image, path)
    return [folder]


def _targets(spec: SampleSpec, folder: Path, indices: range) -> list[Path]:
    if spec.format == "png":
        return [folder / f"{i:06d}.png" for i in indices]
    return [folder / ("grid.png" if spec.format == "grid" else "trajectory.gif")]


def _frames(model: LoadedModel, spec: SampleSpec, indices: range) -> list[Tensor]:
    """Return a grid of x_T, then one of x̂0 for each step."""
    context = SamplingContext(model, spec.seed, spec.compute)
    x_T, count = context.x_T(indices), len(check_sampler(model, spec.sampler))
    steps = range(1, count + 1)
    with progress(len(indices) * network_evaluations(model, spec.sampler), "sampling") as bar:
        frames = record_steps(
            context, spec.sampler, x_T, indices, steps, lambda _, state: to_pixels(state.x0), bar.update
        )  # pixels: a long trajectory of floats would be large
    return [grid(to_pixels(x_T)), *(grid(frame) for frame in frames.transpose(0, 1))]
