"""What is said of a model whose weights are not all there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from data_prep.errors import UserError


def incomplete(path: str | Path, names: Iterable[str]) -> UserError:
    """That the weights `names` are missing in `path`, or of another shape than its config says."""
    every = sorted(set(names))
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return UserError(f"{path}: {len(every)} weights missing or of another shape: {', '.join(every[:3])}{more}")
