"""Push exported files to a model repository of the Hugging Face hub, through the package huggingface_hub."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddim.errors import UserError


def check_repository(repository: str, files: Sequence[str], private: bool, overwrite: bool) -> None:
    """Check, without changing anything, that files can be pushed.

    Args:
        repository: USER/NAME, or ORGANISATION/NAME.
        files: their names.
        private: nobody else may see them.
        overwrite: the repository may have these files already; it keeps the old versions in its history.

    Raises:
        UserError: the package or a token is missing, the hub cannot be reached, or the repository is another owner's,
            is public, or has one of the files.
    """
    api = _connect()
    with _explain(repository):
        user = api.whoami()
        info = api.repo_info(repository) if api.repo_exists(repository) else None
    owner, owners = repository.partition("/")[0], [user["name"], *(group["name"] for group in user.get("orgs", ()))]
    if owner not in owners:
        raise UserError(
            f"push={repository}: your token is for {', '.join(owners)}, not for {owner}; choose one of these."
        )
    if info is None:
        return
    if private and not info.private:
        raise UserError(f"push={repository} is a public repository; choose another name, or private=false.")
    present = {file.rfilename for file in info.siblings}
    if not overwrite and (taken := [name for name in files if name in present]):
        raise UserError(
            f"push={repository} has {taken[0]} already; choose another name, or overwrite=true to replace it (the hub "
            "keeps the old version)."
        )


def push_files(repository: str, folder: Path, files: Sequence[str], private: bool) -> str:
    """Push files of a folder as one commit, and return the address of the repository, which is created if needed.

    Raises:
        UserError: the hub did not take them.
    """
    api = _connect()
    with _explain(repository, f"; the files are in {folder}: run the command again with overwrite=true"):
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(files), commit_message="Upload")
    return str(address)


def _connect() -> Any:
    """Return the client of the hub.

    Raises:
        UserError: the package, or the user's token, is missing.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            "push=... needs the package huggingface_hub; install it with pip install huggingface_hub."
        ) from error
    if huggingface_hub.get_token() is None:
        raise UserError("push=... needs a token of the hub that may write; run hf auth login, or set HF_TOKEN.")
    return huggingface_hub.HfApi()


@contextmanager
def _explain(repository: str, advice: str = "; nothing was written") -> Iterator[None]:
    """Turn what the client of the hub raises, which differs between its versions, into one sentence."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"the hub cannot take push={repository} ({reason}){advice}.") from error
