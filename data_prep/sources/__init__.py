"""Where questions come from. A source is a random-access table of Examples, so that shards can be made in any order."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

from data_prep.cli import bind
from data_prep.errors import UserError
from data_prep.example import Example

SPLITS = ("train", "val", "test")
NAMES = ("m3cot", "scienceqa", "jsonl", "trails")


class Rejected(Exception):
    """A row that gives no Example."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id, self.reason = id, reason


class Source(Protocol):
    """A table of questions."""

    name: str

    def splits(self) -> list[str]:
        """Those of train, val and test that the source has, in that order."""

    def rows(self, split: str) -> int:
        """Number of rows, bad ones included."""

    def example(self, split: str, row: int) -> Example:
        """The Example of a row; the same arguments give the same Example.

        Raises:
            Rejected: the row is unusable.
        """


def open_source(name: str, input: str | None = None, options: Mapping[str, Any] | None = None) -> Source:
    """Open a source by name.

    Args:
        name: one of `NAMES`.
        input: file, folder or hub id to read; None for the source's default.
        options: the source's own options, as text (`source_options` names them).

    Raises:
        UserError: no such source or option, or an input that cannot be read.
    """
    options = dict(options or {})
    module = _module(name)
    if hasattr(module, "Options"):
        if input is not None:
            raise UserError(f"--input {input}: the source {name} is generated and reads nothing")
        return module.open_table(module.Options(**bind(module.Options, options)))
    if options:
        raise UserError(*(f"the source {name} has no option --{option}" for option in options))
    return module.open_table(input)


def source_options(name: str) -> dict[str, Any]:
    """The names and defaults of a source's own options."""
    module = _module(name)
    return dict(vars(module.Options())) if hasattr(module, "Options") else {}


def _module(name: str) -> Any:
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(NAMES)}"
        raise UserError(f"--source {name}: no such source; {hint}")
    return importlib.import_module(f"data_prep.sources.{name}")
