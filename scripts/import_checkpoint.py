"""Turn a published checkpoint, of whichever code base, into a model file that every other script reads.

python scripts/import_checkpoint.py source=PATH out=PATH
python scripts/import_checkpoint.py download=ema_cifar10
python scripts/import_checkpoint.py --help
"""

import sys
from typing import Any

from _cli import entry

TABLES = {(3, 32, 32): "table1_cifar10", (3, 64, 64): "table1_celeba"}  # of models of that image shape


def main(config: dict[str, Any]) -> None:
    """Import as `config` says; print what was found and taken, and what to do with it."""
    from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
    from ddim.config import build

    done = import_checkpoint(build(ImportSpec, config, ""))
    print("\n".join(done.lines))
    for warning in done.warnings:
        print(f"warning: {warning}.", file=sys.stderr)
    print(f"model file: {done.path}")
    model = f"checkpoint={done.path}{' weights=online' if done.model.weights == 'online' else ''}"
    run = "python scripts"
    print(f"sample from it: {run}/sample.py {model}")
    if experiment := TABLES.get(done.model.spec.image_shape):
        print(f"evaluate it:    {run}/evaluate.py -m experiment={experiment} {model}")


if __name__ == "__main__":
    entry(main, "import_checkpoint")
