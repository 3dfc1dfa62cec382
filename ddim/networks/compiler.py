"""The C++ compiler, which torch.compile on CPUs and the loops of `cpu/` need."""

import os
import shlex
import shutil
import stat
import sys
from pathlib import Path

from ddim.errors import UserError

DEFAULT = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # torch uses $CXX or this one


def compiler_command() -> list[str]:
    """Return the words of the compiler's command: the variable CXX, or the default of the platform."""
    return shlex.split(os.environ.get("CXX", "")) or [DEFAULT]


def find_compiler() -> list[str]:
    """Return `compiler_command`, after a check that the compiler is installed.

    Raises:
        UserError: it is not.
    """
    command = compiler_command()
    if shutil.which(command[0]) is None:
        raise UserError(
            f"compile=true and winograd=true need a C++ compiler, and {command[0]} cannot be found; install it "
            "(apt install g++, conda install gxx), name another one in the variable CXX, or leave both false."
        )
    return command


def is_private(path: Path) -> bool:
    """Whether code may be run from a path: it is not there, or this user's, no link, and nobody else can write."""
    try:
        status = path.lstat()
    except OSError:
        return True
    is_own = os.name != "posix" or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    return is_own and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))
