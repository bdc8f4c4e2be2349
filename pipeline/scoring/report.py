"""The report of an evaluation: what it is broken down by, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import parse_json, write_atomic
from pipeline.scoring.stats import wilson_interval

MOST_GROUPS = 32
"""A breakdown field of more values than this (an image's id, a skill) is no breakdown."""


def breakdown(rows: Iterable[tuple[str, bool]]) -> dict[str, tuple[int, int]]:
    """group -> (right, total), groups in sorted order."""
    counts: dict[str, list[int]] = {}
    for group, right in rows:
        entry = counts.setdefault(group, [0, 0])
        entry[0] += right
        entry[1] += 1
    return {group: (counts[group][0], counts[group][1]) for group in sorted(counts)}


def breakdown_fields(rows: Sequence[dict[str, str]]) -> list[str]:
    """Names of the fields to break results down by: those that some row has, with at most MOST_GROUPS values."""
    values: dict[str, set[str]] = {}
    for fields in rows:
        for name, value in fields.items():
            values.setdefault(name, set()).add(value)
    return [name for name, found in values.items() if len(found) <= MOST_GROUPS]


@dataclass
class Report:
    """What one model did on a split."""

    name: str
    stage: int
    questions: int
    right: int
    skipped: int
    """Samples that could not be used; not counted as questions"""
    autoregressive_steps: float
    """Latent steps + generated tokens with eos, mean"""
    seconds: float | None
    """A question alone, median; none if none was timed"""
    groups: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """field -> value -> (right, questions)"""
    decoding: str = "greedy"
    """How tokens were chosen"""

    def breakdowns(self) -> list[str]:
        """A line for each field that questions differ in."""
        lines = []
        for name, groups in self.groups.items():
            if len(groups) > 1:
                parts = [f"{value or '(none)'} {right / of:.1%} of {of}" for value, (right, of) in groups.items()]
                lines.append(f"{self.name} by {name}: " + ", ".join(parts))
        return lines

    @property
    def accuracy(self) -> float:
        return self.right / max(1, self.questions)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.right, self.questions)


def write_reports(reports: Sequence[Report], folder: Path) -> None:
    """Write `report.json` of an evaluation."""
    write_atomic(folder / "report.json", json.dumps([asdict(r) for r in reports], indent=1) + "\n")


def read_reports(folder: Path) -> list[Report]:
    """The evaluation's reports; none where it has not been run.  Raises UserError for a damaged file."""
    path = folder / "report.json"
    if not path.is_file():
        return []
    try:
        return [Report(**report) for report in parse_json(path.read_bytes())]
    except (TypeError, ValueError):
        raise UserError(f"{path} is damaged: run the evaluation again") from None
