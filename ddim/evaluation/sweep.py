"""A sweep over evaluations: the forecast of its cost, and a manifest of the state of each job.

The manifest informs users and the report. Whether a job is computed again is decided by its record and its shards.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from filelock import FileLock, Timeout

from ddim.diffusion.guidance import GuidanceSpec
from ddim.errors import UserError
from ddim.evaluation.job import UNFINISHED, Job, JobSpec, device_name
from ddim.evaluation.session import Session
from ddim.evaluation.shards import Shards
from ddim.inference.compute import ComputeSpec, evaluate_zeros, time_after_warmup
from ddim.io import atomic_write, check_regular_file, partial_files, printable
from ddim.results.records import RecordFile, record_key

log = logging.getLogger(__name__)
T = TypeVar("T")
MANIFEST = "manifest.json"
MAX_BYTES = 1 << 26  # of a manifest
NOT_STARTED = "not started"  # state of a planned job that was refused, such as for a path that does not exist
IMPOSSIBLE = "impossible"  # state of a planned job whose rule cannot do its NFE; it is skipped
JOBS = "cells"  # the key in the file, as earlier versions wrote it
NOT_DECISIVE = ("logger", "grid", "save_images", "reference_dir", "table", "dry_run", "style", "figure")
MOST_WAITING = 0.03  # of the time, that processes have nothing to do
LONG_ENOUGH = 0.3  # seconds, for a timing


def job_id(spec: JobSpec) -> str:
    """Return the name of a job in the manifest: a hash of its configuration, without what decides no number.

    A job that continues with another batch size, or on another device, keeps its name.
    """
    values = dataclasses.asdict(spec)
    if (compute := getattr(spec, "compute", None)) is not None:
        # bf16=None, which leaves it open, is that of before auto.
        values["compute"] = "tf32" if compute.uses_tf32 else bool(compute.bf16)
    # The names of before these options.
    if not values.get("data", {}).get("convert", True):
        del values["data"]["convert"]
    if not values.get("data", {}).get("labels", True):
        del values["data"]["labels"]
    if not values.get("metric", {}).get("bf16", True):
        del values["metric"]["bf16"]
    if values.get("guidance") == dataclasses.asdict(GuidanceSpec()) and values["label"] is None:
        del values["guidance"], values["label"]
    return record_key({key: value for key, value in values.items() if key not in NOT_DECISIVE})


class Manifest:
    """The file manifest.json in the folder of a sweep; several processes may write to it. A single job has none.

    Args:
        folder: of the sweep; made when there is something to write.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST

    def read(self) -> dict[str, Any]:
        """Return {"command": ..., "cells": {id: job}}; a job has title, state (planned, running, ...) and reason.

        Raises:
            UserError: the file is damaged, or no regular file.
        """
        check_regular_file(self.path, "manifest")
        if not self.path.exists():
            return {"command": None, JOBS: {}}
        try:
            if self.path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
            content = json.loads(self.path.read_text(encoding="utf-8"))
            _check_manifest(content)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path} is damaged ({' '.join(str(error).split())}); delete it: it lists which evaluations ran, "
                "their results are in records.jsonl."
            ) from error
        return content

    def plan(self, command: str, specs: Sequence[JobSpec]) -> None:
        """Note what is going to be computed; jobs of earlier sweeps stay."""
        with self._changing() as content:
            content["command"] = command
            content[JOBS] = {name: job for name, job in content[JOBS].items() if job["state"] != NOT_STARTED}
            content[JOBS] |= {job_id(spec): {"title": spec.title, "state": "planned"} for spec in specs}

    def note(self, spec: JobSpec, state: str, reason: str | None = None) -> None:
        """Note that a job is running, done, or failed for a reason; nothing is written where there was no plan.

        One that was planned and could not start is NOT_STARTED until `take_not_started`: it is no result.
        """
        if self.path.exists():
            with self._changing() as content:
                if state == NOT_STARTED and content[JOBS].get(job_id(spec), {}).get("state") != "planned":
                    return
                content[JOBS][job_id(spec)] = {
                    "title": spec.title,
                    "state": state,
                    **({} if reason is None else {"reason": reason}),
                }

    def failures(self) -> list[tuple[str, str]]:
        """Return title and reason of each job whose last attempt failed."""
        return _with_state(self.read(), "failed")

    def impossible(self) -> list[tuple[str, str]]:
        """Return title and reason of each job that was skipped, since its rule cannot do its NFE."""
        return _with_state(self.read(), IMPOSSIBLE)

    def skip(self, spec: JobSpec, reason: str) -> bool:
        """Note that a job is impossible if it was planned, as one of a sweep is; return whether it was."""
        planned = self.read()[JOBS].get(job_id(spec), {}).get("state") == "planned"
        if planned:
            self.note(spec, IMPOSSIBLE, reason)
        return planned

    def take_not_started(self) -> list[tuple[str, str]]:
        """Return title and reason of each planned job that could not start, and forget these jobs."""
        if not (jobs := _with_state(self.read(), NOT_STARTED)):
            return []
        with self._changing() as content:
            content[JOBS] = {name: job for name, job in content[JOBS].items() if job["state"] != NOT_STARTED}
        return jobs

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{MANIFEST}.lock")):
            content = self.read()
            yield content
            with atomic_write(self.path) as partial:
                # What UTF-8 lacks, such as other bytes in a file's name, becomes an escape of JSON.
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def _with_state(content: dict[str, Any], state: str) -> list[tuple[str, str]]:
    return [(job["title"], job.get("reason", "")) for job in content[JOBS].values() if job["state"] == state]


def _check_manifest(content: Any) -> None:
    """Raise ValueError if this is not what `Manifest.read` returns."""
    if not isinstance(content, dict) or not isinstance(content.get(JOBS), dict):
        raise ValueError(f'it has no "{JOBS}"')
    if not isinstance(content.get("command"), str | None):
        raise ValueError('"command" is not text')
    for name, job in content[JOBS].items():
        fields = [job.get(key, "") for key in ("title", "state", "reason")] if isinstance(job, dict) else [None]
        if not all(isinstance(field, str) for field in fields) or not {"title", "state"} <= job.keys():
            raise ValueError(f"the entry {printable(name)} is not understood")


def remove_leftovers(folder: Path, records: RecordFile) -> None:
    """Remove what killed runs left in the folder of a sweep: temporary files, and shards of evaluations with a record.

    Nothing is removed that a living process may be using.
    """
    for shards in (folder / UNFINISHED).glob("[!.]*"):
        if records.find(shards.name):
            Shards(shards, range(0)).delete_unless_locked()
    # Whoever writes a temporary file holds one of these locks, so if they are free afterwards, nobody does.
    folders = [folder, folder / "grids", *(folder / "images").glob("*")]
    leftovers = [path for inner in folders for path in partial_files(inner)]
    locks = [*folder.glob(".*.lock"), *(folder / UNFINISHED).glob(".*.lock")]
    try:
        for path in locks if leftovers else ():
            with FileLock(path, timeout=0):
                continue
    except Timeout as error:
        log.debug("%s: another run is writing there", error)
        return
    for path in leftovers:
        path.unlink(missing_ok=True)


class Timing(NamedTuple):
    """Seconds for one image: of a network evaluation, and of the extraction of its features."""

    network: float
    extraction: float


Timings = dict[tuple[str, ComputeSpec], Timing]  # by model and compute, which most jobs of a sweep share


class Remaining(NamedTuple):
    """The work of a job: images in all and still missing, network evaluations of one image, its timing and batches."""

    images: int
    missing: int
    steps: int
    device: str
    timing: Timing | None
    batch_size: int


def survey(specs: Sequence[JobSpec], session: Session) -> tuple[list[Remaining], list[str]]:
    """Return the work of each job, timed, and a line for each specification that cannot be computed."""
    timings: Timings = {}
    return for_each_job(specs, session, lambda _, job: remaining(job, timings))


def forecast(jobs: Sequence[Remaining], refused: Sequence[str], processes: int) -> list[str]:
    """Return the size of a sweep and the time it is expected to take, as human-readable lines.

    Args:
        jobs, refused: see `survey`. What is refused is named here, and fails when its turn comes.
        processes: that share each job.

    Returns:
        No lines if nothing can be computed.
    """
    if not jobs:
        return []
    total, left = sum(job.images * job.steps for job in jobs), sum(job.missing * job.steps for job in jobs)
    lines = [f"{_count(len(jobs))}, {total:,} network evaluations of one image", *refused]
    if left < total:
        finished, begun = sum(job.missing == 0 for job in jobs), sum(0 < job.missing < job.images for job in jobs)
        lines.append(f"done: {_count(finished)}, and {begun} in part; {left:,} network evaluations are left")
    if left:
        lines.append(_expected([job for job in jobs if job.missing], processes))
        lines += _waiting(jobs, processes)
    return lines


def for_each_job(
    specs: Sequence[JobSpec], session: Session, measure: Callable[[JobSpec, Job], T]
) -> tuple[list[T], list[str]]:
    """Return `measure(spec, job)` of each job, and a line for each specification that cannot be computed.

    One after the other, so that a sweep over checkpoints has one at a time in memory.
    """
    measured: list[T] = []
    refused: list[str] = []
    for spec in specs:
        try:
            measured += [measure(spec, repetition.prepare(session)) for repetition in spec.repetitions]
        except UserError as error:
            refused.append(f"not possible: {spec.title}: {' '.join(str(error).split())}")
    return measured, refused


def outline(specs: Sequence[JobSpec]) -> list[str]:
    """Return the size of a sweep whose jobs are computed elsewhere."""
    known = [spec.network_evaluations for spec in specs if spec.network_evaluations is not None]
    amount = f", {sum(known):,} network evaluations of one image" if len(known) == len(specs) else ""
    return [f"{_count(len(specs))}{amount}; each job reports its own progress"]


def _count(jobs: int) -> str:
    return f"{jobs} job{'' if jobs == 1 else 's'}"


def remaining(job: Job, timings: Timings) -> Remaining:
    """Return the work of a job; its timing is one of `timings`, or becomes one."""
    images = len(job.indices)
    missing = 0 if job.find_record() else images - sum(map(len, job.shards.complete()))
    model = (record_key(job.settings["model"]), job.compute)
    if missing and model not in timings:
        timings[model] = time_job(job)
    return Remaining(images, missing, job.steps, job.compute.device, timings.get(model), job.compute.batch_size)


def _expected(jobs: Sequence[Remaining], processes: int) -> str:
    timed = [(job, job.timing) for job in jobs if job.timing is not None]
    seconds = sum(job.missing * (job.steps * timing.network + timing.extraction) for job, timing in timed)
    job, timing = timed[0]
    share = timing.extraction / (timing.extraction + job.steps * timing.network)
    return (
        f"expected: {timedelta(seconds=round(seconds / processes))} on {processes} x {device_name(job.device)}, at "
        f"{1 / timing.network:,.0f} evaluations/s each"
        + (f" ({share:.0%} for features at {job.steps} steps)" if share >= 0.01 else "")
    )


def _waiting(jobs: Sequence[Remaining], processes: int) -> list[str]:
    """Return a line if processes wait since the batches cannot be shared out evenly, with a size that can."""
    rounds = [math.ceil(job.missing / job.batch_size / processes) * job.batch_size * processes for job in jobs]
    done = sum(job.missing * job.steps for job in jobs)
    waiting = 1 - done / sum(images * job.steps for images, job in zip(rounds, jobs, strict=True))
    if processes == 1 or waiting < MOST_WAITING:
        return []
    job = max(jobs, key=lambda job: job.missing * job.steps)
    share, size = math.ceil(job.missing / processes), job.batch_size
    even = math.ceil(share / math.ceil(share / size))
    exact = [number for number in range(even // 2, even + 1) if number and job.missing % (number * processes) == 0]
    return [
        f"{waiting:.0%} of the time processes wait for the last batches; compute.batch_size={max([*exact, 0]) or even} "
        "gives each the same number of images"
    ]


def time_job(job: Job) -> Timing:
    """Time a network evaluation and the extraction of features, with at most as many images as the job has."""
    model, compute, extractor = job.model, job.compute, job.extractor
    assert model is not None
    largest = min(compute.batch_size, len(job.indices))
    network = seconds_per_image(lambda count: evaluate_zeros(model, compute, count), largest, compute.compiles)
    if extractor is None:
        return Timing(network, 0.0)
    shape = model.spec.image_shape
    extraction = seconds_per_image(
        lambda count: extractor.extract(torch.zeros(count, *shape, dtype=torch.uint8)), largest
    )
    return Timing(network, extraction)


def seconds_per_image(call: Callable[[int], object], largest: int, only_largest: bool = False) -> float:
    """Time calls with 1, 2, 4, ... images until one takes long enough, or only with the largest number."""
    count = largest if only_largest else 1
    while True:
        fitted, seconds = time_after_warmup(call, count)
        if seconds > LONG_ENOUGH or fitted == largest or fitted < count:
            return seconds / fitted
        count = min(2 * count, largest)
