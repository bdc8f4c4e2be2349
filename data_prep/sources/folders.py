"""Input folders whose files tell their split by their names."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from data_prep.errors import UserError

SPLIT_WORDS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
"""What files call a split, and its name here."""


def files_below(folder: Path, suffix: str) -> list[Path]:
    """The files with this suffix, at any depth, sorted."""
    return sorted(path for path in folder.rglob(f"*{suffix}") if path.is_file())


def files_by_split(folder: Path, suffix: str) -> dict[str, list[Path]]:
    """`files_below` by the split (train, val, test) that their name, or else their folder's, begins with.

    Raises:
        UserError: there are none, or one does not tell its split.
    """
    files: dict[str, list[Path]] = {}
    for path in files_below(folder, suffix):
        split = split_of(*path.relative_to(folder).parts)
        if split is None:
            raise UserError(f"--input {folder}: cannot tell the split of {path.name}; name it train, val or test")
        files.setdefault(split, []).append(path)
    if not files:
        raise UserError(f"--input {folder}: no {suffix.lstrip('.')} files in this folder")
    return files


def split_of(*parts: str) -> str | None:
    """The split that the last of a path's parts that names one begins with, such as train-00000.tar; None for none."""
    words = [re.split(r"[-_.]", part)[0].lower() for part in parts[::-1]]
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def check_apart(input: object, out: Path, written: Collection[str]) -> None:
    """Raise UserError where what is read lies where it would be replaced or removed.

    Those are tars, of which the ones of earlier runs go, and what is called as one of `written` or in such a folder.
    """
    folder = out.resolve()
    for path in input.values() if isinstance(input, dict) else ():
        if not (place := path.resolve()).is_relative_to(folder):
            continue
        if path.suffix == ".tar" or place.relative_to(folder).parts[0] in written:
            raise UserError(f"--out {out} holds the input {path.name}; choose another folder")
