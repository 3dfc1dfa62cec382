"""Post-hoc EMA (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3).

A training keeps two power-function averages of its weights, and writes them at some of its steps. Afterwards the
average of any other length is approximated by a linear combination of those, whose profile is the nearest one.

The average of length σ_rel at step t is ∫ p(τ) θ(τ) dτ with the profile p(τ) = (γ + 1) τ^γ / t^(γ + 1) on [0, t], whose
standard deviation is σ_rel t.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim.checkpoints.model import POSTHOC, read_checkpoint, read_model, save_model
from ddim.config import FilePath
from ddim.errors import UserError
from ddim.io import (
    Tensors,
    check_can_write,
    explain_read_errors,
    explain_write_errors,
    is_safetensors,
    read_safetensors,
)

LENGTHS = (0.05, 0.15)  # σ_rel of the two averages that a training keeps
MAX_LENGTH = 0.28  # the plain mean of all steps, γ = 0, has 1 / sqrt(12) = 0.2887
FIRST, RATIO = 100, 1.1  # the step of the first snapshot, and that of each over the one before
FOLDER = "ema"  # of the snapshots, in the folder of a run
STATE = "posthoc_ema"  # entry of a training checkpoint: {"start": step, "averages": {length: {name: tensor}}}
MAX_ERROR = 0.05  # of a profile that is not worth a warning
MAX_SHARE = 0.01  # of a profile, before the step where averaging began, that is not worth a warning

Averages = Mapping[float, Tensors]  # length -> parameter name -> average


@dataclass(frozen=True)
class PostHocSpec:
    """See configs/ema.yaml.

    Attributes:
        checkpoint: of a training with ema.posthoc=true; the averages end at its step.
        length: σ_rel, one or a list, above 0 and at most 0.28.
        snapshots: the folder that the training wrote them to; null: ema/ of the run.
        output_dir: folder of the model files.
        overwrite: replace existing files.

    Raises:
        ValueError: a length out of range, no length, or one twice.
    """

    checkpoint: FilePath
    length: float | tuple[float, ...]
    snapshots: FilePath | None = None
    output_dir: FilePath = "outputs/ema"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for length in self.lengths:
            if not 0 < length <= MAX_LENGTH:
                raise ValueError(f"length={length:g} must be above 0 and at most {MAX_LENGTH}, nearly the mean of all.")
        if len({f"{length:g}" for length in self.lengths}) != len(self.lengths) or not self.lengths:
            raise ValueError(f"length={list(self.lengths)} must hold at least one length, and none twice.")

    @property
    def lengths(self) -> tuple[float, ...]:
        """All lengths."""
        return self.length if isinstance(self.length, tuple) else (self.length,)


@dataclass(frozen=True)
class WrittenAverage:
    """An average that was written.

    Attributes:
        length: σ_rel.
        path: of its model file.
        error: of its profile, see `fit_profile`.
    """

    length: float
    path: Path
    error: float


def write_averages(spec: PostHocSpec) -> tuple[list[WrittenAverage], list[str]]:
    """Write the average of each length as a model file; return what was written, and warnings.

    Raises:
        UserError: bad input, or a file that would be overwritten; before anything is written.
    """
    path = Path(spec.checkpoint)
    if path.is_file() and is_safetensors(path):
        raise UserError(f"{path} is a model file; give a training checkpoint, such as RUN/checkpoints/last.ckpt.")
    model, place = read_model(path, "online"), path.resolve().parent
    step = model.step or 0
    name = f"{place.parent.name if place.name == 'checkpoints' else path.stem}_step_{step}"
    outputs = [Path(spec.output_dir) / f"{name}_length_{length:g}.safetensors" for length in spec.lengths]
    for output in outputs:
        check_can_write(output, spec.overwrite)
    with explain_read_errors(path):
        start, newest = _read_state(path, step)
    folder = Path(spec.snapshots or place.parent / FOLDER)
    steps, warnings = _find_snapshots(folder, start, step)
    of = training_of(model.recipe)
    snapshots = [*(_read_snapshot(snapshot_file(folder, earlier), newest, of) for earlier in steps), newest]
    profiles = [(length, t) for t in (*steps, step) for length in LENGTHS]
    kept = [average for snapshot in snapshots for average in snapshot.values()]
    written = []
    for length, output in zip(spec.lengths, outputs, strict=True):
        if (share := share_before(length, start, step)) > MAX_SHARE:
            warnings.append(
                f"length {length:g}: {share:.0%} of its profile lies before step {start}, where averaging began, and "
                "count with the weights of that step"
            )
        coefficients, error = fit_profile(profiles, length, step)
        if error > MAX_ERROR:
            warnings.append(
                f"length {length:g}: the nearest profile that can be made of the snapshots differs by {error:.0%}; "
                "lengths from 0.05 to 0.15 come nearer, and above 0.15 a longer training does"
            )
        state = _combine(coefficients, kept)
        origin = model.origin | {"posthoc_ema": f"{path}, {len(steps)} snapshots, profile error {error:.2g}"}
        average = replace(model, state=model.state | state, weights=f"{POSTHOC}{length:g}", origin=origin)
        with explain_write_errors(output):
            save_model(average, output)
        written.append(WrittenAverage(length, output, error))
    return written, warnings


def _read_state(path: Path, step: int) -> tuple[int, Averages]:
    """Return the step at which averaging began, and the averages that a checkpoint holds."""
    state: dict[str, Any] = read_checkpoint(path).get(STATE, {})
    if not state:
        raise UserError(f"{path} holds no averages for this; train, or resume, with ema.posthoc=true.")
    if state["start"] >= step:
        raise UserError(f"{path} is of step {step}, where averaging began; give a later checkpoint.")
    return int(state["start"]), {length: state["averages"][f"{length:g}"] for length in LENGTHS}


def _find_snapshots(folder: Path, start: int, step: int) -> tuple[list[int], list[str]]:
    """Return the steps before `step` of which there are snapshots, and a warning if there are not all."""
    due = [t for t in snapshot_steps(step) if t > start]
    found = [t for t in due if snapshot_file(folder, t).is_file()]
    if due and not found:
        raise UserError(
            f"{folder} holds no snapshot of step {due[0]} to {due[-1]}; give the folder that the training wrote them "
            "to, snapshots=RUN/ema."
        )
    missing = [t for t in due if t not in found]
    if not missing:
        return found, []
    return found, [f"{folder} lacks {len(missing)} of the {len(due)} snapshots, the first of step {missing[0]}"]


def _read_snapshot(path: Path, newest: Averages, of: Mapping[str, str]) -> Averages:
    """Return the averages in a file (memory-mapped), with names and shapes of the newest, of the training `of`."""
    tensors, metadata = read_safetensors(path)
    expected = snapshot_tensors(newest)
    other = any(metadata.get(key, value) != value for key, value in of.items())
    if other or {n: value.shape for n, value in tensors.items()} != {n: value.shape for n, value in expected.items()}:
        raise UserError(
            f"{path} holds averages of another training; give the folder of this training, snapshots=RUN/ema."
        )
    return {length: {name: tensors[f"{length:g}/{name}"] for name in own} for length, own in newest.items()}


def _combine(coefficients: Sequence[float], averages: Sequence[Tensors]) -> Tensors:
    """Return a linear combination, computed in float64, in float32."""
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in averages[0].items()}
    for coefficient, average in zip(coefficients, averages, strict=True):
        for name, value in average.items():
            total[name].add_(value, alpha=coefficient)
    return {name: value.float() for name, value in total.items()}


def snapshot_steps(end: int) -> list[int]:
    """Return the steps below `end` at which a training writes its averages.

    They grow geometrically since the width of a profile is proportional to its step. They are a function of the step
    alone, and so depend neither on where a run stopped nor on how long it is, or becomes later.
    """
    return list(takewhile(lambda step: step < end, (round(FIRST * RATIO**k) for k in count())))


def snapshot_file(folder: Path, step: int) -> Path:
    """Return the file of the averages at a step."""
    return folder / f"step_{step:08d}.safetensors"


def snapshot_tensors(averages: Averages) -> Tensors:
    """Return the content of a snapshot: "LENGTH/NAME" -> the average in float32."""
    return {f"{length:g}/{name}": value.float() for length, own in averages.items() for name, value in own.items()}


def training_of(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a snapshot: what tells trainings of the same network from each other."""
    return {key: str(recipe[key]) for key in ("seed", "data.fingerprint") if key in recipe}


@cache  # a training asks at each step
def exponent(length: float) -> float:
    """Return γ for σ_rel: the largest real root of γ³ + 7γ² + (16 - σ_rel⁻²)γ + 12 - σ_rel⁻² (appendix C)."""
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def relative_length(gamma: float) -> float:
    """Return σ_rel for γ: σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3))."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def update_rate(length: float, step: int) -> float:
    """Return 1 - β of average <- β average + (1 - β) weights at a step t from 1 on: 1 - (1 - 1/t)^(γ + 1)."""
    return 1.0 if step == 1 else -math.expm1((exponent(length) + 1) * math.log1p(-1 / step))


def share_before(length: float, start: int, step: int) -> float:
    """Return the share of the profile that ends at `step` which lies before `start`."""
    return (start / step) ** (exponent(length) + 1)


def longest_from(start: int, step: int) -> float:
    """Return the longest length whose profile at `step` has next to nothing, MAX_SHARE, before `start`."""
    return relative_length(max(0.0, math.log(MAX_SHARE) / math.log(start / step) - 1))


def fit_profile(profiles: Sequence[tuple[float, int]], length: float, step: int) -> tuple[list[float], float]:
    """Return the linear combination of profiles that is nearest to another one in the least-squares sense.

    Args:
        profiles: (σ_rel, step) of each.
        length, step: of the other one.

    Returns:
        A coefficient for each profile, 1 in all, and the error: the L2 norm of the difference, relative to the norm of
        the other profile.
    """
    gamma = np.array([exponent(own) for own, _ in (*profiles, (length, step))])
    t = np.array([own for _, own in (*profiles, (length, step))], np.float64)
    inner = _inner_products(gamma, t)
    norms = np.sqrt(np.diag(inner))
    inner /= norms * norms[:, None]  # to a unit diagonal: early profiles are far higher than late ones
    gram, target = inner[:-1, :-1], inner[:-1, -1]
    x = np.linalg.lstsq(gram, target, rcond=1e-12)[0]
    x /= (x * norms[-1] / norms[:-1]).sum()  # so that weights that stay the same are their own average
    error = math.sqrt(max(0.0, 1 - 2 * x @ target + x @ gram @ x))
    return (x * norms[-1] / norms[:-1]).tolist(), error


def _inner_products(gamma: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return ∫ p_a(τ) p_b(τ) dτ of each two profiles, in a form without large powers (appendix C)."""
    a, t_a, b, t_b = gamma[:, None], t[:, None], gamma, t
    m = np.minimum(t_a, t_b)
    product: np.ndarray = (a + 1) * (b + 1) / (a + b + 1) * (m / t_a) ** a * (m / t_b) ** b * m / (t_a * t_b)
    return product
