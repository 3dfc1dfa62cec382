"""Sample images from a checkpoint: a grid, single files, or an animation.

python scripts/sample.py checkpoint=PATH n=64
python scripts/sample.py checkpoint=PATH n=1000 format=png sampler.S=100 sampler.eta=1.0
python scripts/sample.py checkpoint=PATH n=16 format=gif
python scripts/sample.py --help
"""

from typing import Any

from _cli import entry, pick_device
from _jobs import check_files
from _last_words import command_line, of_model


def main(config: dict[str, Any]) -> None:
    """Sample as `config` says and print what was written."""
    from ddim.config import build
    from ddim.distributed import join_process_group
    from ddim.inference.sample_files import SampleSpec, write_samples

    pick_device(config.get("compute"), "device", without_float64=True)
    spec = build(SampleSpec, config, "")
    processes = join_process_group()
    for path in write_samples(spec, processes):
        if processes.is_main:
            print(path)
    if processes.is_main:
        print(command_line("figures", "figure=samples", *of_model(spec)))


if __name__ == "__main__":
    entry(main, "sample", plan=check_files)
