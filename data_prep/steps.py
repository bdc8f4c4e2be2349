"""A rationale as reasoning steps: the unit that the curriculum replaces by latent steps."""

from __future__ import annotations

SEPARATOR = ". "


def split_steps(rationale: str) -> list[str]:
    """Newlines become spaces; the text is split at ". "; pieces of nothing but whitespace are dropped."""
    pieces = rationale.replace("\n", " ").split(SEPARATOR)
    return [piece for piece in pieces if piece.strip()]


def merge_steps(steps: list[str], groups: int = 3) -> list[str]:
    """At most `groups` steps: more are merged to consecutive groups; earlier groups take the remainder."""
    if len(steps) <= groups:
        return list(steps)
    size, remainder = divmod(len(steps), groups)
    merged, start = [], 0
    for group in range(groups):
        end = start + size + (group < remainder)
        merged.append(SEPARATOR.join(steps[start:end]))
        start = end
    return merged
