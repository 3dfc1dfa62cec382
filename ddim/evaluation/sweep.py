"""A sweep: what it is going to cost, and a manifest of how its cells stand, for people and for the next start.

What decides whether a cell is computed again are the records and the parts of unfinished cells, not the manifest.
"""

import dataclasses
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.evaluation.job import Cell, device_name
from ddim.inference.compute import ComputeSpec, evaluate_zeros, time_after_warmup
from ddim.io import atomic_write
from ddim.results.records import record_key

MANIFEST = "manifest.json"
COSMETIC = ("logger", "grid", "save_images", "reference_dir")
LONG_ENOUGH = 0.3  # seconds, for a timing


class CellSpec(Protocol):
    """What a sweep is made of: `EvaluateSpec` or `ReconstructSpec`."""

    name: str
    output_dir: str

    @property
    def title(self) -> str:
        """The cell in a few words."""

    @property
    def evaluations(self) -> int | None:
        """Network evaluations of one image, as far as the numbers asked for tell."""

    @property
    def single(self) -> Sequence[Any]:
        """The same cell on each of its ranges of images."""

    def prepare(self, processes: Processes = SINGLE_PROCESS) -> Cell:
        """Check everything and load what is needed."""


def job_id(spec: CellSpec) -> str:
    """Return what a cell is called in the manifest: a hash of its configuration, but for what decides no number.

    So a cell that goes on with another batch size, or on another device, is the one that failed before.
    """
    values = dataclasses.asdict(spec)  # type: ignore[call-overload]
    values["compute"] = values["compute"]["bf16"]
    return record_key({key: value for key, value in values.items() if key not in COSMETIC})


class Manifest:
    """The file manifest.json of a sweep's folder; several processes may write to it. A cell alone has none.

    Args:
        folder: of the sweep; made when there is something to write.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST

    def read(self) -> dict[str, Any]:
        """Return {"command": ..., "cells": {id: cell}}; a cell has title, state (planned, running, ...) and reason."""
        return json.loads(self.path.read_text()) if self.path.exists() else {"command": None, "cells": {}}

    def plan(self, command: str, specs: Sequence[CellSpec]) -> None:
        """Note what is going to be computed; cells of earlier sweeps stay."""
        with self._changing() as content:
            content["command"] = command
            content["cells"] |= {job_id(spec): {"title": spec.title, "state": "planned"} for spec in specs}

    def note(self, spec: CellSpec, state: str, reason: str | None = None) -> None:
        """Note that a cell is running, done, or failed for a reason; nothing where there was no plan."""
        if self.path.exists():
            with self._changing() as content:
                content["cells"][job_id(spec)] = {
                    "title": spec.title,
                    "state": state,
                    **({} if reason is None else {"reason": reason}),
                }

    def failures(self) -> list[tuple[str, str]]:
        """Return title and reason of each cell that failed when it was last tried."""
        cells = self.read()["cells"].values()
        return [(cell["title"], cell["reason"]) for cell in cells if cell["state"] == "failed"]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{MANIFEST}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self.read()
            yield content
            with atomic_write(self.path) as partial:
                partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def forecast(specs: Sequence[CellSpec], processes: Processes = SINGLE_PROCESS) -> list[str]:
    """Return, in lines for people, what a sweep is and how long it will take; a short timing tells.

    Cells that cannot be computed are named here, and fail when their turn comes; no lines if none can.
    """
    lines: list[str] = []
    cells: list[_Outlook] = []
    paces: dict[tuple[str, ComputeSpec], Pace] = {}  # by model and how it is run, as most cells of a sweep share theirs
    for spec in specs:
        try:
            # One after the other, so that a sweep over checkpoints has one at a time in memory.
            cells += [_look_ahead(single.prepare(processes), paces) for single in spec.single]
        except UserError as error:
            lines.append(f"not possible: {spec.title}: {' '.join(str(error).split())}")
    if not cells:
        return []
    total, left = sum(c.images * c.steps for c in cells), sum(c.missing * c.steps for c in cells)
    lines.insert(0, f"{len(cells)} cells, {total:,} network evaluations of one image")
    if left < total:
        finished, begun = sum(c.missing == 0 for c in cells), sum(0 < c.missing < c.images for c in cells)
        lines.append(f"done: {finished} cells, and {begun} in part; {left:,} network evaluations are left")
    if left:
        lines.append(_expected([cell for cell in cells if cell.missing], processes))
    return lines


def outline(specs: Sequence[CellSpec]) -> list[str]:
    """Return what a sweep is when its cells are computed elsewhere."""
    known = [spec.evaluations for spec in specs if spec.evaluations is not None]
    amount = f", {sum(known):,} network evaluations of one image" if len(known) == len(specs) else ""
    return [f"{len(specs)} cells{amount}; each job says its own progress"]


class Pace(NamedTuple):
    """Seconds for one image: of a network evaluation, and of what is done with the image in the end."""

    evaluation: float
    look: float


class _Outlook(NamedTuple):
    """What is known of a cell beforehand: images in all and still to be made, network evaluations of one, and pace."""

    images: int
    missing: int
    steps: int
    device: str
    pace: Pace | None


def _look_ahead(cell: Cell, paces: dict[tuple[str, ComputeSpec], Pace]) -> _Outlook:
    images = len(cell.indices)
    missing = 0 if cell.find() else images - sum(map(len, cell.parts.done()))
    model = (record_key(cell.identity["model"]), cell.compute)
    if missing and model not in paces:
        paces[model] = _pace(cell)
    return _Outlook(images, missing, cell.steps, cell.compute.device, paces.get(model))


def _expected(cells: Sequence[_Outlook], processes: Processes) -> str:
    timed = [(cell, cell.pace) for cell in cells if cell.pace is not None]
    seconds = sum(cell.missing * (cell.steps * pace.evaluation + pace.look) for cell, pace in timed)
    cell, pace = timed[0]
    share = pace.look / (pace.look + cell.steps * pace.evaluation)
    return (
        f"expected: {timedelta(seconds=round(seconds / processes.world_size))} on {processes.world_size} x "
        f"{device_name(cell.device)}, at {1 / pace.evaluation:,.0f} evaluations/s each"
        + (f" ({share:.0%} for features at {cell.steps} steps)" if share >= 0.01 else "")
    )


def _pace(cell: Cell) -> Pace:
    compute, look = cell.compute, cell.look
    largest = min(compute.batch_size, len(cell.indices))
    network = _seconds_per_image(
        lambda count: evaluate_zeros(cell.model, compute, count), largest, at_once=compute.compile or compute.graphs
    )
    if look is None:
        return Pace(network, 0.0)
    shape = cell.model.spec.image_shape
    looking = _seconds_per_image(lambda count: look(torch.zeros(count, *shape, dtype=torch.uint8)), largest)
    return Pace(network, looking)


def _seconds_per_image(call: Callable[[int], object], largest: int, at_once: bool = False) -> float:
    """Time calls with 1, 2, 4, ... images until one takes long enough, or with the largest number at once."""
    count = largest if at_once else 1
    while True:
        fitted, took = time_after_warmup(call, count)
        if took > LONG_ENOUGH or fitted == largest or fitted < count:
            return took / fitted
        count = min(2 * count, largest)
