"""The one exception that a command shows to its user."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can put right; each line says what is wrong and what to do.

    A command prints the lines and exits with status 2 (`data_prep.cli.run`), without a traceback.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines
