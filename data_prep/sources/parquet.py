"""Parquet tables by split, from the Hugging Face hub or a local folder: shared by m3cot and scienceqa."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from data_prep.sources import SPLITS, read_image

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

_SPLIT_WORDS = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "dev": "val",
    "test": "test",
}


class ParquetSource:
    """What sources of parquet tables share; each says how a row becomes an example."""

    def __init__(self, tables: dict[str, Dataset], folder: Path) -> None:
        """`folder` is where relative paths of pictures start."""
        self._tables, self._folder = tables, folder

    def splits(self) -> list[str]:
        return list(self._tables)

    def rows(self, split: str) -> int:
        return len(self._tables[split])


def load_tables(input: str, columns: Collection[str]) -> dict[str, Dataset]:
    """Open the tables of a dataset; pictures stay the bytes that they are.

    Args:
        input: a hub id such as `owner/name`, or a folder with parquet files named after their split
            (`data/train-00000-of-00002.parquet`, `validation.parquet`, `test/0.parquet`).
        columns: those that each table must have; one of them is `image`.

    Returns:
        Tables by train, val and test, in this order. They are read from the datasets library's own cache
        (`HF_HOME` moves it), so that nothing is written beside the input.

    Raises:
        UserError: the input cannot be read, columns are missing, or `image` holds no pictures.
    """
    import datasets  # a second to import, needed by two sources only

    path = Path(input).expanduser()
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", input):
        raise UserError(f"--input {input}: neither a folder nor a hub id such as owner/name")
    try:
        if path.is_dir():
            files = {split: [str(file) for file in found] for split, found in _files_by_split(path).items()}
            found = datasets.load_dataset("parquet", data_files=files)
        else:
            found = datasets.load_dataset(input)
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many kinds, from the network's to the parquet reader's
        reason = str(error).partition("\n")[0]
        raise UserError(f"--input {input}: cannot be loaded ({type(error).__name__}: {reason})") from error

    tables = {_SPLIT_WORDS[name]: table for name, table in found.items() if name in _SPLIT_WORDS}
    for split, table in tables.items():
        if missing := sorted(set(columns) - set(table.column_names)):
            raise UserError(f"--input {input}: the split {split} has no column {', '.join(missing)}")
        try:
            tables[split] = table.cast_column("image", datasets.Image(decode=False))
        except Exception as error:  # of many kinds here too
            raise UserError(f"--input {input}: the column image of the split {split} holds no pictures") from error
    if not tables:
        raise UserError(f"--input {input}: no split is called {', '.join(_SPLIT_WORDS)}")
    return {split: tables[split] for split in SPLITS if split in tables}


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The parquet files below `folder` by the split that their name, or else their folder's, begins with."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        words = [re.split(r"[-_.]", part)[0].lower() for part in path.relative_to(folder).parts[::-1]]
        split = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)
        if split is None:
            raise UserError(f"--input {folder}: cannot tell the split of {path.name}; name it train, val or test")
        files.setdefault("validation" if split == "val" else split, []).append(path)
    if not files:
        raise UserError(f"--input {folder}: no parquet files in this folder")
    return files


def image_bytes(cell: dict[str, Any] | None, folder: Path) -> Any:
    """The bytes of an undecoded image cell, None for an empty one.

    A cell may hold nothing but the path of its picture, absolute or relative to the input `folder`.

    Raises:
        InvalidExample: the file cannot be read.
    """
    if not cell:
        return None
    if cell["bytes"] is None and cell["path"]:
        return read_image(folder / cell["path"], cell["path"])
    return cell["bytes"]
