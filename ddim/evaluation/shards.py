"""A long computation over numbered images, kept on the disk batch by batch: it can stop anywhere and go on.

Each batch becomes one file, named by its images, which appears whole or not at all. What is missing is what no file
covers, so a run that goes on, with another batch size or on another number of processes, computes just that.
"""

import fcntl
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from torch import Tensor

from ddim.distributed import SINGLE_PROCESS, Processes
from ddim.errors import UserError
from ddim.inference.batching import in_batches, split
from ddim.io import Tensors, read_safetensors, write_safetensors

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 45  # looks into a folder on the network, in about 100 seconds
NAME = re.compile(r"(\d{10})_(\d{10})\.safetensors")


class Parts:
    """The files of a computation over the images numbered `indices`.

    Args:
        folder: theirs alone; made when the first part comes.
        indices: consecutive numbers.
    """

    def __init__(self, folder: Path, indices: range) -> None:
        self.folder, self.indices = folder, indices

    def done(self) -> list[range]:
        """Return the batches there are, in order and without overlap; a damaged file is removed and said."""
        found, reached = [], self.indices.start
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
            found.append(batch)
            reached = batch.stop
        return found

    def missing(self, batch_size: int) -> list[range]:
        """Return what is not there, in batches that start at multiples of `batch_size` from the first image on."""
        edges = [self.indices.start, *(edge for b in self.done() for edge in (b.start, b.stop)), self.indices.stop]
        gaps = [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
        return [batch for gap in gaps if len(gap) for batch in split(gap, batch_size, self.indices.start)]

    def fill(
        self,
        batch_size: int,
        compute: Callable[[range], Tensors],
        processes: Processes = SINGLE_PROCESS,
        started: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Compute what is missing, each process its share; a batch is written while the next is computed.

        Args:
            batch_size: images at a time.
            compute: maps a batch to named tensors, the rows in the order of its images where there are rows.
            processes: who takes part.
            started: told, before the first batch, how many images this process is going to compute.

        Raises:
            UserError: a batch failed here or in another process. What was done stays.
        """
        batches = processes.run_on_main(lambda: self.missing(batch_size))
        mine = batches[processes.rank :: processes.world_size]
        started(sum(map(len, mine)))
        with processes.barrier(), ThreadPoolExecutor(1) as writer:
            written = None
            for batch, tensors in in_batches(mine, compute):
                if written is not None:
                    written.result()
                written = writer.submit(write_safetensors, self.path(batch), tensors, {})
            if written is not None:
                written.result()
        with processes.barrier():
            self._wait_until_complete()

    def require(self, holds: Callable[[range, Tensors], bool], processes: Processes = SINGLE_PROCESS) -> None:
        """Remove the parts for which `holds(batch, tensors)` is false: of an earlier run that was to keep less."""
        with processes.barrier():
            for batch in self.done() if processes.is_main else []:
                tensors, _ = read_safetensors(self.path(batch))
                if not holds(batch, tensors):
                    self.path(batch).unlink()

    def _wait_until_complete(self) -> None:
        # Another machine's file can take a while to show in a folder on the network.
        for waited in range(PATIENCE):
            if not self.missing(len(self.indices)):
                return
            time.sleep(waited / 10)
        raise UserError(f"{self.folder} lacks what other processes wrote; they must all see the same output folder.")

    def path(self, batch: range) -> Path:
        """Return the file of a batch."""
        return self.folder / f"{batch.start:010d}_{batch.stop:010d}.safetensors"

    def read(self, name: str, processes: Processes = SINGLE_PROCESS) -> Iterator[Tensor]:
        """Yield the tensor `name` of each part, in the order of the images; of several processes, each a share."""
        for batch in self.done()[processes.rank :: processes.world_size]:
            tensors, _ = read_safetensors(self.path(batch))
            yield tensors[name]

    @contextmanager
    def alone(self, processes: Processes = SINGLE_PROCESS, wait: bool = False) -> Iterator[None]:
        """Keep another run from the same parts; the lock goes with the process, however it ends.

        Args:
            processes: of this run.
            wait: for the other run to end, instead of refusing; what it did is there then.

        Raises:
            UserError: another run has it, and there is no waiting.
        """
        lock = None
        with processes.barrier():
            if processes.is_main:
                lock = self._lock(wait)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    def _lock(self, wait: bool) -> IO[str]:
        # Beside the folder and never removed, so that all runs mean the same file.
        path = self.folder.with_name(f".{self.folder.name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.close()
            raise UserError(
                f"another run is computing this cell ({self.folder}); wait for it, or choose another output_dir=..."
            ) from error
        return file

    def delete(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)
