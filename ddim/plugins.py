"""Modules of the user, whose import registers samplers, data sets, networks or metrics: docs/plugins.md."""

import importlib
from collections.abc import Sequence

from ddim.errors import UserError

_imported: dict[str, None] = {}  # their names, in the order of the imports


def import_plugins(names: Sequence[str]) -> None:
    """Import modules by name, each a single time.

    Raises:
        UserError: one cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # the code of a plugin can raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            raise UserError(
                f"the plugin {name} cannot be imported ({reason}); give the name of an installed module, or of one in "
                "the folder you are in."
            ) from error
        _imported[name] = None


def imported_plugins() -> list[str]:
    """Return the names of the plugins that this process has imported; records and checkpoints state them."""
    return list(_imported)
