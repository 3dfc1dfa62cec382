import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Run in a process of its own: refuses every package that is neither torch, nor what torch imports, nor Python's own.
PROBE = """
import sys, time
import torch
known = {name.partition(".")[0] for name in sys.modules} | sys.stdlib_module_names | {"ddim"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in known:
            sys.exit(f"import ddim wants {name}")
sys.meta_path.insert(0, Refuse())
start = time.process_time()
import ddim
print(time.process_time() - start)
"""


@pytest.mark.integration
def test_import_ddim_needs_torch_only_and_is_quick() -> None:
    """Processor time, so that a busy machine does not count, and the best of up to three processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    best = 9.9
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        best = min(best, float(done.stdout))
        if best < 0.3:
            break
    assert best < 0.3
