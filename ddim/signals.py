"""Signals that ask to stop, held back while work is saved."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from ddim.errors import Disconnected

# Ctrl-C, and what schedulers send some time before they kill; Windows has no SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopSignals:
    """Holds signals to stop back in its `with` block, which reads `received`, saves its work and ends.

    A second Ctrl-C is not held back: the handler of before the block gets it. Signals that are ignored stay ignored,
    and outside the main thread, where Python allows no handlers, nothing changes.

    Attributes:
        received: number of the first signal to this process; None for none.
        forward: called at the first signal, to tell other processes.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.forward: Callable[[], None] | None = None
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, Disconnected):
            self.deliver()  # the same signal may have ended the other process first
        self._restore()

    def listen(self) -> None:
        """Handle the signals in this process; needed again in one that was spawned inside the block."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            # None: a handler that is not Python's, which cannot be restored.
            if signal.getsignal(number) not in (self._on_signal, signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._on_signal)

    def deliver(self) -> None:
        """Let the signal that was held back, if there is one, have the effect that it has outside the block."""
        if self.received is not None:
            self._restore()
            signal.raise_signal(self.received)

    def _restore(self) -> None:
        for number in list(self._before):
            signal.signal(number, self._before.pop(number))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            self._restore()
            signal.raise_signal(number)
        elif self.received is None:
            self.received = number
            if self.forward is not None:
                self.forward()


def ignore_stop_signals(_: int) -> None:
    """Ignore them in a worker process of a DataLoader, as its `worker_init_fn`.

    A signal to a group of processes reaches the workers too. The process that trains ends them when it has saved; with
    one that died, it cannot read the rest of its step.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
