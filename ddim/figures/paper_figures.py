"""The paper's figures from a checkpoint: for each a picture and the file of its tensors."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ddim.checkpoints import LoadedModel, load_model
from ddim.config import FilePath, check_name, config_context
from ddim.data.datasets import DataSpec
from ddim.diffusion.guidance import GuidanceSpec
from ddim.diffusion.spec import SamplerSpec
from ddim.diffusion.timesteps import SPACINGS
from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation.metrics import MetricSpec
from ddim.evaluation.nearest import NearestSearch
from ddim.evaluation.session import Session
from ddim.figures import panels
from ddim.figures.layout import WIDTH, animate, draw
from ddim.figures.panels import Panel, save_panel
from ddim.inference.compute import ComputeSpec, prepare_model, with_batch_size
from ddim.inference.conditioning import conditioned, one_label
from ddim.inference.encoded_files import EncodedImages, check_images, in_precision_of, load_encoded, say_what_differs
from ddim.inference.generate import check_sampler
from ddim.inference.trajectories import SamplingContext, evenly_spaced
from ddim.random import check_seed
from ddim.results.plot_spec import check_width
from ddim.results.records import provenance

log = logging.getLogger(__name__)
SAMPLES = ("ddim", "sigma_hat")  # the rules that the figure of this name shows


@dataclass(frozen=True)
class PictureSpec:
    """Which figure, and its picture.

    Attributes:
        name: a key of FIGURES, or all; nearest is among all where there are `data`, samples where the sampler is DDIM.
        width: inches on paper, with labels of 8 points.
        format: of the picture; a trajectory is a GIF in any case.

    Raises:
        ValueError: a width that no page has.
    """

    name: Literal[
        "samples", "consistency", "interpolation", "interpolation_grid", "x0_strip", "trajectory", "nearest", "all"
    ]
    width: float = WIDTH
    format: Literal["png", "pdf"] = "png"

    def __post_init__(self) -> None:
        check_width(self.width)


@dataclass(frozen=True)
class FigureSpec:
    """See configs/figures.yaml.

    Attributes:
        figure: which, and its width and format.
        checkpoint: path of the model.
        name: of the folder.
        output_dir: receives a picture and a file of tensors for each figure.
        compute: device, precision and batch size.
        sampler: of all figures, except for what a figure varies: S and η in samples, S in consistency.
        indices: image numbers; null for the first n. Interpolation takes them as pairs, its grid the first four.
        n: images 0 .. n-1; null for the default of each figure.
        S: numbers of steps in samples and consistency; null for those of the paper that the model's T allows.
        etas: one row each in samples.
        sigma_hat: add a row for σ̂ to samples.
        points: number of weights 0 .. 1 of an interpolation.
        columns: number of times in x0_strip.
        frames: number of predictions in trajectory.
        k: number of training images beside each sample in nearest.
        data: the training images of nearest; None for none.
        metric: its extractor gives the features that nearest compares; None compares pixels alone.
        reference_dir: where features of training images are kept.
        seed: of the noise, 0 .. 2**64 - 1.
        label, guidance: of a conditional model, see `ddim.inference.conditioning.conditioned`; one label for
            interpolations.
        x_T: a file of encoded images (scripts/encode.py) to start from in place of noise; image i is its i-th.
        weights: ema, online, or ema_RATE for an additional EMA.
        overwrite: replace files of an earlier call.

    Raises:
        ValueError: a value out of range, both indices and n, samples without rows, or a name that is none.
    """

    figure: PictureSpec
    checkpoint: FilePath
    name: str
    output_dir: FilePath
    compute: ComputeSpec
    sampler: SamplerSpec = field(default_factory=SamplerSpec)
    indices: tuple[int, ...] | None = None
    n: int | None = None
    S: tuple[int, ...] | None = None
    etas: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)
    sigma_hat: bool = True
    points: int = 11
    columns: int = 10
    frames: int = 30
    k: int = 4
    data: DataSpec | None = None
    metric: MetricSpec | None = None
    reference_dir: FilePath = "outputs/reference"
    seed: int = 0
    weights: str = "ema"
    label: int | str | None = None
    guidance: GuidanceSpec = field(default_factory=GuidanceSpec)
    x_T: FilePath | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.n is not None and self.indices is not None:
            raise ValueError(f"give either n={self.n} or indices={list(self.indices)}, not both.")
        if self.n is not None and self.n < 1:
            raise ValueError(f"n={self.n} must be at least 1.")
        if self.indices is not None and not (self.indices and all(0 <= i < 1 << 32 for i in self.indices)):
            raise ValueError(f"indices={list(self.indices)} must hold image numbers, 0 .. 2**32 - 1.")
        if self.S is not None and not self.S:
            raise ValueError("S=[] must hold a number of steps.")
        if not self.etas and not self.sigma_hat:
            raise ValueError("etas=[] and sigma_hat=false leave no rows; give at least one.")
        for eta in self.etas:
            SamplerSpec(eta=eta)
        for key in ("points", "columns", "frames"):
            if getattr(self, key) < 2:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 2.")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1.")
        check_seed(self.seed)

    def images(self, default: int) -> tuple[int, ...]:
        """Return the image numbers of a figure that shows `default` images unless n or indices are given."""
        return self.indices if self.indices is not None else tuple(range(self.n or default))


def write_figures(spec: FigureSpec, processes: Processes = SINGLE_PROCESS) -> list[Path]:
    """Write the figures and return the paths: for each a PNG, PDF or GIF, and safetensors (`panels.load_panel`).

    Each process computes its share of the batches, and the first one writes.

    Raises:
        UserError: bad input, or files that would be overwritten; raised before anything is sampled.
    """
    names = _every(spec) if spec.figure.name == "all" else [spec.figure.name]
    files = {name: targets(name, Path(spec.output_dir), spec.figure.format) for name in names}
    compute = dataclasses.replace(spec.compute, device=processes.local_device(spec.compute.device))
    with processes.barrier():
        model = conditioned(load_model(spec.checkpoint, spec.weights), spec.label, spec.guidance)
        present = [path for paths in files.values() for path in paths if path.exists()]
        if present and not spec.overwrite:
            raise UserError(f"{present[0]} exists already; choose another name=..., or overwrite=true to replace it.")
        encoded = None if spec.x_T is None else _load_x_T(spec, spec.x_T, model)
        compute = prepare_model(model, compute if encoded is None else in_precision_of(encoded, compute))
    processes.check_same(f"{model.weights_hash} {compute.precision}")
    origin = provenance()
    context = SamplingContext(model, spec.seed, with_batch_size(model, compute, processes=processes), processes)
    if encoded is not None:
        context = dataclasses.replace(context, given=encoded.x_T)
        origin |= {"x_T": encoded.metadata}
    with processes.barrier(), config_context("sampler"):
        plans = {name: FIGURES[name](spec, context) for name in names}
    for name, plan in plans.items():
        picture, tensors = files[name]
        panel = plan()
        panel = dataclasses.replace(panel, metadata=panel.metadata | origin)
        with processes.barrier():
            if processes.is_main:
                if picture.suffix == ".gif":
                    animate(panel, picture)
                else:
                    draw(panel, picture, spec.figure.width)
                save_panel(panel, tensors)
    return [path for paths in files.values() for path in paths]


def _every(spec: FigureSpec) -> list[str]:
    """Return the figures that can be made of what is given."""
    left_out = {"nearest"} if spec.data is None else set()
    if spec.sampler.rule not in SAMPLES:
        log.warning("samples is left out: it shows DDIM by η, and the sampler is %s.", spec.sampler.rule)
        left_out.add("samples")
    return [name for name in FIGURES if name not in left_out]


def _load_x_T(spec: FigureSpec, path: str, model: LoadedModel) -> EncodedImages:
    encoded = load_encoded(path, model)
    tau = check_sampler(model, spec.sampler)
    if say_what_differs(encoded, path, model, spec.sampler, tau) and encoded.second is not None:
        log.warning(
            "figures start from x_T alone, and BDIA needs two states: encode with inversion=fixed_point for them."
        )
    return encoded


def targets(name: str, folder: Path, kind: str = "png") -> tuple[Path, Path]:
    """Return the paths of a figure: its picture, of this kind unless it is an animation, and its tensors."""
    return folder / f"{name}.{'gif' if name == 'trajectory' else kind}", folder / f"{name}.safetensors"


Plan = Callable[[], Panel]


def _images(spec: FigureSpec, context: SamplingContext, default: int) -> tuple[int, ...]:
    """Return the image numbers of a figure: `default` of them, or those asked for, of a file those that it has."""
    if context.given is None:
        return spec.images(default)
    indices = spec.images(min(default, len(context.given)))
    check_images(context.given, spec.x_T, indices)
    return indices


def _samples(spec: FigureSpec, context: SamplingContext) -> Plan:
    if spec.sampler.rule not in SAMPLES:
        raise UserError(
            f"samples shows DDIM by η, and σ̂, not {spec.sampler.rule}; take sampler=ddim, or figure=consistency."
        )
    S = numbers_of_steps(spec, context, (10, 100))
    rows = [dataclasses.replace(spec.sampler, rule="ddim", eta=eta, S=S[0]) for eta in spec.etas]
    if spec.sigma_hat:
        rows.append(dataclasses.replace(spec.sampler, rule="sigma_hat", eta=None))
    images = _images(spec, context, 5)
    return lambda: panels.samples(context, rows, S, images)


def _consistency(spec: FigureSpec, context: SamplingContext) -> Plan:
    S = numbers_of_steps(spec, context, (10, 20, 50, 100, 1000))
    images = _images(spec, context, 5)
    return lambda: panels.consistency(context, spec.sampler, S, images)


def _interpolation(spec: FigureSpec, context: SamplingContext) -> Plan:
    _check_deterministic(spec, context)
    images = _images(spec, context, 8)
    if len(images) % 2:
        raise UserError(f"interpolation takes pairs of images, not {len(images)}; give an even number of them.")
    pairs = list(zip(images[0::2], images[1::2], strict=True))
    return lambda: panels.interpolation(context, spec.sampler, pairs, _weights(spec))


def _interpolation_grid(spec: FigureSpec, context: SamplingContext) -> Plan:
    _check_deterministic(spec, context)
    if len(images := _images(spec, context, 4)) < 4:
        raise UserError(f"interpolation_grid takes two pairs of images, not {len(images)} images; give four.")
    corners = (images[0], images[1], images[2], images[3])
    return lambda: panels.interpolation_grid(context, spec.sampler, corners, _weights(spec), _weights(spec))


def _x0_strip(spec: FigureSpec, context: SamplingContext) -> Plan:
    steps = evenly_spaced(spec.columns, len(check_sampler(context.model, spec.sampler)))
    images = _images(spec, context, 4)
    return lambda: panels.x0_strip(context, spec.sampler, images, steps)


def _trajectory(spec: FigureSpec, context: SamplingContext) -> Plan:
    steps = evenly_spaced(spec.frames, len(check_sampler(context.model, spec.sampler)))
    # Fewer large images: all frames are kept unrounded for the file of tensors.
    images = _images(spec, context, 16 if context.model.spec.image_shape[1] < 128 else 4)
    return lambda: panels.trajectory(context, spec.sampler, images, steps)


def _nearest(spec: FigureSpec, context: SamplingContext) -> Plan:
    if spec.data is None:
        raise UserError("nearest needs the training images; give data=..., such as data=digits.")
    check_sampler(context.model, spec.sampler)
    images = _images(spec, context, 16)
    session, device = Session(context.processes), context.compute.state_device
    search = NearestSearch(spec.data, spec.metric, spec.k, context.model, session, device, spec.reference_dir)
    return lambda: panels.nearest(context, spec.sampler, images, search)


def _weights(spec: FigureSpec) -> list[float]:
    return [k / (spec.points - 1) for k in range(spec.points)]


def numbers_of_steps(spec: FigureSpec, context: SamplingContext, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the given S, or else the default ones up to the model's T, or T if there are none."""
    if spec.sampler.nfe is not None or spec.sampler.spacing not in (*SPACINGS, "scheduler"):
        raise UserError(
            "samples and consistency vary S; give a named sampler.spacing, which takes any S, and no sampler.nfe."
        )
    T = context.model.spec.schedule.T
    S = spec.S or tuple(count for count in default if count <= T) or (T,)
    for count in S:
        check_sampler(context.model, dataclasses.replace(spec.sampler, S=count))
    return S


def _check_deterministic(spec: FigureSpec, context: SamplingContext) -> None:
    check_sampler(context.model, spec.sampler)
    one_label(context.model, "interpolation")
    if not spec.sampler.deterministic:
        raise UserError("interpolation needs a deterministic sampler, such as sampler=ddim with sampler.eta=0.")


FIGURES: dict[str, Callable[[FigureSpec, SamplingContext], Plan]] = {
    "samples": _samples,
    "consistency": _consistency,
    "interpolation": _interpolation,
    "interpolation_grid": _interpolation_grid,
    "x0_strip": _x0_strip,
    "trajectory": _trajectory,
    "nearest": _nearest,
}
