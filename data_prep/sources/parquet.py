"""Parquet tables by split, from the Hugging Face hub or a local folder: shared by m3cot and scienceqa."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import UserError
from data_prep.sources import SPLITS, Input, Rejected, read_image
from data_prep.sources.folders import SPLIT_WORDS, files_below, files_by_split

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]


class ParquetSource:
    """What sources of parquet tables share; each says how a row becomes an example."""

    def __init__(self, tables: dict[str, Dataset], input: str) -> None:
        """`input` is what the tables are of; as a folder it is also where relative paths of pictures start."""
        self._tables, self._input, self._folder = tables, input, Path(input).expanduser()

    def input(self) -> Input:
        if not self._folder.is_dir():
            return self._input
        return {file.relative_to(self._folder).as_posix(): file for file in files_below(self._folder, ".parquet")}

    def splits(self) -> list[str]:
        return list(self._tables)

    def rows(self, split: str) -> int:
        return len(self._tables[split])

    def _cells(self, split: str, row: int) -> dict[str, Any]:
        """The row's plain values by column.  Raises Rejected where they cannot be read."""
        try:
            return self._tables[split][row].to_pylist()[0]
        except Exception as error:  # such as text that is no UTF-8
            raise Rejected(f"{split}-{row}", f"row cannot be read: {error}") from error


def load_tables(input: str, columns: Collection[str]) -> dict[str, Dataset]:
    """Open the tables of a dataset; pictures stay the bytes that they are.

    Args:
        input: a hub id such as `owner/name`, or a folder with parquet files named after their split
            (`data/train-00000-of-00002.parquet`, `validation.parquet`, `test/0.parquet`).
        columns: those that each table must have; one of them is `image`.

    Returns:
        Tables by train, val and test, in this order; a split of local files without rows is left out. They are
        read from the datasets library's own cache (`HF_HOME` moves it), so that nothing is written beside the input.

    Raises:
        UserError: the input cannot be read, columns are missing, or `image` holds no pictures.
    """
    import datasets  # a second to import, needed by two sources only

    path = Path(input).expanduser()
    if not path.is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", input):
        raise UserError(f"--input {input}: neither a folder nor a hub id such as owner/name")
    try:
        if path.is_dir():
            files = _files_with_rows(path)
            found = datasets.load_dataset("parquet", data_files=files) if files else {}
        else:
            found = datasets.load_dataset(input)
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many kinds, from the network's to the parquet reader's
        cause = error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(error.__cause__, Exception):
            cause = error.__cause__  # the library's own line says no more than that it failed
        reason = str(cause).partition("\n")[0]
        raise UserError(f"--input {input}: cannot be loaded ({type(cause).__name__}: {reason})") from error

    tables = {SPLIT_WORDS[name]: table for name, table in found.items() if name in SPLIT_WORDS}
    for split, table in tables.items():
        if missing := sorted(set(columns) - set(table.column_names)):
            raise UserError(f"--input {input}: the split {split} has no column {', '.join(missing)}")
        try:
            table = table.select_columns(list(columns)).cast_column("image", datasets.Image(decode=False))
            # plain values: the files could say of any column that its bytes are to be decoded as they are read
            tables[split] = table.with_format("arrow")
        except Exception as error:  # of many kinds here too
            raise UserError(f"--input {input}: the column image of the split {split} holds no pictures") from error
    if not tables and not path.is_dir():
        raise UserError(f"--input {input}: no split is called {', '.join(SPLIT_WORDS)}")
    return {split: tables[split] for split in SPLITS if split in tables}


def _files_with_rows(folder: Path) -> dict[str, list[str]]:
    """The parquet files by split, without the files that have no rows: the datasets library cannot open such a file."""
    import pyarrow.parquet

    kept = {
        split: [str(file) for file in files if pyarrow.parquet.read_metadata(file).num_rows]
        for split, files in files_by_split(folder, ".parquet").items()
    }
    return {"validation" if split == "val" else split: files for split, files in kept.items() if files}


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
