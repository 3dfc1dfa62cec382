"""Convert a published checkpoint of another code base into a model file that every other script reads.

python scripts/import_checkpoint.py checkpoint=PATH name=NAME
python scripts/import_checkpoint.py download=ema_cifar10
python scripts/import_checkpoint.py --help
"""

import sys
from typing import Any

from _cli import entry
from _last_words import shell_command

TABLES = {(3, 32, 32): "table1_cifar10", (3, 64, 64): "table1_celeba"}  # image shape -> experiment


def main(config: dict[str, Any]) -> None:
    """Run the import; print what was imported and the commands that use it."""
    from ddim.checkpoints.convert.importing import ImportSpec, import_checkpoint
    from ddim.config import build

    imported = import_checkpoint(build(ImportSpec, config, ""))
    print("\n".join(imported.lines))
    for warning in imported.warnings:
        print(f"warning: {warning}.", file=sys.stderr)
    print(f"model file: {imported.path}")
    model, label = [f"checkpoint={imported.path}"], imported.model.weights
    if label == "online" or label.startswith("ema_"):  # weights=ema, the default, takes others
        model.append(f"weights={label}")
    print(f"sample from it: {shell_command('sample', *model)}")
    if experiment := TABLES.get(imported.model.spec.image_shape):
        print(f"evaluate it:    {shell_command('evaluate', '-m', f'experiment={experiment}', *model)}")


if __name__ == "__main__":
    entry(main, "import_checkpoint")
