"""Where numbers are shown besides files: what training and evaluation both can be told."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ddim.errors import UserError


@dataclass(frozen=True)
class LoggerSpec:
    """Where a run is logged besides CSV.

    Attributes:
        wandb, tensorboard: also log there.
        project, entity, group, tags: of the W&B run.
        offline: keep the W&B run on this disk; needs no account. `wandb sync` uploads it later.
    """

    wandb: bool = False
    tensorboard: bool = False
    project: str = "ddim"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    offline: bool = False


@contextmanager
def explained() -> Iterator[None]:
    """Say in one sentence why W&B does not start, or not go on.

    Raises:
        UserError: it does not.
    """
    import wandb

    try:
        yield
    except wandb.errors.UsageError as error:
        raise UserError(
            f"W&B refused to start ({' '.join(str(error).split())}); run `wandb login`, or choose logger=wandb_offline."
        ) from error
    except wandb.errors.Error as error:
        raise UserError(
            f"W&B failed ({' '.join(str(error).split())[:300]}); run the same command again, or with "
            "logger=wandb_offline."
        ) from error
