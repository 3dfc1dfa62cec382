"""Signals are held back while work is saved, and end a script with one line everywhere else."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddim.signals import STOP_SIGNALS, StopSignals

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Stopped(Exception):
    """Raised by the handler of before the block."""


@pytest.fixture(autouse=True)
def outside() -> Iterator[None]:
    """Handlers of before the block that raise, and those of pytest afterwards."""

    def stop(number: int, _: Any) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_held_back_until_it_is_delivered(number: int) -> None:
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        assert stop.received == number
        with pytest.raises(Stopped, match=str(int(number))):
            stop.deliver()
    with pytest.raises(Stopped):  # the handlers are those of before
        os.kill(os.getpid(), number)
    with StopSignals() as stop:
        stop.deliver()  # nothing to deliver


def test_a_second_interrupt_stops_at_once() -> None:
    told: list[None] = []
    with StopSignals() as stop:
        stop.forward = lambda: told.append(None)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert (stop.received, len(told)) == (signal.SIGTERM, 1)
        with pytest.raises(Stopped, match="2"):
            os.kill(os.getpid(), signal.SIGINT)


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells do for jobs in the background
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is None


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code", "name"), [(2, 130, "Ctrl-C"), (15, 75, "SIGTERM"), (10, 75, "SIGUSR1")])
def test_a_script_ends_with_one_line(number: int, code: int, name: str) -> None:
    program = "import _start, atexit, sys; atexit.register(sys.stdin.read); print('η', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "PYTHONIOENCODING": "ascii"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "\\u03b7\n"  # what the terminal cannot show
    for _ in range(3):
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    [line] = err.splitlines()
    assert line.startswith(f"stopped by {name}; what was finished is kept: run the command again")
