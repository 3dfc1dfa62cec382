"""The paper's figures from a checkpoint: a picture for print and the tensors behind it.

python scripts/figures.py figure=samples checkpoint=PATH
python scripts/figures.py figure=consistency checkpoint=PATH
python scripts/figures.py figure=interpolation checkpoint=PATH 'indices=[3,17,8,42]'
python scripts/figures.py figure=nearest checkpoint=PATH data=cifar10 metric=efficientnet
python scripts/figures.py figure=all checkpoint=PATH name=NAME
python scripts/figures.py figure=samples checkpoint=PATH figure.width=3.25 figure.format=pdf    # for a paper's column
python scripts/figures.py --help
"""

from typing import Any

from _cli import entry, pick_device
from _last_words import same_command


def main(config: dict[str, Any]) -> None:
    """Make the figures that `config` says and print what was written."""
    from ddim.config import build
    from ddim.distributed import join_process_group
    from ddim.figures.panels import load_panel, summarize_nearest
    from ddim.figures.paper_figures import FigureSpec, write_figures

    pick_device(config.get("compute"), "device", without_float64=True)
    spec = build(FigureSpec, config, "")
    processes = join_process_group()
    for path in write_figures(spec, processes):
        if processes.is_main:
            print(path)
            if path.name == "nearest.safetensors":
                print(summarize_nearest(load_panel(path)))
    if spec.figure.format == "png" and processes.is_main:
        print(same_command(f"output_dir={spec.output_dir}_column", "figure.width=3.25", "figure.format=pdf"))


if __name__ == "__main__":
    entry(main, "figures")
