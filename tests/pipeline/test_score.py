"""Scoring: what counts as an answer, the interval, breakdowns, and the report's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline.score import (
    MOST_GROUPS,
    Report,
    breakdown,
    breakdown_fields,
    read_reports,
    strict_choice,
    wilson_interval,
    write_reports,
)


@pytest.mark.parametrize(
    ("text", "style", "choice"),
    [
        ("Therefore, the answer is B", "letter", 1),
        ("It is red.\nTherefore, the answer is D.\n", "letter", 3),
        ("Therefore, the answer is A\nTherefore, the answer is C", "letter", 2),
        ("Therefore, the answer is E", "letter", None),  # there are four choices
        ("Therefore, the answer is B or C", "letter", None),
        ("Therefore, the answer is b", "letter", None),
        ("Therefore, the answer is BA", "letter", None),
        ("the answer is B", "letter", None),
        ("B", "letter", None),
        ("", "letter", None),
        ("Therefore, the answer is 1", "letter", None),
        ("Therefore, the answer is 1", "index", 1),
        ("Therefore, the answer is 4", "index", None),
        ("Therefore, the answer is B", "index", None),
        ("Therefore, the answer is B. And so on", "letter", None),
    ],
)
def test_only_the_trained_sentence_counts(text: str, style: str, choice: int | None) -> None:
    assert strict_choice(text, 4, style) == choice


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(1, 10, 0.0179, 0.4042), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_interval_against_tabled_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


def test_interval_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_breakdown_counts_every_row_once() -> None:
    rows = [("b", True), ("a", False), ("b", False)]
    assert breakdown(rows) == {"a": (0, 1), "b": (1, 2)}


def test_fields_of_too_many_values_are_no_breakdown() -> None:
    rows = [{"topic": f"t{i % 3}", "image_id": str(i)} for i in range(MOST_GROUPS + 1)]
    assert breakdown_fields(rows) == ["topic"]
    assert breakdown_fields([{"a": ""}, {"b": "x"}]) == ["a", "b"]


def test_reports_are_read_as_written(tmp_path: Path) -> None:
    assert read_reports(tmp_path) == []
    report = Report("latent", 3, 10, 6, 1, 10.0, None, {"topic": {"x": (6, 10)}})
    write_reports([report], tmp_path)
    found = read_reports(tmp_path)[0]
    assert (found.accuracy, found.interval, found.seconds) == (0.6, wilson_interval(6, 10), None)
    (tmp_path / "report.json").write_text('[{"name": "latent"}]')
    with pytest.raises(UserError, match="report.json is damaged"):
        read_reports(tmp_path)
