"""A computation over numbered images, stored batch by batch, so that it can stop anywhere and continue.

Each batch becomes one file, a shard, named by its images and written atomically. An image is missing if no shard
covers it: a run that continues, with another batch size or number of processes, computes exactly the missing ones.
"""

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.inference.batching import split
from ddim.io import Tensors, read_safetensors, write_safetensors
from ddim.results.records import code_revision
from ddim.signals import StopSignals

log = logging.getLogger(__name__)
Stored = Tensors | Callable[[], Tensors]  # of a batch: the tensors, or what computes them
MAX_CHECKS = 45  # of a folder on the network, in about 100 seconds
REVISION = "revision"  # the entry of a shard that states the code that computed it
NAME = re.compile(r"(\d{10})_(\d{10})\.safetensors")


class Occupied(UserError):
    """Another run holds the lock of these shards."""

    failed = False  # the evaluation counts as unfinished, since it goes on in that run


class Shards:
    """The stored batches of a computation over the images numbered `indices`.

    Args:
        folder: for these shards only; made when the first is written.
        indices: consecutive numbers.
    """

    def __init__(self, folder: Path, indices: range) -> None:
        self.folder, self.indices = folder, indices

    def complete(self) -> list[range]:
        """Return the stored batches, in order and without overlap; a damaged file is removed, with a warning."""
        batches, reached = [], self.indices.start
        for path in sorted(self.folder.glob("*.safetensors")):
            if (name := NAME.fullmatch(path.name)) is None:
                continue
            batch = range(int(name[1]), int(name[2]))
            if batch.start < reached or batch.stop > self.indices.stop:
                continue
            try:
                read_safetensors(path)
            except UserError as error:
                log.warning("%s; its images are computed again.", str(error).rstrip("."))
                path.unlink(missing_ok=True)
                continue
            batches.append(batch)
            reached = batch.stop
        return batches

    def missing(self, batch_size: int, processes: Processes = SINGLE_PROCESS) -> list[range]:
        """Return this process's share of the missing images.

        Batches start at multiples of `batch_size` from the first image on.
        """
        return processes.run_on_main(lambda: self._missing(batch_size))[processes.rank :: processes.world_size]

    def _missing(self, batch_size: int) -> list[range]:
        stored = self.complete()
        edges = [self.indices.start, *(edge for b in stored for edge in (b.start, b.stop)), self.indices.stop]
        gaps = [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        return [batch for gap in gaps if len(gap) for batch in split(gap, batch_size, self.indices.start)]

    @contextmanager
    def writer(self, processes: Processes = SINGLE_PROCESS) -> Iterator[Callable[[range, Stored], None]]:
        """Give `write(batch, tensors)`, which stores a batch while the caller computes the next one.

        Tensors with rows have one for each image, in order; a function that returns them is called meanwhile, in a
        thread. After the block the shards of all processes are complete. A signal to stop waits until the batch that
        is being computed is stored.

        Raises:
            UserError: the block failed in another process. What was stored stays.
        """
        pending: Future[None] | None = None
        made_by = {REVISION: code_revision()}

        def store(batch: range, tensors: Stored) -> None:
            write_safetensors(self.path(batch), tensors() if callable(tensors) else tensors, made_by)

        def write(batch: range, tensors: Stored) -> None:
            nonlocal pending
            if pending is not None:
                pending.result()
            pending = pool.submit(store, batch, tensors)
            if stop.received is not None:
                pending.result()
                stop.deliver()

        with StopSignals() as stop, processes.barrier(), ThreadPoolExecutor(1) as pool:
            yield write
            if pending is not None:
                pending.result()
            stop.deliver()
        with processes.barrier():
            self._wait_until_complete()

    def discard_unless(self, suffices: Callable[[range, Tensors], bool], processes: Processes = SINGLE_PROCESS) -> None:
        """Remove the shards for which `suffices(batch, tensors)` is false, such as those with fewer images to show."""
        with processes.barrier():
            for batch in self.complete() if processes.is_main else []:
                tensors, _ = read_safetensors(self.path(batch))
                if not suffices(batch, tensors):
                    self.path(batch).unlink()

    def _wait_until_complete(self) -> None:
        # A file of another machine can take a while to appear in a folder on the network.
        for checks in range(MAX_CHECKS):
            if not self._missing(len(self.indices)):
                return
            time.sleep(checks / 10)
        raise UserError(f"{self.folder} lacks what other processes wrote; they must all see the same output folder.")

    def path(self, batch: range) -> Path:
        """Return the file of a batch."""
        return self.folder / f"{batch.start:010d}_{batch.stop:010d}.safetensors"

    def other_revisions(self) -> list[str]:
        """Return the code revisions, other than that of this code, that computed stored batches."""
        made_by = {read_safetensors(self.path(batch))[1].get(REVISION, "unknown") for batch in self.complete()}
        return sorted(made_by - {code_revision()})

    def warn_of_other_code(self, title: str) -> None:
        """Warn where stored batches are of another code revision."""
        if others := self.other_revisions():
            log.warning(
                "%s: a part of it was computed by the code of %s and stays as it is; to compute all of it by "
                "this code, remove %s.",
                title,
                ", ".join(others),
                self.folder,
            )

    def read(self, name: str, processes: Processes = SINGLE_PROCESS) -> Iterator[Tensor]:
        """Yield the tensor `name` of each shard, in the order of the images; of several processes, each its share."""
        for batch in self.complete()[processes.rank :: processes.world_size]:
            tensors, _ = read_safetensors(self.path(batch))
            yield tensors[name]

    def read_all(self, name: str) -> Tensor:
        """Return the tensor `name` of all shards, concatenated."""
        return torch.cat([*self.read(name)])

    @contextmanager
    def lock(self, processes: Processes = SINGLE_PROCESS, wait: bool = False) -> Iterator[None]:
        """Keep other runs from the same shards; the lock ends with the process, however that ends.

        Args:
            processes: of this run.
            wait: for the other run to end, instead of refusing.

        Raises:
            Occupied: another run holds the lock, and `wait` is false.
        """
        # Next to the folder and never removed, so that all runs lock the same file.
        lock = FileLock(self.folder.with_name(f".{self.folder.name}.lock"), timeout=-1 if wait else 0)
        with processes.barrier():
            if processes.is_main:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire()
                except Timeout as error:
                    raise Occupied(
                        f"another run is computing this evaluation ({self.folder}); wait for it, or choose another "
                        "output_dir=..."
                    ) from error
        try:
            yield
        finally:
            lock.release()

    def delete(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def delete_unless_locked(self) -> None:
        """Remove the files, unless another run may still be using them."""
        try:
            with self.lock():
                self.delete()
        except Occupied as error:
            log.debug("%s", error)
