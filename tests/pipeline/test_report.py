"""Breakdowns of an evaluation, and the report's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline.scoring.report import MOST_GROUPS, Report, breakdown, breakdown_fields, read_reports, write_reports
from pipeline.scoring.stats import wilson_interval


def test_breakdown_counts_every_row_once() -> None:
    rows = [("b", True), ("a", False), ("b", False)]
    assert breakdown(rows) == {"a": (0, 1), "b": (1, 2)}


def test_fields_of_too_many_values_are_no_breakdown() -> None:
    rows = [{"topic": f"t{i % 3}", "image_id": str(i)} for i in range(MOST_GROUPS + 1)]
    assert breakdown_fields(rows) == ["topic"]
    assert breakdown_fields([{"a": ""}, {"b": "x"}]) == ["a", "b"]


def test_breakdowns_as_text() -> None:
    """Of fields that questions differ in."""
    groups = {"topic": {"": (1, 4), "x": (6, 6)}, "grid": {"3": (7, 10)}}
    report = Report("latent", 3, 10, 7, 0, 10.0, None, groups)
    assert report.breakdowns() == ["latent by topic: (none) 25.0% of 4, x 100.0% of 6"]


def test_reports_are_read_as_written(tmp_path: Path) -> None:
    assert read_reports(tmp_path) == []
    report = Report("latent", 3, 10, 6, 1, 10.0, None, {"topic": {"x": (6, 10)}})
    write_reports([report], tmp_path)
    found = read_reports(tmp_path)[0]
    assert (found.accuracy, found.interval, found.seconds) == (0.6, wilson_interval(6, 10), None)
    (tmp_path / "report.json").write_text('[{"name": "latent"}]')
    with pytest.raises(UserError, match="report.json is damaged"):
        read_reports(tmp_path)
