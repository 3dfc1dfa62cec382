"""Stages of a long run: commands under time limits, one after the other, with a summary and a record.

Standard library only: a machine may have nothing else yet.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHORTEST = 5.0  # seconds; a stage that has less is left out
GRACE = 20.0  # seconds that a stage whose time is up has to end
SAVING = 60.0  # seconds that an endless one has to save its work
STOPPED = 75  # exit status of a command that was told to stop, and saved
KEEP_EVERY = 30.0  # seconds between two calls of `keep`


class Stages:
    """Runs commands in the root of the checkout. A stage that fails or is late ends nothing else.

    In `out` are at any moment, so that a run that is cut off brings its results: summary.txt, a line for each stage;
    log.txt, all that they printed; record.jsonl, a JSON line for each stage and check.

    Args:
        out: the folder of the results.
        seconds: for all stages together.
        environment: variables of the commands.
        keep: called while a command runs and after it, to put elsewhere what is done; a machine can be gone any moment.
    """

    def __init__(
        self, out: Path, seconds: float, environment: dict[str, str], keep: Callable[[], None] = lambda: None
    ) -> None:
        self.out, self.end, self.environment, self.keep = out, time.monotonic() + seconds, environment, keep
        self.common: dict[str, Any] = {}  # in every line of the record
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        """Print a text, and add it to the summary."""
        print(text, flush=True)
        with (self.out / "summary.txt").open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def record(self, **fields: Any) -> None:
        """Add a line to the record."""
        with (self.out / "record.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.common | fields, sort_keys=True) + "\n")

    def run(self, name: str, limit: float, *command: str | Path, endless: bool = False) -> bool:
        """Run a command for at most `limit` seconds, and at most those that are left; return whether it went well.

        When its time is up it gets SIGTERM (pytest SIGINT, at which it reports what it has run), and after `GRACE`
        seconds it is killed with all that it started. Of one that is endless it is expected that it then saves its
        work within `SAVING` seconds, and exits with `STOPPED`.
        """
        limit, start = min(limit, self.left), time.monotonic()
        if limit < SHORTEST:
            return self._end(name, "left out", 0.0, "no time left")
        with (self.out / "log.txt").open("ab+") as log:  # the command itself writes to it
            log.write(f"==> {name} <==\n".encode())
            log.flush()
            begin = log.tell()
            try:
                late, status = self._wait([str(word) for word in command], limit, log.fileno(), endless)
            except OSError as error:  # there is no such program
                return self._end(name, "FAILED", time.monotonic() - start, str(error))
            except BaseException:  # Ctrl-C
                self._end(name, "stopped", time.monotonic() - start, "")
                raise
            log.seek(begin)
            lines = log.read().decode(errors="replace").splitlines()
        stopped = "ok, stopped" if endless and status == STOPPED else "late" if late else f"FAILED {status}"
        verdict = "ok" if status == 0 else stopped
        last = next((line for line in reversed(lines) if line.strip()), "")
        return self._end(name, verdict, time.monotonic() - start, last)

    def _wait(self, command: list[str], limit: float, log: int, endless: bool) -> tuple[bool, int]:
        """Return whether the time was up, and the exit status."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return False, self._wait_and_keep(process, limit)
        except subprocess.TimeoutExpired:
            # Not to what it started: it ends that itself.
            process.send_signal(signal.SIGINT if "pytest" in command else signal.SIGTERM)
            try:
                return True, process.wait(SAVING if endless else GRACE)
            except subprocess.TimeoutExpired:
                return True, -signal.SIGKILL
        finally:
            _kill(process.pid)
            process.wait()

    def _wait_and_keep(self, process: "subprocess.Popen[bytes]", limit: float) -> int:
        """Return the exit status; raise subprocess.TimeoutExpired if there is none after `limit` seconds."""
        end = time.monotonic() + limit
        while (left := end - time.monotonic()) > KEEP_EVERY:
            try:
                return process.wait(KEEP_EVERY)
            except subprocess.TimeoutExpired:
                self.keep()
        return process.wait(max(left, 0.0))

    def _end(self, name: str, verdict: str, seconds: float, last: str) -> bool:
        with (self.out / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"\n==> {name}: {verdict}, {seconds:.0f} s <==\n\n")
        self.say(f"{name:<26} {verdict:<12} {seconds:4.0f} s  {last[:150]}".rstrip())
        self.record(what="stage", stage=name, verdict=verdict, seconds=round(seconds, 1))
        good = verdict.startswith("ok")
        self.failed += [] if good else [name]
        self.keep()
        return good


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        return
