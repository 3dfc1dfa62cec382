"""The command of an installed package: `ddim train ...` does what `python scripts/train.py ...` does in a checkout."""

import ast
import contextlib
import difflib
import io
import os
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SCRIPTS = {path.stem: path for path in sorted(FOLDER.glob("[a-z]*.py"))}


def main() -> None:
    """Run the script that the first word names, with the others; its exit status is that of the command.

    What users read names scripts as `ddim NAME`, not as files of a checkout.
    """
    sys.path.insert(0, str(FOLDER))  # as for a script
    from _start import COMMAND, typed

    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(summary())
        return
    if name == "--version":
        print(f"ddim {version('ddim')}")
        return
    if name not in SCRIPTS:
        near = "".join(f" (did you mean {other}?)" for other in difflib.get_close_matches(name, SCRIPTS, n=1))
        print(f"error: unknown command {name}{near}; allowed: {', '.join(SCRIPTS)}.", file=sys.stderr)
        sys.exit(2)
    os.environ[COMMAND] = name
    sys.argv = [str(SCRIPTS[name]), *words]
    if "--help" not in words:
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(typed(text.getvalue()), end="")


def summary() -> str:
    """Return a line for each command: the first one of its script."""
    lines = {
        name: str(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))).splitlines()[0]
        for name, path in SCRIPTS.items()
    }
    width = max(map(len, lines))
    return "\n".join(
        [
            "usage: ddim COMMAND key=value ...    (the keys: ddim COMMAND --help)",
            "",
            *(f"  {name:<{width}}  {line}" for name, line in lines.items()),
            "",
            "Relative paths, those of outputs too, are below the folder you are in.",
        ]
    )


if __name__ == "__main__":
    main()
