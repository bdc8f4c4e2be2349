"""M3CoT: questions of many domains with long rationales (hub id LightChen2333/M3CoT, or parquet files)."""

from __future__ import annotations

from data_prep.example import Example
from data_prep.sources import answer_index, choice_texts, field_texts, id_text, rejecting, text
from data_prep.sources.parquet import ParquetSource, image_bytes, load_tables

HUB_ID = "LightChen2333/M3CoT"
FIELDS = ("domain", "topic", "category", "image_id")
COLUMNS = ("id", "image", "question", "choices", "context", "answer", "rationale", *FIELDS)


class M3CoT(ParquetSource):
    """The source; rows are those of the parquet files, the answer is a letter there."""

    name = "m3cot"

    def example(self, split: str, row: int) -> Example:
        cells = self._cells(split, row)
        with rejecting(cells["id"]):
            return Example(
                id=id_text(cells["id"]), dataset=self.name, split=split,
                question=text(cells["question"]), choices=choice_texts(cells["choices"]),
                answer=answer_index(cells["answer"]), rationale=text(cells["rationale"]),
                context=text(cells["context"]), image=image_bytes(cells["image"], self._folder),
                fields=field_texts({name: cells[name] for name in FIELDS}),
            )  # fmt: skip


def open_table(input: str | None) -> M3CoT:
    """Open a hub id or a local folder; see `load_tables` for the errors."""
    input = input or HUB_ID
    return M3CoT(load_tables(input, COLUMNS), input)
