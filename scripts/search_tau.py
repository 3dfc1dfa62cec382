"""Search the times of a sampler for a checkpoint: those whose trajectories end nearest to the exact ones.

python scripts/search_tau.py checkpoint=PATH sampler=unipc sampler.S=10
python scripts/search_tau.py --help

The file that it writes is a spacing for any sampler in any script: sampler.spacing=FILE.json with sampler.S=null.
"""

import json
import shlex
from typing import Any

from _cli import entry, pick_device


def main(config: dict[str, Any]) -> None:
    """Search as `config` says; print the errors, the least first, and how to use the file."""
    from ddim.config import build
    from ddim.diffusion.spec import SamplerSpec
    from ddim.inference.search_tau import SearchTauSpec, write_tau

    pick_device(config.get("compute"), "device")
    spec = build(SearchTauSpec, config, "")
    found = write_tau(spec)
    print("root mean square error to the exact trajectories of images that the search saw, and of others:")
    for name, error in sorted(found["errors"].items(), key=lambda item: item[1]["held_out"]):
        print(f"{name:12} {error['search']:10.4g} {error['held_out']:10.4g}")
    print(f"tau: {', '.join(map(str, found['tau']))}")
    print(f"file: {spec.path}")
    usual = SamplerSpec().settings()
    chosen = {key: value for key, value in found["sampler"].items() if value != usual.get(key)}
    chosen |= {"spacing": str(spec.path), "S": None}
    words = [f"sampler.{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in chosen.items()]
    use = [f"checkpoint={spec.checkpoint}", *(word.replace('"', "") for word in words)]
    print(f"sample with it: python scripts/sample.py {shlex.join(use)}")


if __name__ == "__main__":
    entry(main, "search_tau")
