"""Memory does not grow with the number of images or of steps."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
MEASURE = """
import resource, runpy, sys
sys.path.insert(0, sys.argv.pop(1))
del sys.argv[0]  # "-c"
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""

pytestmark = pytest.mark.integration


def arguments(checkpoint: Path, n: int, S: int) -> list[str]:
    options = ["data=digits", "metric=digits_classifier", "compute.device=cpu", "compute.batch_size=50", "grid=0"]
    return [
        *options,
        f"checkpoint={checkpoint}",
        f"n={n}",
        f"sampler.S={S}",
        f"output_dir=n{n}_S{S}",
        "reference_dir=r",
    ]


def peak(checkpoint: Path, folder: Path, n: int, S: int) -> int:
    """Return the largest memory of an evaluation, in KiB."""
    script = str(SCRIPTS / "evaluate.py")
    command = [sys.executable, "-c", MEASURE, str(SCRIPTS), script, *arguments(checkpoint, n, S)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_the_peak_does_not_grow_with_images_or_steps(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    assert run("evaluate", *arguments(checkpoint, 50, 2)).code == 0  # measures the reference set
    base = peak(checkpoint, tmp_path, 250, 3)
    assert peak(checkpoint, tmp_path, 1000, 3) < 1.05 * base
    assert peak(checkpoint, tmp_path, 250, 15) < 1.02 * base
