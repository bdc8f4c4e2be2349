"""Counting judged answers: by domain and topic, in ScienceQA's columns, by the position of the right choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.prompt import LETTERS
from pipeline.scoring.answers import Prediction, Question
from pipeline.scoring.judges import Benchmark, JudgeName, judge_of
from pipeline.scoring.report import breakdown
from pipeline.scoring.stats import ChiSquare, fit, homogeneity

Counts = dict[str, tuple[int, int]]
"""group -> (right, questions)"""

COLUMNS: dict[str, Callable[[Question], bool]] = {
    "NAT": lambda q: q.subject == "natural science",
    "SOC": lambda q: q.subject == "social science",
    "LAN": lambda q: q.subject == "language science",
    "TXT": lambda q: bool(q.hint),
    "IMG": lambda q: bool(q.image),
    "NO": lambda q: not q.hint and not q.image,
    "G1-6": lambda q: q.grade in {f"grade{i}" for i in range(1, 7)},
    "G7-12": lambda q: q.grade in {f"grade{i}" for i in range(7, 13)},
    "AVG": lambda q: True,
}
"""The columns of ScienceQA's published tables, as tools/evaluate_acc.py of its repository defines them."""


@dataclass(frozen=True)
class Scored:
    """A question and what the judge found."""

    question: Question
    right: bool
    choice: int | None
    """The choice named, the last one of several; None for a failed answer"""


def score_one(prediction: Prediction, benchmark: Benchmark, judge: JudgeName) -> Scored:
    """Judge a text, or take a result file's index as it is (below 0: failed)."""
    question = prediction.question
    if prediction.index is not None:
        named = [prediction.index] if prediction.index >= 0 else []
    else:
        named = judge_of(benchmark, judge, prediction.style)(prediction.messages, question.choices)
    return Scored(question, question.answer in named, named[-1] if named else None)


def domains(rows: Sequence[Scored]) -> Counts:
    """By domain."""
    return breakdown((row.question.domain, row.right) for row in rows)


def topics(rows: Sequence[Scored]) -> Counts:
    """By `domain/topic`."""
    return breakdown((f"{row.question.domain}/{row.question.topic}", row.right) for row in rows)


def columns(rows: Sequence[Scored]) -> Counts:
    """By ScienceQA's columns; no question is counted for hint and image where one of them is unknown."""
    known = all(row.question.hint is not None and row.question.image is not None for row in rows)
    out = {}
    for name, belongs in COLUMNS.items():
        found = (
            [row.right for row in rows if belongs(row.question)] if known or name not in ("TXT", "IMG", "NO") else []
        )
        out[name] = (sum(found), len(found))
    return out


@dataclass(frozen=True)
class PositionBias:
    """Whether answers favour a letter."""

    gold: dict[str, int]
    """letter -> questions with that right answer"""
    predicted: dict[str, int]
    """letter -> answers that name it"""
    outside: int
    """Answers that name a letter beyond every question's choices"""
    right: dict[str, int]
    """letter -> right answers among its questions of `gold`"""
    predicted_as_gold: ChiSquare
    """Fit of the predicted letters to gold's shares, letters that are never right left out"""
    equally_right: ChiSquare
    """One accuracy for all gold letters"""


def position_bias(rows: Sequence[Scored]) -> PositionBias:
    """Count letters of right answers and of predictions."""
    most = max(max(len(row.question.choices), (row.question.answer or 0) + 1) for row in rows)
    letters = LETTERS[:most]
    gold, predicted, right = (dict.fromkeys(letters, 0) for _ in range(3))
    outside = 0
    for row in rows:
        if row.question.answer is not None and row.question.answer < len(letters):
            gold[letters[row.question.answer]] += 1
            right[letters[row.question.answer]] += row.right
        if row.choice is not None and row.choice < len(letters):
            predicted[letters[row.choice]] += 1
        outside += row.choice is not None and row.choice >= len(letters)
    alike = fit(list(predicted.values()), list(gold.values()))
    return PositionBias(gold, predicted, outside, right, alike, homogeneity([(right[x], gold[x]) for x in letters]))
