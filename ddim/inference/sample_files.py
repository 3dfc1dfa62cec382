"""Images from a checkpoint as files: a grid, single PNGs, or an animation of the trajectory."""

import dataclasses
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from ddim.checkpoints import LoadedModel, load_model
from ddim.config import FilePath
from ddim.diffusion.spec import SamplerSpec
from ddim.errors import UserError
from ddim.image_io import grid, save_gif, save_png
from ddim.inference.batching import split
from ddim.inference.compute import ComputeSpec, prepare_model, with_batch_size
from ddim.inference.generate import check_sampler, generate, network_evaluations, progress, to_pixels
from ddim.inference.trajectories import SamplingContext, record_steps
from ddim.io import partial_files
from ddim.random import check_image_numbers, check_seed

MOST_BYTES = 1 << 28  # of images that are kept before their files are written
SMALLEST_FILE = 512  # bytes on a disk, with its entry
MOST_PIXELS = 178_956_970  # of a picture; Pillow refuses to open larger ones
MOST_PIXELS_OF_FRAMES = 1 << 30
STALE = 3600  # seconds since the last write, after which a temporary file is that of a killed process


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

    checkpoint: FilePath
    output_dir: FilePath
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
        check_image_numbers(self.first, self.n)
        check_seed(self.seed)


def write_samples(spec: SampleSpec) -> list[Path]:
    """Sample and write; return the path of the grid or animation, or the folder of the single images.

    Raises:
        UserError: bad input, or files that would be overwritten; before any image is generated.
    """
    model = prepare_model(load_model(spec.checkpoint, spec.weights), spec.compute)
    steps = len(check_sampler(model, spec.sampler))
    indices = range(spec.first, spec.first + spec.n)
    folder = Path(spec.output_dir)
    target = folder / {"png": "", "grid": "grid.png", "gif": "trajectory.gif"}[spec.format]
    check_size(spec, model.spec.image_shape, steps)
    if not spec.overwrite and (present := _present(spec, target, indices)) is not None:
        raise UserError(f"{present} exists already; choose another output_dir=..., or overwrite=true to replace it.")
    for partial in partial_files(folder):
        if time.time() - partial.lstat().st_mtime > STALE:
            partial.unlink(missing_ok=True)
    spec = dataclasses.replace(spec, compute=with_batch_size(model, spec.compute, spec.n))
    if spec.format == "gif":
        save_gif(_frames(model, spec, indices), target)
    elif spec.format == "grid":
        save_png(grid(generate(model, spec.sampler, indices, spec.seed, spec.compute)), target)
    else:
        most = MOST_BYTES // math.prod(model.spec.image_shape)
        for some in split(indices, max(1, most // spec.compute.batch_size) * spec.compute.batch_size, spec.first):
            images = generate(model, spec.sampler, some, spec.seed, spec.compute)
            for i, image in zip(some, images, strict=True):
                save_png(image, folder / f"{i:06d}.png")
    return [target]


def check_size(spec: SampleSpec, image_shape: tuple[int, int, int], steps: int) -> None:
    """Check that there is room for the files that are asked for: in memory for one picture, on the disk for many.

    Raises:
        UserError: there is not.
    """
    if spec.format == "png":
        folder = Path(spec.output_dir).absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free, needed = shutil.disk_usage(existing).free, spec.n * SMALLEST_FILE
        if needed > free:
            raise UserError(
                f"n={spec.n} files take at least {needed / 1e9:,.1f} GB, and {existing} has room for "
                f"{free / 1e9:,.1f} GB; ask for fewer images."
            )
        return
    pixels = spec.n * max(32, image_shape[1]) * max(32, image_shape[2])
    frames = steps + 1 if spec.format == "gif" else 1
    if pixels > MOST_PIXELS or pixels * frames > MOST_PIXELS_OF_FRAMES:
        raise UserError(
            f"n={spec.n} images do not fit into one picture{' of {frames} frames' * (frames > 1)}; ask for fewer, or "
            "choose format=png."
        )


def _present(spec: SampleSpec, target: Path, indices: range) -> Path | None:
    """Return a file that would be overwritten, or None."""
    if spec.format != "png":
        return target if target.exists() else None
    # The folder is listed, since there may be far more images to come than files.
    numbered = (path for path in target.glob("*.png") if path.stem.isdecimal() and int(path.stem) in indices)
    return next((path for path in numbered if path.name == f"{int(path.stem):06d}.png"), None)


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
