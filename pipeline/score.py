"""Whether an answer is right, how sure the accuracy over many is, and the report that says so."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import parse_json, write_atomic
from pipeline.prompt import ANSWER, LETTERS

MOST_GROUPS = 32
"""A breakdown field of more values than this (an image's id, a skill) is no breakdown."""
_SENTENCE = re.compile(re.escape(ANSWER) + r"([A-Z]|[0-9]+)\.?\s*$")


def strict_choice(text: str, choices: int, style: str) -> int | None:
    """The choice an answer names, or None.

    Strict: the text ends in the trained answer sentence with exactly one option, a letter or a 0-based index as
    `style` says.
    """
    found = _SENTENCE.search(text)
    if found is None:
        return None
    option = found[1]
    if option.isdigit() != (style == "index"):
        return None
    number = int(option) if style == "index" else LETTERS.index(option)
    return number if number < choices else None


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson, 1927), as fractions; (0, 1) for no trial."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


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
