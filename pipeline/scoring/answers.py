"""Answered questions as files hold them: a model's predictions, and the gold answers to judge them by.

Predictions, with one JSON object a line, are in M3CoT's published form, which `pipeline.evaluate` writes too:

    id, choices, answer     the question; the answer as a letter or a 0-based index
    domain, topic           what M3CoT's results are broken down by
    subject, grade          what ScienceQA's are, here or in `fields`
    context, image          whether there is a hint and a picture: empty, null or false means that there is none
    messages                texts, question and answer by turns; the last one is judged
    answer_style            letter or index, how the strict judge expects an answer; not in published files

or ScienceQA's result file, one object with `results`: question id -> 0-based index.  Gold answers are lines of the same
form, ScienceQA's problems.json, or a shard folder of this project.

A line that cannot be used is named and left out, and the others are read: published files have such lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.files import parse_json
from data_prep.reader import BadSample, open_split
from data_prep.storage import Location
from pipeline.prompt import LETTERS
from pipeline.scoring.judges import Style

_NAMED = 5
"""Places that a note names; the others are counted."""


@dataclass(frozen=True)
class Question:
    """What is known of a question."""

    id: str
    choices: tuple[str, ...] = ()
    answer: int | None = None
    """0-based position of the right choice"""
    domain: str = ""
    topic: str = ""
    subject: str = ""
    grade: str = ""
    hint: bool | None = None
    """Whether it has a hint (M3CoT: context); None where the file does not tell"""
    image: bool | None = None


@dataclass(frozen=True)
class Prediction:
    """What a model said to a question."""

    question: Question
    messages: tuple[str, ...] = ()
    index: int | None = None
    """A result file's index, which stands for a text"""
    style: Style | None = None


@dataclass
class Notes:
    """What was odd about a file, each kind with the lines or ids where."""

    path: Location
    kinds: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        self.kinds.setdefault(kind, []).append(place)

    def lines(self) -> list[str]:
        """One line a kind."""
        out = []
        for kind, places in self.kinds.items():
            more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
            out.append(f"{self.path}: {kind} ({len(places)}): {', '.join(places[:_NAMED])}{more}")
        return out


def read_predictions(path: Path, gold: dict[str, Question] | None, notes: Notes) -> list[Prediction]:
    """The usable predictions of a file, each question once, in the file's order.

    With `gold`, its answer, domain, topic and the like count, its choices only where the prediction has none, and
    questions that it does not have are left out: so does M3CoT's own evaluation.

    Raises:
        UserError: the file cannot be read, or a result file comes without gold answers.
    """
    results = _results(path)
    if results is not None and gold is None:
        raise UserError(f"{path} is a result file, which has no answers to compare with: give --gold")
    found = _from_lines(path, notes) if results is None else _from_results(results, notes)
    kept: dict[str, Prediction] = {}
    for prediction in found:
        id = prediction.question.id
        if id in kept:
            notes.add("repeated ids, of which the first counts", id)
            continue
        if gold is not None:
            if id not in gold:
                notes.add("questions without a gold answer, left out", id)
                continue
            prediction = replace(prediction, question=_with_gold(prediction.question, gold[id]))
        kept[id] = prediction
    for id in list(kept):
        question = kept[id].question
        if not question.choices or question.answer is None:
            notes.add("questions without choices or without an answer, left out (--gold FILE has them)", id)
            del kept[id]
        elif question.answer >= len(question.choices):
            notes.add("right answers that are none of the choices", id)
    return list(kept.values())


def read_gold(path: Location, split: str, notes: Notes) -> dict[str, Question]:
    """Questions by id from a file of lines, a problems.json or its folder, or a shard folder (a URL is one).

    Questions of another split than `split` are left out, where the source tells.

    Raises:
        UserError: none of these, or nothing in it.
    """
    if isinstance(path, str) or (path.is_dir() and not (path / "problems.json").is_file()):
        found = {question.id: question for question in _from_shards(path, split, notes)}
    else:
        file = path / "problems.json" if path.is_dir() else path
        problems = _whole(file)
        if problems is None or "id" in problems:
            rows = [(f"line {number}", row) for number, row in _objects(file, notes)]
        else:
            rows = [(id, _problem(id, row)) for id, row in problems.items()]
        rows = [(place, row) for place, row in rows if row.get("split", split) == split]
        found = {}
        for place, row in rows:
            question = _question(row)
            if question is None or question.answer is None:
                notes.add("lines without an id or an answer, left out", place)
            else:
                found.setdefault(question.id, question)
    if not found:
        raise UserError(*notes.lines(), f"--gold {path}: no question of the split {split} in it")
    return found


def _results(path: Path) -> dict[str, Any] | None:
    content = _whole(path)
    return content["results"] if content is not None and isinstance(content.get("results"), dict) else None


def _whole(path: Path) -> dict[str, Any] | None:
    """The file as one JSON object; None where it is something else, such as several lines."""
    try:
        content = parse_json(_read(path).decode("utf-8-sig"))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _objects(path: Path, notes: Notes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that holds one."""
    for number, line in enumerate(_read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode())
        except ValueError:
            notes.add("lines that are not JSON, left out", f"line {number}")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            notes.add("lines that are no JSON object, left out", f"line {number}")


def _from_lines(path: Path, notes: Notes) -> Iterator[Prediction]:
    for number, row in _objects(path, notes):
        question = _question(row)
        if question is None:
            notes.add("lines without an id, left out", f"line {number}")
            continue
        messages = row.get("messages")
        texts = [messages] if isinstance(messages, str) else messages if isinstance(messages, list) else []
        if not texts or not isinstance(texts[-1], str):
            notes.add("questions without a model's answer, counted as failed", question.id)
            texts = [*texts[:-1], ""]
        style = row.get("answer_style")
        yield Prediction(question, tuple(map(str, texts)), style=style if style in ("letter", "index") else None)


def _from_results(results: dict[str, Any], notes: Notes) -> Iterator[Prediction]:
    for id, value in results.items():
        index = _position(value)
        if index is None:
            notes.add("results that are no index, counted as failed", id)
        yield Prediction(Question(_text(id)), index=-1 if index is None else index)


def _question(row: dict[str, Any]) -> Question | None:
    """A line's question; None without an id."""
    id = row.get("id")
    if not isinstance(id, str | int) or isinstance(id, bool) or id == "":
        return None
    inner = row["fields"] if isinstance(row.get("fields"), dict) else {}
    choices = row.get("choices")
    texts = {name: _text(row.get(name) or inner.get(name) or "") for name in ("domain", "topic", "subject", "grade")}
    hint = next((bool(row[name]) for name in ("hint", "context") if name in row), None)
    image = next((bool(row[name]) for name in ("image", "image_id") if name in row), None)
    return Question(
        _text(id), tuple(map(str, choices)) if isinstance(choices, list) else (), _position(row.get("answer")),
        hint=hint, image=image, **texts,
    )  # fmt: skip


def _problem(id: str, row: Any) -> dict[str, Any]:
    """An entry of problems.json as a line has it."""
    if not isinstance(row, dict):
        raise UserError(f"--gold: {id}: expected an object of lines, or one object of problems by id")
    return {**row, "id": id, "hint": row.get("hint"), "image": row.get("image")}


def _from_shards(folder: Location, split: str, notes: Notes) -> Iterator[Question]:
    index = open_split(folder, split)
    for position in range(len(index)):
        try:
            yield _from_example(index.read(position))
        except BadSample as error:
            notes.add("damaged samples, left out", error.key)


def _from_example(example: Example) -> Question:
    known = {name: example.fields.get(name, "") for name in ("topic", "subject", "grade")}
    domain = example.fields.get("domain", example.dataset)
    hint, image = bool(example.context), example.image is not None
    return Question(example.id, example.choices, example.answer, domain, hint=hint, image=image, **known)


def _with_gold(question: Question, gold: Question) -> Question:
    told = {name: value for name, value in vars(gold).items() if value not in ("", None)}
    return replace(question, **told | {"choices": question.choices or gold.choices})


def _text(value: Any) -> str:
    """What can be printed: no half of a surrogate pair."""
    return str(value).encode(errors="replace").decode()


def _position(value: Any) -> int | None:
    """A 0-based position from an index, its digits or a letter, bare or in brackets; None for anything else."""
    if isinstance(value, str):
        value = value.strip().strip("()").upper()
        if len(value) == 1 and value in LETTERS:
            return LETTERS.index(value)
        return int(value) if value.isdecimal() and len(value) < 10 else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
