"""Models that ship with the package: their names are checkpoints, as in checkpoint=digits."""

from pathlib import Path

from ddim.errors import UserError

FOLDER = Path(__file__).parent / "models"
SHIPPED = {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}


def locate_checkpoint(path: str | Path) -> Path:
    """Return the file of a checkpoint: `path` itself, or where there is no such file, the shipped model of that name.

    Raises:
        UserError: `path` is a bare name, of no file and of no shipped model.
    """
    path = Path(path)
    if (path.exists() and not path.is_dir()) or path.suffix or len(path.parts) != 1:
        return path
    if str(path) in SHIPPED:  # also where a folder has this name, which is no checkpoint
        return SHIPPED[str(path)]
    if path.is_dir():
        return path
    raise UserError(
        f"there is no checkpoint {path}; give the path of a file that exists, or one of the models that ship with "
        f"the package: {', '.join(SHIPPED)}."
    )
