"""Images from a checkpoint as files: a grid, single PNGs, or an animation of the trajectory."""

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

from torch import Tensor

from ddim.checkpoints import LoadedModel, load_model
from ddim.config import FilePath
from ddim.diffusion.guidance import GuidanceSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.image_io import read_png_text, save_gif, save_png
from ddim.inference.batching import share, split
from ddim.inference.compute import ComputeSpec, prepare_model, with_batch_size
from ddim.inference.conditioning import arrange, condition_settings, conditioned
from ddim.inference.encoded_files import EncodedImages, check_images, in_precision_of, load_encoded, say_what_differs
from ddim.inference.generate import (
    check_sampler,
    generate,
    generate_batches,
    network_evaluations,
    progress,
    to_pixels,
)
from ddim.inference.trajectories import SamplingContext, record_steps
from ddim.io import partial_files
from ddim.random import check_image_numbers, check_seed
from ddim.results.records import record_key
from ddim.signals import StopSignals

log = logging.getLogger(__name__)
TEXT = "ddim"  # the entry of a PNG that states how its image was made
ENCODING = ("fingerprint", "inversion", "tau", "sampler", "condition", "bf16", "tf32")  # what decides an encoded x_T
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
        label, guidance: of a conditional model, see `ddim.inference.conditioning.conditioned`.
        x_T: a file of encoded images (scripts/encode.py) to decode in place of noise: its images from `first` on, at
            most n; `seed` is then that of the noise of the steps only.
        format: grid (one PNG), png (one file for each image, named by its number), or gif (x̂0 along the trajectory).
        overwrite: replace files of other settings, which are refused otherwise. Single images of the same settings are
            kept in any case.

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
    label: int | str | None = None
    guidance: GuidanceSpec = field(default_factory=GuidanceSpec)
    x_T: FilePath | None = None
    format: Literal["grid", "png", "gif"] = "grid"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1.")
        check_image_numbers(self.first, self.n)
        check_seed(self.seed)


def write_samples(spec: SampleSpec, processes: Processes = SINGLE_PROCESS) -> list[Path]:
    """Sample and write; return the path of the grid or animation, or the folder of the single images.

    Each process computes its share of the batches. Single images are written batch by batch, so that memory does not
    grow with n, and those that are there already are not computed again.

    Raises:
        UserError: bad input, or files that would be overwritten; before any image is generated.
    """
    compute = dataclasses.replace(spec.compute, device=processes.local_device(spec.compute.device))
    target = Path(spec.output_dir) / {"png": "", "grid": "grid.png", "gif": "trajectory.gif"}[spec.format]
    with processes.barrier():
        model = conditioned(load_model(spec.checkpoint, spec.weights), spec.label, spec.guidance)
        tau = check_sampler(model, spec.sampler)
        encoded = None if spec.x_T is None else _load_x_T(model, spec, spec.x_T, tau)
        if encoded is not None:
            spec = dataclasses.replace(spec, n=min(spec.n, len(encoded.x_T) - spec.first))
            compute = in_precision_of(encoded, compute)
        check_size(spec, model.spec.image_shape, len(tau))
        evaluations = spec.n * network_evaluations(model, spec.sampler)
        compute = prepare_model(model, compute, evaluations, spec.n, processes.world_size == 1)
    spec = dataclasses.replace(spec, compute=compute)
    indices = range(spec.first, spec.first + spec.n)
    text = _made_from(model, spec, encoded)
    processes.check_same(text)
    missing = processes.run_on_main(lambda: _missing(text, spec, target, indices))
    if missing:
        compute = with_batch_size(model, compute, spec.n, processes)
    spec = dataclasses.replace(spec, compute=compute)
    if spec.format == "gif":
        frames = _frames(model, spec, indices, processes, encoded)
        processes.run_on_main(lambda: save_gif(frames, target))
    elif spec.format == "grid":
        start = None if encoded is None else encoded.start
        images = generate(model, spec.sampler, indices, spec.seed, compute, processes=processes, start=start)
        processes.run_on_main(lambda: save_png(arrange(model, images, indices), target, {TEXT: text}))
    else:
        batches = [batch for gap in missing for batch in split(gap, compute.batch_size, spec.first)]
        with processes.barrier():
            _write_images(model, spec, batches, target, text, encoded, processes)
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
            f"n={spec.n} images do not fit into one picture{f' of {frames} frames' * (frames > 1)}; ask for fewer, or "
            "choose format=png."
        )


def _missing(text: str, spec: SampleSpec, target: Path, indices: range) -> list[range]:
    """Return the images that are not there yet; temporary files of killed calls are removed.

    Raises:
        UserError: a file is there that is not of these settings, and may not be overwritten.
    """
    if spec.format == "png":
        present = _present(text, target, indices, spec.overwrite)
    elif target.exists() and not spec.overwrite:
        raise _refused(target, "")
    else:
        present = []
    for partial in partial_files(Path(spec.output_dir)):
        if time.time() - partial.lstat().st_mtime > STALE:
            partial.unlink(missing_ok=True)
    if present:
        log.info("%d of %d images are there already and stay as they are.", len(present), spec.n)
    edges = [indices.start - 1, *present, indices.stop]
    return [range(i + 1, j) for i, j in pairwise(edges) if i + 1 < j]


def _present(wanted: str, folder: Path, indices: range, overwrite: bool) -> list[int]:
    """Return the numbers of the images of these settings that are there, rising; warn of others.

    Raises:
        UserError: one is of other settings, and may not be overwritten.
    """
    present, others = [], []
    # The folder is listed, since there may be far more images to come than files.
    for path in folder.glob("*.png"):
        if not path.stem.isdecimal() or path.name != _file_name(number := int(path.stem)):
            continue
        text = read_png_text(path, TEXT)
        if number in indices and text == wanted:
            present.append(number)
        elif number not in indices and text != wanted:
            others.append(path.name)
        elif number in indices and not overwrite:
            raise _refused(path, _differences(text, wanted))
    if others:  # whoever measures the folder would measure them too
        log.warning(
            "%s also has %d images that other settings made, %s the first of them: they stay, and a metric of the "
            "folder counts them; remove them, or choose another output_dir=...",
            folder,
            len(others),
            min(others),
        )
    return sorted(present)


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"{path} exists already{why}; choose another output_dir=..., or overwrite=true to replace it.")


def _differences(text: str | None, wanted: str) -> str:
    """Return how the settings in a file differ from those that are wanted, in brackets; "" if it has none."""
    try:
        old, new = dict(json.loads(text or "")), json.loads(wanted)
    except (ValueError, TypeError):
        return ""
    keys = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    return f" ({', '.join(f'{key}={old.get(key)}, not {new.get(key)}' for key in keys)})"


def _made_from(model: LoadedModel, spec: SampleSpec, encoded: EncodedImages | None) -> str:
    """Return what decides an image besides its number, as its file states it."""
    tau = check_sampler(model, spec.sampler)
    description = model.spec.to_dict() | {"schedule": model.spec.schedule.alpha_bar.tolist()}
    settings = {
        "seed": spec.seed,
        **spec.sampler.settings(),
        "S": len(tau),
        "tau_hash": record_key({"tau": list(tau)}),
        "weights_hash": model.weights_hash[:16],
        "description_hash": record_key(description),
        **spec.compute.precision,
        **condition_settings(model),
    }
    if encoded is not None:
        settings["x_T"] = record_key({key: encoded.metadata.get(key) for key in ENCODING})
    return json.dumps(settings, sort_keys=True)


def _file_name(number: int) -> str:
    return f"{number:06d}.png"


def _write_images(
    model: LoadedModel,
    spec: SampleSpec,
    batches: Sequence[range],
    folder: Path,
    made_from: str,
    encoded: EncodedImages | None,
    processes: Processes,
) -> None:
    """Write the images of this process's batches; a signal to stop waits until the images of a batch are written."""
    batches = share(batches, processes)
    start = None if encoded is None else encoded.start
    evaluations = sum(map(len, batches)) * network_evaluations(model, spec.sampler)
    with progress(evaluations, "sampling", processes) as bar, StopSignals() as stop:
        for batch, images in generate_batches(model, spec.sampler, batches, spec.seed, spec.compute, bar, start):
            for i, image in zip(batch, images, strict=True):
                save_png(image, folder / _file_name(i), {TEXT: made_from})
            stop.deliver()


def _load_x_T(model: LoadedModel, spec: SampleSpec, path: str, tau: Sequence[float]) -> EncodedImages:
    """Return the file of encoded images, without the second states where the sampler is not the one they are for."""
    encoded = load_encoded(path, model)
    check_images(encoded.x_T, path, [spec.first])
    same = say_what_differs(encoded, path, model, spec.sampler, tau)
    return encoded if same else dataclasses.replace(encoded, second=None)


def _frames(
    model: LoadedModel, spec: SampleSpec, indices: range, processes: Processes, encoded: EncodedImages | None
) -> list[Tensor]:
    """Return a grid of x_T, then one of x̂0 for each step."""
    context = SamplingContext(model, spec.seed, spec.compute, processes)
    x_T, second = (context.x_T(indices), None) if encoded is None else encoded.start(indices)
    steps = range(1 if second is None else 2, len(check_sampler(model, spec.sampler)) + 1)
    own = sum(map(len, share(split(indices, spec.compute.batch_size), processes)))
    with progress(own * network_evaluations(model, spec.sampler), "sampling", processes) as bar:
        frames = record_steps(
            context, spec.sampler, x_T, indices, steps, lambda _, state: to_pixels(state.x0), bar.update, second
        )  # pixels: a long trajectory of floats would be large
    return [arrange(model, frame, indices) for frame in (to_pixels(x_T), *frames.transpose(0, 1))]
