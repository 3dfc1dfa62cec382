"""Jinja templates in results/assets."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

ASSETS = Path(__file__).parent / "assets"


def load_template(name: str, **options: Any) -> Template:
    """Return a template of results/assets.

    Args:
        name: of the file.
        options: of `jinja2.Environment`, for example how text is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        **options,
    )
    return environment.get_template(name)
