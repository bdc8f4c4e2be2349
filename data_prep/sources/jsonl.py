"""Your own questions: one JSON object a line.

`--input FILE.jsonl`, each line with its split, or `--input FOLDER` with train.jsonl, val.jsonl, test.jsonl.

    {"id": "q1", "image": "pictures/q1.jpg", "question": "What is in the bowl?",
     "choices": ["figs", "nuts"], "answer": "B", "rationale": "They are small. They have shells.",
     "split": "train", "topic": "kitchen"}

    id          text or number, unique in its split
    image       optional: file, relative to the JSON file's folder and, links followed, inside it; jpg, png, webp, gif
                or bmp
    question    text
    choices     two texts or more
    answer      letter ("B") or 0-based index (1)
    rationale   text; may be empty
    context     optional text
    split       optional: train (if absent), val or test; in the folder form it must be the file's
    others      text, number or true/false: a field that results can be broken down by

A line has at most `MAX_LINE` bytes, and no key twice.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.example import Example, InvalidExample, shortened
from data_prep.sources import (
    SPLITS,
    Input,
    Rejected,
    answer_index,
    choice_texts,
    field_texts,
    id_text,
    read_image,
    strict_json,
    text,
)

MAX_LINE = 4 * 2**20
"""Bytes of a line; of a longer one no more is ever in memory."""

_KEYS = {"id", "image", "question", "choices", "answer", "rationale", "context", "split"}


class JsonLines:
    """The source; a split's rows are its lines in file order. Only the lines' places are kept in memory."""

    name = "jsonl"

    def __init__(self, files: dict[str | None, Path]) -> None:
        """`files` by split; None stands for a file whose lines tell their split."""
        self._lines: dict[str, _Lines] = {}
        self._files = files
        for split, path in files.items():
            self._scan(split, path)

    def _scan(self, split: str | None, path: Path) -> None:
        start, number = 0, 0
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if line.strip():
                    place = self._lines.setdefault(split or _told_split(line), _Lines(path, split is None))
                    place.starts.append(start)
                    place.numbers.append(number)
                while len(line) > MAX_LINE and not line.endswith(b"\n"):  # the rest of one that is too long
                    line = file.readline(MAX_LINE + 1)
                start = file.tell()

    def input(self) -> Input:
        return {f"{split or 'input'}.jsonl": path for split, path in self._files.items()}

    def splits(self) -> list[str]:
        return [split for split in SPLITS if split in self._lines]

    def rows(self, split: str) -> int:
        return len(self._lines[split].starts)

    def example(self, split: str, row: int) -> Example:
        lines = self._lines[split]
        id = f"{lines.path.name}:{lines.numbers[row]}"
        try:
            with open(lines.path, "rb") as file:
                file.seek(lines.starts[row])
                line = file.readline(MAX_LINE + 1)
        except OSError as error:
            raise UserError(f"--input {lines.path}: cannot be read any more ({error.strerror})") from None
        try:
            content = json_object(line)
            id = id_text(content.get("id")) or id
            check_split(content.get("split", "train" if lines.tell_split else split), split)
            return own_example(content, self.name, split, _read_image(lines.path.parent, content.get("image")))
        except InvalidExample as error:
            raise Rejected(id, str(error)) from error


class _Lines:
    """Where the lines of a split are."""

    def __init__(self, path: Path, tell_split: bool) -> None:
        self.path, self.tell_split = path, tell_split
        self.starts, self.numbers = array("q"), array("q")


def json_object(line: bytes) -> dict[str, Any]:
    """The keys of an own question.  Raises InvalidExample for what is no JSON object, or more than `MAX_LINE` bytes."""
    if len(line) > MAX_LINE:
        raise InvalidExample(f"more than {MAX_LINE} bytes of JSON")
    try:
        content = strict_json(line.decode("utf-8-sig"))
    except ValueError as error:
        raise InvalidExample(f"not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidExample("not a JSON object")
    return content


def own_example(content: dict[str, Any], dataset: str, split: str, image: bytes | None) -> Example:
    """The Example of an own question's keys and its picture.

    Raises:
        InvalidExample: the keys make none; what they hold is validated later.
    """
    return Example(
        id=id_text(content.get("id")), dataset=dataset, split=split,
        question=text(content.get("question")), choices=choice_texts(content.get("choices")),
        answer=answer_index(content.get("answer")), rationale=text(content.get("rationale")),
        context=text(content.get("context")), image=image,
        fields=field_texts({name: value for name, value in content.items() if name not in _KEYS and value is not None}),
    )  # fmt: skip


def check_split(told: Any, split: str) -> None:
    """Raise InvalidExample where a question tells another split than that of its place."""
    if told != split:
        raise InvalidExample(f"wrong split: {told!r}")


def _told_split(line: bytes) -> str:
    """The split that a line names; a line that names no right one is a row of train, to be rejected there."""
    try:
        told = json_object(line).get("split", "train")
    except InvalidExample:
        return "train"
    return told if told in SPLITS else "train"


def _read_image(folder: Path, name: Any) -> bytes | None:
    if name is None:
        return None
    if not isinstance(name, str):
        raise InvalidExample("image not a file name")
    root = os.path.realpath(folder)
    try:
        path = os.path.realpath(os.path.join(root, name))
    except ValueError as error:  # a NUL in the name
        raise InvalidExample(f"image file cannot be read: {shortened(name, 200)}, {error}") from error
    if os.path.commonpath([root, path]) != root:
        raise InvalidExample(f"image outside the folder: {name}")
    return read_image(Path(path), name)


def open_table(input: str | None) -> JsonLines:
    """Open a file or a folder.

    Raises:
        UserError: there is none.
    """
    if input is None:
        raise UserError("--input is missing: the source jsonl reads a file or a folder of your own")
    path = Path(input).expanduser()
    files: dict[str | None, Path] = {None: path}
    if path.is_dir():
        files = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").is_file()}
    if not files or not all(file.is_file() for file in files.values()):
        raise UserError(f"--input {input}: no such file, nor a folder with train.jsonl, val.jsonl or test.jsonl")
    try:
        return JsonLines(files)
    except OSError as error:
        raise UserError(f"--input {input}: cannot be read ({error.strerror})") from None
