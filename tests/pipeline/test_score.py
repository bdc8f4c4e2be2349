"""The scoring command: its figures by hand, its files, its mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep import cli
from pipeline import score
from pipeline.scoring.answers import Question
from pipeline.scoring.tally import Scored, columns, position_bias
from tests import launch

CHOICES = ["a fig", "a pear", "a plum"]
ANSWERS = [
    # id, domain, topic, gold, answer
    ("1", "food", "sweet", "A", "(A)"),
    ("2", "food", "sweet", "B", "(C) a plum"),
    ("3", "food", "sour", "C", "It is a plum."),
    ("4", "tools", "garden", "C", "I cannot tell"),
    ("5", "tools", "garden", "A", "(E)"),
    ("6", "tools", "garden", "B", "[Answer] b [Rationale] (A)"),
]


def write(path: Path, answers: list[tuple[str, ...]] = ANSWERS, **changes: Any) -> Path:
    rows = [
        {"id": id, "choices": CHOICES, "answer": gold, "domain": domain, "topic": topic, "messages": ["Q", text]}
        for id, domain, topic, gold, text in answers
    ]
    path.write_text("".join(json.dumps(row | changes) + "\n" for row in rows))
    return path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, list[str]]:
    """(stdout, lines of stderr) of the command."""
    cli.run(score.main, list(map(str, words)))
    shown = capsys.readouterr()
    return shown.out, shown.err.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        cli.run(score.main, list(map(str, words)))
    assert ended.value.code == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_the_command(tmp_path: Path) -> None:
    """As users start it: the table, and a file in the layout of M3CoT's published scores."""
    predictions, out = write(tmp_path / "p.jsonl"), tmp_path / "scores.json"
    predictions.write_text(predictions.read_text() + "\n{half a line\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.score", "--benchmark", "m3cot", "--predictions", predictions, "--json", out],
        cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"warning: {predictions}: lines that are not JSON, left out (1): line 8" in done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["total", "6", "3", "50.00%"] in [line[:4] for line in lines]
    assert ["sour", "1", "1", "100.00%", "100.0-100.0"] in lines
    assert "no choice found in 1 of 6 answers" in done.stdout
    report = json.loads(out.read_text())
    assert report["total"] == {"accuracy": 50.0, "correct": 3, "questions": 6}
    assert report["domain"] == {
        "food": {"accuracy": 66.67, "questions": 3},
        "tools": {"accuracy": 33.33, "questions": 3},
    }
    assert report["topic"] == {
        "food/sour": {"accuracy": 100.0, "questions": 1},
        "food/sweet": {"accuracy": 50.0, "questions": 2},
        "tools/garden": {"accuracy": 33.33, "questions": 3},
    }
    assert report["failed"] == 1 and sum(report["notes"].values()) == 1
    assert report["interval"] == [16.67, 83.33]  # 1 and 5 of 6: fewer than 2.5% of the draws have 0, or 6
    position = report["position"]
    assert position["gold"] == {"A": 2, "B": 2, "C": 2} and position["predicted"] == {"A": 1, "B": 1, "C": 2}
    assert position["right"] == {"A": 1, "B": 1, "C": 1} and position["outside"] == 1


def test_figures_follow_the_seed_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions, out = write(tmp_path / "p.jsonl"), tmp_path / "s.json"
    shown = []
    for seed in (1, 1):
        text, _ = run(capsys, "--benchmark", "m3cot", "--predictions", predictions, "--seed", seed, "--json", out)
        shown.append((text, out.read_text()))
    assert shown[0] == shown[1]


def test_against_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four of five shared questions differ: right here are 1, 3 and 6, there 2 alone."""
    predictions, out = write(tmp_path / "p.jsonl"), tmp_path / "s.json"
    theirs = [(*rest, "(B)" if rest[0] == "2" else "(Z)") for *rest, _ in ANSWERS if rest[0] != "5"]
    other = write(tmp_path / "other.jsonl", [*theirs, ("7", "food", "sweet", "A", "(A)")])
    text, errors = run(capsys, "--benchmark", "m3cot", "--predictions", predictions, "--against", other, "--json", out)
    assert not errors and "right here alone 3, there alone 1, McNemar's exact p = 0.62" in text
    found = json.loads(out.read_text())["against"]
    assert (found["questions"], found["only_first"], found["only_second"], found["p_value"]) == (5, 3, 1, 0.625)
    alien = write(tmp_path / "alien.jsonl", [("9", "food", "sweet", "A", "(A)")])
    words = ["--benchmark", "m3cot", "--predictions", predictions]
    assert refused(capsys, *words, "--against", alien)[-1].endswith("have no question in common")
    _, errors = run(capsys, *words, "--against", write(tmp_path / "regraded.jsonl", answer="A"))
    assert len(errors) == 1 and "other right answers to 4 questions: 2 ..." in errors[0]


def test_gold_and_what_it_does_not_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold, out = write(tmp_path / "gold.jsonl"), tmp_path / "s.json"
    predictions = tmp_path / "p.jsonl"
    rows = [{"id": id, "messages": ["Q", text]} for id, *_, text in [*ANSWERS[:3], ("99", "(A)")]]
    predictions.write_text("\n".join(map(json.dumps, rows)))
    words = ["--benchmark", "m3cot", "--predictions", predictions]
    text, errors = run(capsys, *words, "--gold", gold, "--json", out)
    assert json.loads(out.read_text())["total"] == {"accuracy": 66.67, "correct": 2, "questions": 3}
    assert "without an answer here, not counted: 3" in text and "without a gold answer, left out (1): 99" in errors[0]
    assert "questions without choices or without an answer" in refused(capsys, *words)[0]


@pytest.mark.parametrize(("judge", "right", "failed"), [("official", 2, 1), ("strict", 1, 3), ("released", 3, 0)])
def test_judges_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str, right: int, failed: int) -> None:
    answers = [
        ("1", "d", "t", "A", "Therefore, the answer is A"),
        ("2", "d", "t", "C", "The answer is correct (C)"),
        ("3", "d", "t", "B", "The answer is bad"),
        ("4", "d", "t", "B", "The answer is correct (C)"),
    ]
    words = ["--predictions", write(tmp_path / "p.jsonl", answers), "--judge", judge, "--json", tmp_path / "s.json"]
    run(capsys, "--benchmark", "m3cot", *words)
    report = json.loads((tmp_path / "s.json").read_text())
    assert (report["total"]["correct"], report["failed"], report["judge"]) == (right, failed, judge)


def question(subject: str, grade: int, hint: bool | None, image: bool | None) -> Question:
    return Question("q", ("a", "b"), 0, subject=f"{subject} science", grade=f"grade{grade}", hint=hint, image=image)


def test_scienceqa_columns() -> None:
    rows = [
        Scored(question("natural", 1, True, True), True, 0),
        Scored(question("natural", 6, True, False), False, 1),
        Scored(question("social", 7, False, True), True, 0),
        Scored(question("language", 12, False, False), False, None),
    ]
    assert columns(rows) == {
        "NAT": (1, 2), "SOC": (1, 1), "LAN": (0, 1), "TXT": (1, 2), "IMG": (2, 2), "NO": (0, 1),
        "G1-6": (1, 2), "G7-12": (1, 2), "AVG": (2, 4),
    }  # fmt: skip
    unknown = columns([*rows, Scored(question("social", 3, None, None), True, 0)])
    assert unknown["TXT"] == unknown["IMG"] == unknown["NO"] == (0, 0) and unknown["SOC"] == (2, 2)


def test_scienceqa_by_texts_and_by_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One set of answers in both forms gives one table; where hints are unknown, their columns are empty."""
    problems = {
        str(i): {"choices": ["ice", "water"], "answer": i % 2, "hint": "Think." if i < 2 else "", "split": "test",
                 "image": "image.png" if i % 2 else None, "subject": "natural science", "grade": f"grade{i + 4}"}
        for i in range(5)
    }  # fmt: skip
    results = {"0": 0, "1": 1, "2": 1, "3": 1, "4": -1}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    lines = [
        {**problems[id], "id": id, "hint": None, "fields": {"grade": problems[id]["grade"]},
         "messages": ["Q", f"So.\nTherefore, the answer is {index}"]}
        for id, index in results.items()
    ]  # fmt: skip
    for line in lines:
        del line["hint"], line["image"]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = []
    for words in (["results.json", "--gold"], ["p.jsonl", "--gold"], ["p.jsonl"]):
        gold = [tmp_path / "problems.json"] if words[1:] else []
        text, _ = run(
            capsys, "--benchmark", "scienceqa", "--predictions", tmp_path / words[0], *words[1:], *gold,
            "--json", tmp_path / "s.json",
        )  # fmt: skip
        assert json.loads((tmp_path / "s.json").read_text())["failed"] == 1
        found.append({k: v["accuracy"] for k, v in json.loads((tmp_path / "s.json").read_text())["columns"].items()})
    assert found[0] == found[1] == {
        "NAT": 60.0, "SOC": None, "LAN": None, "TXT": 100.0, "IMG": 100.0, "NO": 0.0,
        "G1-6": 66.67, "G7-12": 50.0, "AVG": 60.0,
    }  # fmt: skip
    assert found[2] == found[0] | {"TXT": None, "IMG": None, "NO": None} and "give --gold" in text
    words = ["--benchmark", "scienceqa", "--predictions", tmp_path / "results.json", "--gold", tmp_path]
    assert "only --judge official is left" in refused(capsys, *words, "--judge", "strict")[0]


def test_a_model_that_always_says_a_is_found_out() -> None:
    """Answers A throughout, right where A is: all of A's questions, none of B's."""
    rows = [Scored(Question(str(i), ("x", "y"), i % 2), i % 2 == 0, 0) for i in range(100)]
    bias = position_bias(rows)
    assert bias.predicted == {"A": 100, "B": 0} and bias.right == {"A": 50, "B": 0}
    assert bias.predicted_as_gold.statistic == pytest.approx(100) and bias.predicted_as_gold.p_value < 1e-20
    assert bias.equally_right.statistic == pytest.approx(100)
    fair = position_bias([Scored(Question(str(i), ("x", "y"), i % 2), True, i % 2) for i in range(100)])
    assert fair.predicted_as_gold.p_value == fair.equally_right.p_value == 1.0


def test_all_mistakes_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = [f"--{name}={tmp_path / name}" for name in ("predictions", "gold", "against")]
    lines = refused(capsys, "--benchmark", "m3cot", *gone, "--seed", "-1", f"--json={tmp_path / 'no' / 's.json'}")
    assert len(lines) == 5 and sum("no such file" in line for line in lines) == 3
    lines = refused(capsys, "--benchmark", "vqa", "--judge", "kind")
    assert len(lines) == 3 and "--benchmark vqa: expected one of m3cot, scienceqa" in lines[1]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert refused(capsys, "--benchmark", "m3cot", "--predictions", empty) == [f"error: {empty}: no question to score"]
    assert "Is a directory" in refused(capsys, "--benchmark", "m3cot", "--predictions", tmp_path)[0]
