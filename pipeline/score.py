"""Whether an answer is right, and how sure the accuracy over many is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from pipeline.prompt import ANSWER, LETTERS

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
