"""Models that ship with the package: their names are checkpoints, as in checkpoint=digits."""

from pathlib import Path

from ddim.errors import UserError

FOLDER = Path(__file__).parent / "models"
SHIPPED = {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}


def locate_checkpoint(path: str | Path) -> Path:
    """Return the file of a checkpoint: `path` itself, or where there is none, the shipped model of that name.

    Raises:
        UserError: `path` is a bare name, of no file and of no shipped model.
    """
    path = Path(path)
    if path.exists() or path.suffix or len(path.parts) != 1:
        return path
    if str(path) not in SHIPPED:
        raise UserError(
            f"there is no checkpoint {path}; give the path of a file that exists, or one of the models that ship with "
            f"the package: {', '.join(SHIPPED)}."
        )
    return SHIPPED[str(path)]
