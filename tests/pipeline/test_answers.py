"""Files of predictions and of gold answers, sound and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import cli, shard
from data_prep.errors import UserError
from pipeline.scoring.answers import Notes, Prediction, Question, read_gold, read_predictions
from tests.pipeline.examples import picture
from tests.server import serving


def row(id: str, **changes: Any) -> dict[str, Any]:
    base = {"id": id, "choices": ["a fig", "a pear"], "answer": "B", "domain": "food", "topic": "fruit"}
    return {**base, "messages": ["Which?", "(B)"], **changes}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in rows))
    return path


def read(path: Path, gold: dict[str, Question] | None = None) -> tuple[list[Prediction], dict[str, list[str]]]:
    notes = Notes(path)
    return read_predictions(path, gold, notes), notes.kinds


def test_a_published_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", row("q1", context="", image_id="7", answer_style="index"))
    found, notes = read(path)
    question = Question("q1", ("a fig", "a pear"), 1, "food", "fruit", hint=False, image=True)
    assert found == [Prediction(question, ("Which?", "(B)"), style="index")] and notes == {}


def test_damaged_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    deep = b"[" * 100_000
    lines = [row("q1"), row("q2"), row("q1", messages=["Which?", "(A)"]), row(""), {"answer": "B"}, row("q3")]
    encoded = [json.dumps(line).encode() for line in lines]
    broken = [b"", b'{"id": "q9"', b"  \r", b'["q8"]', b"\xff\xfe", deep]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([encoded[0], *broken, *encoded[1:]]) + b"\n\n")
    found, notes = read(path)
    assert [(p.question.id, p.messages[-1]) for p in found] == [("q1", "(B)"), ("q2", "(B)"), ("q3", "(B)")]
    assert list(notes.values()) == [["line 3", "line 6", "line 7"], ["line 5"], ["q1"], ["line 10", "line 11"]]


def test_notes_name_some_places_and_count_all() -> None:
    notes = Notes(Path("p.jsonl"))
    for number in range(1, 9):
        notes.add("bad lines", f"line {number}")
    assert notes.lines() == ["p.jsonl: bad lines (8): line 1, line 2, line 3, line 4, line 5 and 3 more"]


@pytest.mark.parametrize(
    ("answer", "position"),
    [("B", 1), ("b", 1), (" (B) ", 1), (1, 1), ("1", 1), (0, 0), ("E", 4), (None, None), ("", None), ("AB", None),
     (True, None), (-1, None), (1.0, None), ("١", 1), ("9" * 5000, None), ([1], None)],
)  # fmt: skip
def test_answers_as_letter_or_index(tmp_path: Path, answer: Any, position: int | None) -> None:
    found, notes = read(write(tmp_path / "p.jsonl", row("q0"), row("q1", answer=answer)))
    assert [p.question.answer for p in found[1:]] == ([] if position is None else [position])
    assert ("q1" in str(notes)) == (position is None or position > 1)  # left out, or none of the choices


@pytest.mark.parametrize("messages", [None, [], ["Which?", None], 3, {}])
def test_no_answer_counts_as_a_failed_one(tmp_path: Path, messages: Any) -> None:
    found, notes = read(write(tmp_path / "p.jsonl", row("q1", messages=messages)))
    assert found[0].messages[-1] == "" and list(notes.values()) == [["q1"]]


def test_a_bare_text_is_the_answer(tmp_path: Path) -> None:
    assert read(write(tmp_path / "p.jsonl", row("q1", messages="(B)")))[0][0].messages == ("(B)",)


def test_gold_fills_and_overrides(tmp_path: Path) -> None:
    """Answer, domain and topic are gold's; choices the prediction's own where it has some."""
    gold_file = write(
        tmp_path / "gold.jsonl",
        row("q1", choices=["x", "y", "z"], answer="C", topic="gold"), row("q2", split="train"),
        {"id": "q4", "answer": 0}, row("q5", answer=None), row("q6"),
    )  # fmt: skip
    notes = Notes(gold_file)
    gold = read_gold(gold_file, "test", notes)
    assert gold.keys() == {"q1", "q4", "q6"} and notes.kinds == {
        "lines without an id or an answer, left out": ["line 4"]
    }
    bare, own = {"id": "q1", "messages": ["(A)"]}, row("q6", choices=["m", "n"])
    found, notes_of = read(write(tmp_path / "p.jsonl", bare, row("q4"), row("q2"), {"id": "q5"}, own), gold)
    assert [p.question for p in found] == [
        Question("q1", ("x", "y", "z"), 2, "food", "gold"),
        Question("q4", ("a fig", "a pear"), 0, "food", "fruit"),
        Question("q6", ("m", "n"), 1, "food", "fruit"),
    ]
    assert ["q2", "q5"] in notes_of.values()
    alone, notes_of = read(write(tmp_path / "p.jsonl", bare, row("q4", choices=[])))
    assert alone == [] and list(notes_of.values()) == [["q1", "q4"]]


def problem(**changes: Any) -> dict[str, Any]:
    base = {"question": "Which?", "choices": ["ice", "water"], "answer": 1, "hint": "", "image": None, "split": "test"}
    return {**base, "subject": "natural science", "grade": "grade2", "topic": "physics", **changes}


def test_problems_and_a_result_file(tmp_path: Path) -> None:
    problems = {"1": problem(), "2": problem(hint="Think.", image="image.png"), "3": problem(split="train")}
    write(tmp_path / "problems.json", json.dumps(problems, indent=2))
    for path in (tmp_path, tmp_path / "problems.json"):
        gold = read_gold(path, "test", Notes(path))
        assert [(q.id, q.hint, q.image) for q in gold.values()] == [("1", False, False), ("2", True, True)]
    results = json.dumps({"acc": 50.0, "results": {"1": 1, "2": "0", "3": 1, "4": -1}}, indent=2)
    found, notes = read(write(tmp_path / "r.json", results), gold)
    assert [(p.question.id, p.index, p.question.answer) for p in found] == [("1", 1, 1), ("2", 0, 1)]
    assert notes["questions without a gold answer, left out"] == ["3", "4"]
    assert notes["results that are no index, counted as failed"] == ["4"]
    with pytest.raises(UserError, match="r.json is a result file, .* give --gold"):
        read(tmp_path / "r.json")


def test_a_shard_folder_is_gold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hints and pictures of a prepared folder are known, and so are the fields."""
    (tmp_path / "q2.png").write_bytes(picture())
    rows = [
        {"id": f"q{i}", "question": "Which?", "choices": ["ice", "water"], "answer": i % 2, "rationale": "So.",
         "subject": "natural science", "grade": "grade2", "split": "test" if i else "train", **extra}
        for i, extra in enumerate([{}, {"context": "Think."}, {"image": "q2.png"}])
    ]  # fmt: skip
    write(tmp_path / "own.jsonl", *rows)
    cli.run(shard.main, ["--source=jsonl", f"--input={tmp_path / 'own.jsonl'}", f"--out={tmp_path / 'out'}"])
    gold = read_gold(tmp_path / "out", "test", Notes(tmp_path / "out"))
    assert [(q.id, q.answer, q.hint, q.image) for q in gold.values()] == [
        ("q1", 1, True, False),
        ("q2", 0, False, True),
    ]
    assert gold["q1"].subject == "natural science" and gold["q1"].grade == "grade2"
    with pytest.raises(UserError, match="has no split val"):
        read_gold(tmp_path / "out", "val", Notes(tmp_path / "out"))
    monkeypatch.setenv("IVTLR_CACHE_GB", "0")
    monkeypatch.setenv("no_proxy", "*")
    with serving(tmp_path / "out") as server:
        assert read_gold(server.url, "test", Notes(server.url)) == gold


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no question of the split test in it"),
        ("[]", "no question of the split test in it"),
        ('{"1": 3}', "1: expected an object"),
        ('{"id": "q1", "answer": "A", "split": "val"}', "no question of the split test in it"),
        ("\x00\x01", "line"),
    ],
)
def test_a_gold_file_of_nothing_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "gold.json", content)
    with pytest.raises(UserError, match=message):
        read_gold(path, "test", Notes(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["id", "choices", "answer", "domain", "topic", "messages", "fields", "context", "results"])


@given(st.lists(st.dictionaries(fields, json_values, max_size=6), max_size=4))
def test_whatever_a_line_holds_is_read_or_named(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    """No file of JSON lines ends in anything but predictions, notes or one line for the user."""
    path = write(tmp_path_factory.getbasetemp() / "any.jsonl", *rows)
    try:
        found, notes = read(path)
    except UserError:
        return
    ids = [p.question.id for p in found]
    assert len(set(ids)) == len(ids) and all(p.question.choices and p.messages for p in found)
    assert bool(notes) or len(found) == len(rows)
