"""What a command shows to its user without a traceback."""

from __future__ import annotations

import errno
from collections.abc import Collection

PASSING = frozenset(
    {
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO,
        errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    }
)  # fmt: skip
"""Errors of network file systems that cannot be reached, and may be a moment later."""


class UserError(Exception):
    """A mistake that the user can put right; each line says what is wrong and what to do.

    A command prints the lines and exits with `status` (`data_prep.cli.run`), without a traceback.
    """

    status = 2

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class PassingFault(UserError):
    """A fault of the machine that the same command may not meet again; under Slurm it is queued again by itself."""

    status = 1


class OwnFault(PassingFault):
    """One that no other rank of a run meets."""


def passes(error: Exception) -> bool:
    """Whether a file system says that it cannot be reached, and not that it is full or may not be written."""
    return isinstance(error, OSError) and error.errno in PASSING


def kind_of(error: Exception) -> type[UserError]:
    """What to tell an error of a file system as."""
    return PassingFault if passes(error) else UserError


def kind_of_all(errors: Collection[UserError]) -> type[UserError]:
    """What ranks raise together that met these: a `PassingFault` where each is one."""
    return PassingFault if errors and all(isinstance(error, PassingFault) for error in errors) else UserError
