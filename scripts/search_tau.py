"""Search the times of a sampler for a checkpoint: those whose trajectories end nearest to the exact ones.

python scripts/search_tau.py checkpoint=PATH sampler=unipc sampler.S=10
python scripts/search_tau.py --help

The file that it writes is a spacing for any sampler in any script: sampler.spacing=FILE.json with sampler.S=null.
"""

import json
from typing import Any

from _cli import entry, pick_device
from _last_words import of_model, shell_command


def main(config: dict[str, Any]) -> None:
    """Search as `config` says; print the errors, the least first, and how to use the file."""
    from ddim.config import build
    from ddim.diffusion.spec import SamplerSpec
    from ddim.inference.search_tau import SearchTauSpec, write_tau

    pick_device(config.get("compute"), "device", without_float64=True)
    spec = build(SearchTauSpec, config, "")
    result = write_tau(spec)
    print("root mean square error to the exact trajectories of images that the search saw, and of others:")
    for name, error in sorted(result["errors"].items(), key=lambda item: item[1]["held_out"]):
        print(f"{name:12} {error['search']:10.4g} {error['held_out']:10.4g}")
    print(f"tau: {', '.join(map(str, result['tau']))}")
    print(f"file: {spec.path}")
    usual, chosen = SamplerSpec().settings(), result["sampler"]
    values = {f"sampler.{key}": value for key, value in chosen.items() if key != "kwargs" and value != usual.get(key)}
    if chosen.get("kwargs"):
        listed = ", ".join(f"{key}: {json.dumps(value)}" for key, value in chosen["kwargs"].items())
        values["sampler.kwargs"] = f"{{{listed}}}"
    values |= {"sampler.spacing": str(spec.path), "sampler.S": None}
    words = [f"{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in values.items()]
    command = shell_command("sample", *of_model(spec), *words)
    print(f"sample with it: {command}")


if __name__ == "__main__":
    entry(main, "search_tau")
