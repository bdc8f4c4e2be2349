"""Where questions come from: a source is a random-access table of Examples, so shards need no order."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from data_prep.cli import bind
from data_prep.errors import UserError
from data_prep.example import Example, InvalidExample

SPLITS = ("train", "val", "test")
NAMES = ("m3cot", "scienceqa", "jsonl", "trails")

Input = str | dict[str, Path] | None
"""What a source reads: a hub id, local files by names that do not tell where they lie, or nothing."""


class Rejected(Exception):
    """A row that gives no Example."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)
        self.id, self.reason = id, reason


@contextlib.contextmanager
def rejecting(id: str) -> Iterator[None]:
    """Turn an InvalidExample into the rejection of the row `id`."""
    try:
        yield
    except InvalidExample as error:
        raise Rejected(id, str(error)) from error


class Source(Protocol):
    """A table of questions."""

    name: str

    def input(self) -> Input:
        """What the rows are read from; pictures in files of their own are not named."""

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
        options: the source's own options by name, as values or as text (`source_options` has the defaults).

    Raises:
        UserError: no such source or option, or an input that cannot be read.
    """
    options = {option: str(value) for option, value in (options or {}).items()}
    module = _module(name)
    if hasattr(module, "Options"):
        if input is not None:
            raise UserError(f"--input {input}: the source {name} is generated and reads nothing")
        return module.open_table(module.Options(**bind(module.Options, options)))
    if options:
        raise UserError(*(f"the source {name} has no option --{option}" for option in options))
    return module.open_table(input)


def source_options(name: str) -> dict[str, str]:
    """The names and defaults of a source's own options.

    Raises:
        UserError: no such source.
    """
    module = _module(name)
    defaults = vars(module.Options()) if hasattr(module, "Options") else {}
    return {option: str(value) for option, value in defaults.items()}


def text(value: Any) -> Any:
    """A cell of a table, with the empty text for a missing value; whether it is text is validated later."""
    return "" if value is None else value


def choice_texts(choices: Any) -> tuple[Any, ...]:
    """The choices of a row; whether each is text is validated later.

    Raises:
        InvalidExample: not a list; a text is none, though it could be split into letters.
    """
    if not isinstance(choices, list):
        raise InvalidExample("choices is no list")
    return tuple(choices)


def read_image(path: Path, name: str) -> bytes:
    """The picture file that a row calls `name`.

    Raises:
        InvalidExample: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InvalidExample(f"image file cannot be read: {name}, {reason}") from error


def answer_index(answer: Any) -> Any:
    """The 0-based index for an answer given as a letter; an index is passed through, to be validated later.

    Raises:
        InvalidExample: neither of them.
    """
    if isinstance(answer, str) and len(answer) == 1 and "A" <= answer.upper() <= "Z":
        return ord(answer.upper()) - ord("A")
    if answer is None or isinstance(answer, str):
        raise InvalidExample(f"no answer: {answer!r} is neither a letter nor an index")
    return answer


def _module(name: str) -> Any:
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(NAMES)}"
        raise UserError(f"--source {name}: no such source; {hint}")
    return importlib.import_module(f"data_prep.sources.{name}")
