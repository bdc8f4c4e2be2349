"""ScienceQA, in both layouts that it is passed on in.

- parquet: hub id derek-thomas/ScienceQA, or its files in a folder. Rows have no id: `SPLIT-ROW` is used.
- original: a folder with problems.json, pid_splits.json and images/SPLIT/ID/image.png, or a problems file.
  Without pid_splits.json each problem's own `split` counts.

The rationale is lecture + " " + solution, the context is the hint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.example import Example, InvalidExample
from data_prep.sources import (
    SPLITS,
    Input,
    Source,
    answer_index,
    choice_texts,
    field_texts,
    read_image,
    rejecting,
    text,
    unique_keys,
)
from data_prep.sources.parquet import ParquetSource, image_bytes, load_tables

HUB_ID = "derek-thomas/ScienceQA"
FIELDS = ("subject", "grade", "topic", "category", "skill", "task")
COLUMNS = ("image", "question", "choices", "answer", "hint", "lecture", "solution", *FIELDS)


def _example(id: str, split: str, problem: dict[str, Any], image: Any) -> Example:
    return Example(
        id=id, dataset="scienceqa", split=split,
        question=text(problem.get("question")), choices=choice_texts(problem.get("choices")),
        answer=answer_index(problem.get("answer")),
        rationale=_rationale(text(problem.get("lecture")), text(problem.get("solution"))),
        context=text(problem.get("hint")), image=image,
        fields=field_texts({name: problem.get(name) for name in FIELDS}),
    )  # fmt: skip


def _rationale(lecture: Any, solution: Any) -> str:
    for name, part in (("lecture", lecture), ("solution", solution)):
        if not isinstance(part, str):
            raise InvalidExample(f"{name} not text: {type(part).__name__}")
    return f"{lecture} {solution}".strip()


class ScienceQAParquet(ParquetSource):
    """The source in the parquet layout."""

    name = "scienceqa"

    def example(self, split: str, row: int) -> Example:
        id, problem = f"{split}-{row}", self._cells(split, row)
        with rejecting(id):
            return _example(id, split, problem, image_bytes(problem["image"], self._folder))


class ScienceQAProblems:
    """The source in the original layout; rows are in the order of pid_splits.json, else of the problems."""

    name = "scienceqa"

    def __init__(
        self, problems: dict[str, Any], ids: dict[str, list[str]], images: Path, files: dict[str, Path]
    ) -> None:
        self._problems, self._ids, self._images, self._files = problems, ids, images, files

    def input(self) -> Input:
        return self._files

    def splits(self) -> list[str]:
        return [split for split in SPLITS if self._ids.get(split)]

    def rows(self, split: str) -> int:
        return len(self._ids[split])

    def example(self, split: str, row: int) -> Example:
        id = self._ids[split][row]
        with rejecting(id):
            if id not in self._problems:
                raise InvalidExample("in pid_splits.json but not in the problems")
            problem = self._problems[id]
            if not isinstance(problem, dict):
                raise InvalidExample(f"problem not a JSON object: {type(problem).__name__}")
            return _example(id, split, problem, self._image(split, id, text(problem.get("image"))))

    def _image(self, split: str, id: str, name: Any) -> bytes | None:
        if not isinstance(name, str):
            raise InvalidExample("image not a file name")
        if not name:
            return None
        if id in ("", ".", "..") or "/" in id or "\\" in id:
            raise InvalidExample(f"id not the name of a folder: {id!r}")
        file = Path(name).name
        return read_image(self._images / split / id / file, file)


def open_table(input: str | None) -> Source:
    """Open a hub id, a folder of either layout, or a problems file.

    Raises:
        UserError: none of these, or unreadable.
    """
    path = Path(input or HUB_ID).expanduser()
    problems_file = path / "problems.json" if path.is_dir() else path
    if problems_file.is_file():
        return _open_problems(problems_file)
    return ScienceQAParquet(load_tables(input or HUB_ID, COLUMNS), input or HUB_ID)


def _open_problems(path: Path) -> ScienceQAProblems:
    problems = _read_json(path)
    if not isinstance(problems, dict):
        raise UserError(f"--input {path}: expected one JSON object of problems by id")
    files, splits_file = {"problems.json": path}, path.parent / "pid_splits.json"
    if splits_file.is_file():
        files[splits_file.name] = splits_file
        listed = _read_json(splits_file)
        if not isinstance(listed, dict) or not all(isinstance(found, list) for found in listed.values()):
            raise UserError(f"--input {splits_file}: expected one JSON object of lists of ids by split")
        ids = {split: [str(id) for id in found] for split, found in listed.items()}
    else:
        ids = {}
        for id, problem in problems.items():
            told = problem.get("split", "train") if isinstance(problem, dict) else "train"
            ids.setdefault(str(told), []).append(id)
        if strangers := sorted(set(ids) - set(SPLITS)):
            raise UserError(f"--input {path}: problems of the split {', '.join(strangers)}; use {', '.join(SPLITS)}")
    return ScienceQAProblems(problems, ids, path.parent / "images", files)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--input {path}: cannot be read as JSON ({error})") from None
