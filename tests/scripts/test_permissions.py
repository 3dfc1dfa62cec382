"""Folders without the permission to write, one line, exit status 2, nothing lost."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddim.checkpoints.model import read_checkpoint

TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"
SMALL = [
    "experiment=digits",
    "network.ch=16",
    "network.num_groups=4",
    "trainer.batch_size=8",
    "trainer.checkpoint_every=5",
    "trainer.max_steps=100000",
    "grid.every=0",
]

pytestmark = pytest.mark.integration


@pytest.fixture
def start(tmp_path):
    """start(*arguments): train as somebody whom permissions bind, which they do not bind root."""
    bound = []
    if os.geteuid() == 0:
        bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        if not shutil.which("setpriv") or subprocess.run([*bound, "true"], capture_output=True).returncode:
            pytest.skip("this root cannot give up writing everywhere")

    def start(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*bound, sys.executable, TRAIN, *SMALL, *arguments]
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    return start


def error(process):
    """Return the one line that a command ends with."""
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 2, printed
    (line,) = [line for line in printed.splitlines() if line]
    return line


def test_a_folder_without_permission_is_one_line(start, tmp_path):
    (tmp_path / "run").mkdir(mode=0o555)
    line = error(start("output_dir=run"))
    assert line.startswith("error: cannot write to ")
    assert line.endswith(" (Permission denied); choose another output_dir=...")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_becomes_read_only_keeps_checkpoints(start, tmp_path):
    process, folder = start("output_dir=run"), tmp_path / "run" / "checkpoints"
    end = time.monotonic() + 120
    while not (folder / "last.ckpt").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    folder.chmod(0o555)
    line = error(process)
    assert line.startswith("error: ")
    assert "run/checkpoints/" in line
    assert "cannot be written (Permission denied); the checkpoints before are intact. Make the folder writable" in line
    steps = [read_checkpoint(path)["global_step"] for path in sorted(folder.glob("step_*"))]
    assert steps[-1] >= read_checkpoint(folder / "last.ckpt")["global_step"] >= 5
    line = error(start("output_dir=run", "checkpoint=last"))
    assert line == "error: cannot write to run/checkpoints (Permission denied); choose another output_dir."
