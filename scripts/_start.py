"""What a script does first: signals end it with one line, and any terminal can show its output."""

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from types import FrameType

TRY_AGAIN = 75  # the exit status of a run that was asked to stop and can go on (EX_TEMPFAIL)
STOPPED = 130  # the exit status of a run that Ctrl-C ended (128 + SIGINT)
PROCESS = os.getpid()
COMMAND = "DDIM_COMMAND"  # set in the environment by the command `ddim` (_command.py)


def rank() -> int:
    """Return the rank of this process; 0 for what `check_launch_variables` refuses, so that its reason is shown.

    LOCAL_RANK is set for the processes that Lightning starts, also in an interactive shell of SLURM, which hands its
    SLURM_PROCID on to all of them.
    """
    e = os.environ
    tasks = e.get("SLURM_STEP_NUM_TASKS", "")
    number = (
        e.get("RANK") or (tasks.isdecimal() and int(tasks) > 1 and e.get("SLURM_PROCID")) or e.get("LOCAL_RANK", "0")
    )
    size = e.get("WORLD_SIZE", "1") if e.get("RANK") else str(sys.maxsize)
    return int(number) if number.isdecimal() and size.isdecimal() and int(number) < int(size) else 0


def started_by_lightning() -> bool:
    """Return whether Lightning started this process, beside the one of the command; torchrun sets RANK too."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "RANK" not in os.environ


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """End this process with one line, without cleaning up: files are written so that a kill cannot damage them.

    `ddim.signals` holds signals back while there is something to save; processes of a sweep's jobs may, and end first.
    """
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    text = f"stopped by {name}; what was finished is kept: run the command again, a training with checkpoint=last.\n"
    status = STOPPED if number == signal.SIGINT else TRY_AGAIN
    try:
        if os.getpid() == PROCESS and job_processes():  # not one that it forked
            status = TRY_AGAIN
            end_jobs()
    finally:  # the line and the status come also where ending the jobs failed
        try:
            if os.getpid() == PROCESS and rank() == 0 and multiprocessing.current_process().name == "MainProcess":
                os.write(2, (b"\n" if os.isatty(2) else b"") + text.encode())  # print could wait for itself
        finally:
            os._exit(status)


def job_processes() -> list[BaseProcess]:
    """Return the processes that joblib has started for the jobs of a sweep, hydra/launcher=joblib or box."""
    children = multiprocessing.active_children()  # also those that a thread of joblib has waited for, for ever
    return [process for process in children if type(process).__module__.startswith("joblib.") and exists(process)]


def exists(process: BaseProcess) -> bool:
    """Return whether there is such a process; Windows cannot tell by a signal, where 0 is Ctrl-C."""
    return os.name == "nt" or send(process, 0)


def end_jobs() -> None:
    """Pass SIGTERM on to the processes of jobs, and wait until they have saved and ended; a second Ctrl-C kills them.

    One that has saved takes the next job, so they are told again until they end.
    """
    # When one has ended, a thread of joblib would kill the others, which may still be saving.
    manager = getattr(sys.modules.get("joblib.externals.loky.process_executor"), "_ExecutorManagerThread", None)
    if manager is not None:
        manager.terminate_broken = lambda *_: None
    signal.signal(signal.SIGINT, kill_jobs)
    for number in (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which a process that starts meanwhile would inherit
    while sum(send(process, signal.SIGTERM) for process in job_processes()):  # any() would tell the first alone
        time.sleep(0.2)


def send(process: BaseProcess, number: int) -> bool:
    """Send a signal to a process; return whether it was there: it may have ended, and joblib's thread waited for it."""
    try:
        if process.pid is not None:
            os.kill(process.pid, number)
    except OSError:
        return False
    return process.pid is not None


def kill_jobs(number: int, frame: FrameType | None) -> None:
    """Kill the processes of jobs, and end this one."""
    try:
        for process in job_processes():
            send(process, getattr(signal, "SIGKILL", signal.SIGTERM))
            process.join()
    finally:
        stop_at_once(number, frame)


def begin() -> None:
    """Handle signals that nobody else handles, and write what the terminal cannot show as \\u03b7."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    in_main_thread = threading.current_thread() is threading.main_thread()  # Python allows handlers in no other
    for number in numbers if in_main_thread else []:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop_at_once)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not None, as without a terminal
            stream.reconfigure(errors="backslashreplace")


def typed(text: str) -> str:
    """Return a text that names scripts, with `ddim train` for the path of train.py if this script was started so."""
    return re.sub(r"(python )?\bscripts/(\w+)\.py", r"ddim \2", text) if COMMAND in os.environ else text


begin()
