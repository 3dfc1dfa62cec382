"""Encode images of your own to x_T: the starting points from which a checkpoint makes them again.

python scripts/encode.py checkpoint=PATH source=FOLDER
python scripts/encode.py checkpoint=PATH source=FOLDER inversion=bdia sampler.S=20
python scripts/encode.py --help

The file is for x_T=FILE of scripts/sample.py, which decodes it, and of scripts/figures.py, which interpolates.
"""

from pathlib import Path
from typing import Any

from _cli import entry, pick_device
from _jobs import check_files
from _last_words import command_line, of_checkpoint


def main(config: dict[str, Any]) -> None:
    """Encode as `config` says; print the file and how to decode it."""
    from ddim.config import build
    from ddim.distributed import join_process_group
    from ddim.evaluation.encoding import EncodeSpec, decode_with, write_encoded

    pick_device(config.get("compute"), "device")
    spec = build(EncodeSpec, config, "")
    processes = join_process_group()
    write_encoded(spec, processes)
    if processes.is_main:
        print(spec.path)
        folder = f"output_dir=outputs/samples/{Path(spec.path).stem}"
        print(command_line("sample", *of_checkpoint(spec), f"x_T={spec.path}", *decode_with(spec), folder))


if __name__ == "__main__":
    entry(main, "encode", plan=check_files)
