"""The processes of one evaluation: a single one, or several that torchrun or SLURM started together.

What they compute is divided by image numbers (`ddim.evaluation.shards`), so they communicate rarely: at the start and
the end of a piece of work, over gloo. All of them must see the same output folder.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ddim.errors import Disconnected, PeerFailed, UserError

T = TypeVar("T")
# What torchrun, SLURM and others tell a process; Lightning reads them too.
NUMBERS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"),
    "SLURM_RESTART_COUNT",
    "JSM_NAMESPACE_RANK",
)
TIMEOUT = timedelta(days=7)  # the slowest process may take long; the launcher notices a dead one
JOIN_TIMEOUT = timedelta(minutes=20)  # until all have started
_PEER = re.compile(r"connection|peer|broken pipe|timed out|socket", re.IGNORECASE)  # in the errors of gloo
_group: Any = None  # of the processes that `join_process_group` connected


@dataclass(frozen=True)
class Processes:
    """This process among those of the evaluation.

    Attributes:
        rank: number of this process, 0 .. world_size - 1.
        world_size: how many there are.
        local_rank: number of this process on its machine.
        group: that connects them; None is the default group.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: distributed.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes records and prints."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return the value that rank 0 has."""
        if self.world_size == 1:
            return value
        values = [value]
        with _explain_disconnection():
            distributed.broadcast_object_list(values, group=self.group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _explain_disconnection():
            distributed.all_gather_object(values, value, group=self.group)
        return values

    def check_same(self, value: str) -> None:
        """Check that a text is the same in all processes: what identifies the work that they are going to share.

        Raises:
            UserError: it is not.
        """
        if len({*self.gather(value)}) > 1:
            raise UserError(
                "the processes would not compute the same: they loaded different weights, as while a training writes "
                "new ones, chose other settings on different devices, read other reference images or have other "
                "packages; give a checkpoint that stays, compute.bf16=true or false, and the same data and environment."
            )

    def run_on_main(self, call: Callable[[], T]) -> T:
        """Return what `call` returns on rank 0, the only one that calls it.

        Raises:
            UserError: it failed there, and this is another process.
        """
        result = failure = reason = None
        if self.is_main:
            try:
                result = call()
            except Exception as error:
                failure, reason = error, _describe(error)
        result, reason = self.broadcast((result, reason))
        if failure is not None:
            raise failure
        self._check([reason])
        return result  # type: ignore[return-value]

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes, on the CPU."""
        values = values.cpu()
        if self.world_size > 1:
            with _explain_disconnection():
                distributed.all_reduce(values, group=self.group)
        return values

    @contextmanager
    def barrier(self) -> Iterator[None]:
        """Wait at the end of the block for all processes; a failure of one in the block is a failure of all.

        Raises:
            UserError: the block failed in another process.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if not self.sum(torch.tensor(int(failure is not None))):  # a single message where all is well
            return
        reasons = self.gather(None if failure is None else _describe(failure))
        if failure is not None:
            raise failure
        self._check(reasons)

    def _check(self, reasons: list[str | None]) -> None:
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise PeerFailed(f"process {rank} of {self.world_size} failed ({reason}).")

    def local_device(self, device: str) -> str:
        """Return the device of this process: of "cuda", the one whose number is the local rank."""
        named = torch.device(device)
        if self.world_size == 1 or named.type == "cpu" or named.index is not None:
            return device
        return f"{named.type}:{self.local_rank % max(1, torch.get_device_module(named.type).device_count())}"


SINGLE_PROCESS = Processes()


@contextmanager
def _explain_disconnection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _PEER.search(str(error)):
            raise
        raise Disconnected(
            f"another process of this command has ended, or cannot be reached ({str(error).splitlines()[0]}); what was "
            "finished is kept: see what that one printed, and run the command again."
        ) from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def training_processes(rank: int, world_size: int, local_rank: int) -> Processes:
    """Return this process among those of a training, which a backend may connect that knows no tensors of the CPU.

    All of them must call this together.
    """
    group: Any = distributed.new_group(backend="gloo", timeout=TIMEOUT) if world_size > 1 else None
    return Processes(rank, world_size, local_rank, group)


def launched_processes() -> Processes:
    """Return this process among those that torchrun or srun started, which need not be connected."""
    return _launched_processes()[1]


def join_process_group() -> Processes:
    """Return this process among those it was started with; the first call connects them.

    Raises:
        UserError: the other processes cannot be reached.
    """
    global _group
    address, here = _launched_processes()
    if here.world_size > 1 and not distributed.is_initialized():
        try:
            distributed.init_process_group(
                "gloo", init_method=address, rank=here.rank, world_size=here.world_size, timeout=JOIN_TIMEOUT
            )
            _group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"process {here.rank} of {here.world_size} cannot reach the others at {address} "
                f"({str(error).splitlines()[0]}); start all of them with torchrun or srun."
            ) from error
    return replace(here, group=_group) if here.world_size > 1 else here


def check_launch_variables() -> None:
    """Check what the launcher tells this process in its environment.

    Raises:
        UserError: a variable is no number, or out of range.
    """
    e = os.environ
    advice = "unset it, or start all processes with torchrun or srun."
    for name in NUMBERS:
        if name in e and not (e[name].isascii() and e[name].isdigit() and len(e[name]) < 19):
            raise UserError(f"the environment variable {name}={e[name]!r} must be an integer, at least 0; {advice}")
    if int(e.get("RANK", 0)) >= int(e.get("WORLD_SIZE", 1)):
        raise UserError(
            f"the environment variable RANK={e.get('RANK', 0)} must be less than "
            f"WORLD_SIZE={e.get('WORLD_SIZE', 'unset')}; {advice}"
        )
    if int(e.get("MASTER_PORT", 1)) not in range(1, 1 << 16):
        raise UserError(f"the environment variable MASTER_PORT={e['MASTER_PORT']} must lie in 1 .. 65535; {advice}")


def is_restarted() -> bool:
    """Return whether SLURM has started this job before: it was requeued, with the same command."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def _launched_processes() -> tuple[str, Processes]:
    check_launch_variables()
    e = os.environ
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= e.keys():  # torchrun
        return "env://", Processes(int(e["RANK"]), int(e["WORLD_SIZE"]), int(e.get("LOCAL_RANK", 0)))
    # Of this step of the job: the script of a job has SLURM_NTASKS too, though it runs once.
    if int(e.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        try:
            slurm = SLURMEnvironment()
        except RuntimeError as error:  # it wants --ntasks-per-node
            raise UserError(" ".join(str(error).split())) from error
        here = Processes(slurm.global_rank(), int(e["SLURM_STEP_NUM_TASKS"]), slurm.local_rank())
        return f"tcp://{slurm.main_address}:{slurm.main_port}", here
    return "", SINGLE_PROCESS
