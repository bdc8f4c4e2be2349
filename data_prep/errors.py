"""What a command shows to its user without a traceback."""

from __future__ import annotations


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
