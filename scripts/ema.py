"""Average the weights of a training over any length, after it (post-hoc EMA).

python scripts/train.py experiment=digits ema.posthoc=true
python scripts/ema.py checkpoint=outputs/train/digits/checkpoints/last.ckpt length=0.1
python scripts/ema.py checkpoint=PATH 'length=[0.05,0.1,0.2]'
python scripts/ema.py --help
"""

import sys
from typing import Any

from _cli import entry
from _last_words import command_line


def main(config: dict[str, Any]) -> None:
    """Write a model file for each length; print the paths, how near the profiles are, and how to sample."""
    from ddim.checkpoints.posthoc import PostHocSpec, write_averages
    from ddim.config import build

    written, warnings = write_averages(build(PostHocSpec, config, ""))
    for average in written:
        print(f"{average.path}: length {average.length:g}, relative error of its profile {average.error:.2g}")
    for warning in warnings:
        print(f"warning: {warning}.", file=sys.stderr)
    print(command_line("sample", f"checkpoint={written[0].path}"))


if __name__ == "__main__":
    entry(main, "ema")
