"""Files that are either whole or absent, and what reading them takes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def temporary_path(path: Path) -> Path:
    """Where `path` is while it is being written."""
    return path.with_name(f"{path.name}.tmp")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there is flushed and takes `path`'s place.

    After an exception `path` is as it was, and the temporary file is gone.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, mark: str = "writing") -> Iterator[Path]:
    """Yield an empty folder beside `path`, which takes its name at the end; after an exception it is gone.

    Where there is a folder at `path` with anything in it, that stays, and an OSError is raised.
    """
    writing = path.with_name(f"{path.name}.{mark}")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        yield writing
        os.rename(writing, path)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole small file (text as UTF-8) through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def parse_json(content: bytes | str) -> Any:
    """Value of a JSON text.  Raises ValueError for whatever is none, nesting beyond Python's depth included."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256(path: Path, progress: Callable[[int], object] = int) -> str:
    """Hexadecimal digest of a file; `progress` is told the size of every block that was read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
