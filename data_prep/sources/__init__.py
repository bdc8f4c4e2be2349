"""Where questions come from: a source is a random-access table of Examples, so shards need no order."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from data_prep.cli import bind
from data_prep.errors import UserError
from data_prep.example import MAX_BYTES, Example, InvalidExample, shortened

SPLITS = ("train", "val", "test")
NAMES = ("m3cot", "scienceqa", "jsonl", "webdataset", "trails")

Input = str | dict[str, Path] | None
"""What a source reads: a hub id, local files by names that do not tell where they lie, or nothing."""


class Rejected(Exception):
    """A row that gives no Example."""

    def __init__(self, id: str, reason: str) -> None:
        self.id, self.reason = shortened(str(id)), shortened(reason)
        super().__init__(self.id, self.reason)


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


def strict_json(content: str) -> Any:
    """The value of a JSON text, of which nothing is lost.

    Raises:
        ValueError: no JSON, a key that an object has twice, a number that is none or too large, or too deep nesting.
    """
    try:
        return json.loads(content, parse_constant=_no_number, parse_float=_number, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _number(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(shortened(digits, 20))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object of these members; ValueError where two have one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {shortened(repr(twice), 100)} is there twice")
    return found


def text(value: Any) -> Any:
    """A cell of a table, with the empty text for a missing value; whether it is text is validated later."""
    return "" if value is None else value


def id_text(value: Any) -> str:
    """An id as text, empty for a missing one.

    Raises:
        InvalidExample: neither text nor number.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise InvalidExample(f"id neither text nor number: {type(value).__name__}")
    return str(text(value))


def field_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """What results are broken down by, as text; a number that is none counts as missing, which is the empty text.

    Raises:
        InvalidExample: neither text, number nor true/false.
    """
    for name, value in values.items():
        if not isinstance(value, str | int | float | None):
            raise InvalidExample(f"a field neither text nor number: {name!r}, {type(value).__name__}")
    return {name: "" if value is None or value != value else str(value) for name, value in values.items()}


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
        with open(path, "rb", opener=_open_at_once) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise InvalidExample(f"image file cannot be read: {name}, not a regular file")
            if state.st_size > MAX_BYTES:
                raise InvalidExample(f"image too large: {state.st_size} bytes")
            return file.read()
    except InvalidExample:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise InvalidExample(f"image file cannot be read: {shortened(name, 200)}, {reason}") from error


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would make it wait for a writer


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
