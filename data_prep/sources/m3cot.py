"""M3CoT: questions of many domains with long rationales (hub id LightChen2333/M3CoT, or parquet files)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.example import Example
from data_prep.sources import answer_index, choice_texts, rejecting, text
from data_prep.sources.parquet import image_bytes, load_tables

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

HUB_ID = "LightChen2333/M3CoT"
FIELDS = ("domain", "topic", "category", "image_id")
COLUMNS = ("id", "image", "question", "choices", "context", "answer", "rationale", *FIELDS)


class M3CoT:
    """The source; rows are those of the parquet files, the answer is a letter there."""

    name = "m3cot"

    def __init__(self, tables: dict[str, Dataset], folder: Path) -> None:
        """`folder` is where relative paths of pictures start."""
        self._tables, self._folder = tables, folder

    def splits(self) -> list[str]:
        return list(self._tables)

    def rows(self, split: str) -> int:
        return len(self._tables[split])

    def example(self, split: str, row: int) -> Example:
        cells = self._tables[split][row]
        with rejecting(cells["id"]):
            return Example(
                id=text(cells["id"]), dataset=self.name, split=split,
                question=text(cells["question"]), choices=choice_texts(cells["choices"]),
                answer=answer_index(cells["answer"]), rationale=text(cells["rationale"]),
                context=text(cells["context"]), image=image_bytes(cells["image"], self._folder),
                fields={name: str(text(cells[name])) for name in FIELDS},
            )  # fmt: skip


def open_table(input: str | None) -> M3CoT:
    """Open a hub id or a local folder; see `load_tables` for the errors."""
    input = input or HUB_ID
    return M3CoT(load_tables(input, COLUMNS), Path(input).expanduser())
