"""A sweep: what it is going to cost, and a manifest of how its cells stand, for people and for the next start.

What decides whether a cell is computed again are the records and the parts of unfinished cells, not the manifest.
"""

import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from ddim.errors import UserError
from ddim.evaluation.generate import autocast
from ddim.evaluation.processes import SOLO, Processes
from ddim.evaluation.records import record_key
from ddim.evaluation.work import Cell, device_name
from ddim.files import whole

MANIFEST = "manifest.json"
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

    def prepare(self, processes: Processes = SOLO) -> Cell:
        """Check everything and load what is needed."""


def cell_id(spec: CellSpec) -> str:
    """Return what a cell is called in the manifest: a hash of its configuration, but for where it is logged."""
    values = dataclasses.asdict(spec)  # type: ignore[call-overload]
    return record_key({key: value for key, value in values.items() if key != "logger"})


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
            content["cells"] |= {cell_id(spec): {"title": spec.title, "state": "planned"} for spec in specs}

    def note(self, spec: CellSpec, state: str, reason: str | None = None) -> None:
        """Note that a cell is running, done, or failed for a reason; nothing where there was no plan."""
        if self.path.exists():
            with self._changing() as content:
                content["cells"][cell_id(spec)] = {
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
            with whole(self.path) as partial:
                partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def forecast(specs: Sequence[CellSpec], processes: Processes = SOLO) -> list[str]:
    """Return, in lines for people, what a sweep is and how long it will take; a short timing tells.

    Cells that cannot be computed are named here, and fail when their turn comes; no lines if none can.
    """
    cells, lines = [], []
    for spec in specs:
        try:
            cells += [single.prepare(processes) for single in spec.single]
        except UserError as error:
            lines.append(f"not possible: {spec.title}: {' '.join(str(error).split())}")
    if not cells:
        return []
    missing = [_missing(cell) for cell in cells]
    total, left = (sum(n * c.steps for n, c in zip(ns, cells, strict=True)) for ns in (map(_size, cells), missing))
    finished = sum(n == 0 for n in missing)
    begun = sum(0 < n < len(c.indices) for n, c in zip(missing, cells, strict=True))
    lines.insert(0, f"{len(cells)} cells, {total:,} network evaluations of one image")
    if left < total:
        lines.append(f"done: {finished} cells, and {begun} in part; {left:,} network evaluations are left")
    if left:
        lines.append(_expected(cells, missing, processes))
    return lines


def outline(specs: Sequence[CellSpec]) -> list[str]:
    """Return what a sweep is when its cells are computed elsewhere."""
    known = [spec.evaluations for spec in specs if spec.evaluations is not None]
    amount = f", {sum(known):,} network evaluations of one image" if len(known) == len(specs) else ""
    return [f"{len(specs)} cells{amount}; each job says its own progress"]


def _size(cell: Cell) -> int:
    return len(cell.indices)


def _missing(cell: Cell) -> int:
    """Return how many images of a cell are still to be made."""
    return 0 if cell.find() else len(cell.indices) - sum(map(len, cell.parts.done()))


def _expected(cells: Sequence[Cell], missing: Sequence[int], processes: Processes) -> str:
    paces: dict[int, tuple[float, float]] = {}  # by model, as all cells of a sweep mostly share theirs
    seconds = 0.0
    for cell, images in zip(cells, missing, strict=True):
        if not images:
            continue
        if id(cell.model) not in paces:
            paces[id(cell.model)] = _pace(cell)
        evaluation, look = paces[id(cell.model)]
        seconds += images * (cell.steps * evaluation + look)
    evaluation, look = next(iter(paces.values()))
    share = look / (look + cells[0].steps * evaluation)
    return (
        f"expected: {timedelta(seconds=round(seconds / processes.world_size))} on {processes.world_size} x "
        f"{device_name(cells[0].compute.device)}, at {1 / evaluation:,.0f} evaluations/s each"
        + (f" ({share:.0%} for features at {cells[0].steps} steps)" if share >= 0.01 else "")
    )


def _pace(cell: Cell) -> tuple[float, float]:
    """Return seconds for one image: of a network evaluation, and of what is done with the image in the end."""
    shape, compute = cell.model.spec.image_shape, cell.compute

    @torch.inference_mode()
    def evaluate(count: int) -> None:
        x = torch.zeros(count, *shape, device=compute.device)
        with autocast(compute):
            cell.model(x, torch.ones(count, dtype=torch.int64, device=compute.device)).cpu()

    look = cell.look
    largest = min(compute.batch_size, len(cell.indices))
    network = _seconds_per_image(evaluate, largest, at_once=compute.compile)
    if look is None:
        return network, 0.0
    return network, _seconds_per_image(lambda count: look(torch.zeros(count, *shape, dtype=torch.uint8)), largest)


def _seconds_per_image(call: Callable[[int], object], largest: int, at_once: bool = False) -> float:
    """Time calls with 1, 2, 4, ... images until one takes long enough, or with the largest number at once."""
    count = largest if at_once else 1
    call(count)  # compiles and allocates
    while True:
        start = time.perf_counter()
        call(count)
        took = time.perf_counter() - start
        if took > LONG_ENOUGH or count == largest:
            return took / count
        count = min(2 * count, largest)
