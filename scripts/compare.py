"""Compare trainings, finished or running: one table, the best first, and plots.

python scripts/compare.py runs='outputs/train/*'
python scripts/compare.py runs='outputs/train/lr*' by=val_loss
python scripts/compare.py --help
"""

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _cli import entry


def main(config: dict[str, Any]) -> None:
    """Compare the trainings that `config` says."""
    from ddim.config import build, expand_path
    from ddim.errors import UserError
    from ddim.results.compare import CompareSpec

    spec = build(CompareSpec, config, "")
    patterns = [spec.runs] if isinstance(spec.runs, str) else spec.runs
    folders = [path for pattern in patterns for path in sorted(glob.glob(expand_path(pattern, "runs")))]
    if not write_table(map(Path, folders), Path(spec.output_dir), spec.by):
        raise UserError(
            f"there is no training in {', '.join(patterns)}; give the folders that scripts/train.py wrote, such as "
            "runs='outputs/train/*'."
        )


def write_table(folders: Iterable[Path], output_dir: Path, metric: str | None = None) -> bool:
    """Write and print the comparison of the trainings in `folders`; return False if there is none."""
    from ddim.errors import UserError
    from ddim.results.compare import compare, read_run
    from ddim.results.compare_report import write_comparison

    runs = []
    for folder in dict.fromkeys(folders):
        try:
            runs += [run for run in [read_run(folder)] if run is not None]
        except UserError as error:  # the others are compared
            print(f"left out: {error}")
    if not runs:
        return False
    paths = write_comparison(compare(runs, metric), output_dir)
    print(f"\n{paths[0].read_text(encoding='utf-8')}")
    for path in paths:
        print(path)
    return True


if __name__ == "__main__":
    entry(main, "compare")
