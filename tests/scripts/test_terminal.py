"""What a training shows on a terminal: a bar below its log lines, also where it goes on."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
SMALL = (
    "experiment=digits",
    "network.ch=16",
    "network.num_groups=4",
    "trainer.batch_size=16",
    "grid.every=0",
    "eval.every=0",
)

pytestmark = pytest.mark.integration


def on_a_terminal(folder: Path, *words: str) -> list[str]:
    """Run a training on a pseudo-terminal; return what was shown, cut at each return and new line."""
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (40, 120))
    command = [sys.executable, str(TRAIN), *SMALL, *words, "output_dir=run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    shown = b""
    try:
        while chunk := os.read(outer, 1 << 16):
            shown += chunk
    except OSError:  # Linux's end of a terminal that nobody writes to
        pass
    assert process.wait() == 0, shown
    os.close(outer)
    return re.split(r"[\r\n]+|\x1b\[A", shown.decode())


@pytest.mark.slow
def test_log_lines_and_the_bar_have_lines_of_their_own(tmp_path: Path) -> None:
    for steps, words in ((60, ()), (90, ("checkpoint=last",))):
        lines = on_a_terminal(tmp_path, f"trainer.max_steps={steps}", "trainer.log_every=15", *words)
        bars = [line for line in lines if "training:" in line]
        start = 60 if words else 0
        assert re.fullmatch(rf"training: +\d+%\|.*\| {start}/{steps} steps \[00:00<.*\]", bars[0].strip()), bars
        assert f"| {steps}/{steps} steps [" in bars[-1]
        assert all(line.startswith("training:") and "INFO" not in line for line in bars), bars
        logged = [line for line in lines if "images/s, 0:" in line]
        assert len(logged) == (steps - start) // 15
        assert all(line.startswith("[") for line in logged), logged
