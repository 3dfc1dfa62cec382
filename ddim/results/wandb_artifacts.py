"""Checkpoints that are W&B artifacts: checkpoint=wandb:ENTITY/PROJECT/ARTIFACT[:VERSION] in every command."""

import re
import shutil
from pathlib import Path

from filelock import FileLock

from ddim.errors import UserError

PREFIX = "wandb:"
_PART = r"\w[\w .-]*"  # of a name
FOLDER = Path("outputs/artifacts")  # gets ENTITY/PROJECT/ARTIFACT/v0 and so on
MODEL_FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")


def download_checkpoint(checkpoint: str, folder: Path = FOLDER) -> str:
    """Return the path of the model file of an artifact, which is downloaded unless it was before.

    Args:
        checkpoint: wandb:ENTITY/PROJECT/ARTIFACT, with :VERSION such as :v3, :best, or :latest, the default. A version
            with a number never changes, so one that was downloaded needs no network.
        folder: gets the artifacts, each in a folder of its own.

    Raises:
        UserError: no such name or artifact, no connection, or an artifact without exactly one model file.
    """
    if not (parts := re.fullmatch(rf"{PREFIX}({_PART}/{_PART}/{_PART})(?::({_PART}))?", checkpoint)):
        raise UserError(f"checkpoint={checkpoint} must be wandb:ENTITY/PROJECT/ARTIFACT or wandb:...:VERSION.")
    name, version = parts[1], parts[2] or "latest"
    if not re.fullmatch(r"v\d+", version) or not (folder / name / version).is_dir():
        version = _download(name, version, folder)
    files = [path for path in sorted((folder / name / version).rglob("*")) if path.suffix in MODEL_FILES]
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise UserError(
            f"the artifact {name}:{version} must hold one model file ({', '.join(MODEL_FILES)}), it has {names}; give "
            f"the path of a file in {folder / name / version}."
        )
    return str(files[0])


def artifact_of(checkpoint: str, folder: Path = FOLDER) -> str | None:
    """Return ENTITY/PROJECT/ARTIFACT:VERSION of a path that `download_checkpoint` returned, None for another path."""
    parts = re.match(rf"{re.escape(str(folder))}/([^/]+/[^/]+/[^/]+)/(v\d+)/", checkpoint)
    return parts and f"{parts[1]}:{parts[2]}"


def _download(name: str, version: str, folder: Path) -> str:
    """Download an artifact and return the number of its version, such as v3."""
    import wandb

    try:
        artifact = wandb.Api().artifact(f"{name}:{version}")
        target = folder / name / artifact.version
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):  # of several processes, one downloads
            if not target.is_dir():
                partial = target.with_name(f".{target.name}")
                shutil.rmtree(partial, ignore_errors=True)
                artifact.download(root=str(partial), skip_cache=True)
                partial.rename(target)
        return str(artifact.version)
    except (wandb.errors.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"the artifact {name}:{version} cannot be downloaded ({reason}); check its name, `wandb login` and the "
            "network, or give the path of a file."
        ) from error
