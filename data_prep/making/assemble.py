"""From the parts of a split (`data_prep.making.parts`) to its index, rejects and counts, one part at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.files import atomic_path, parse_json, sha256
from data_prep.index import REMAKE, write_records
from data_prep.making.duplicates import digests_of, repeated, shared
from data_prep.making.parts import SKIPPED, Shard, read_part, read_record
from data_prep.sources import SPLITS

REJECTS = "rejects.jsonl"


def assemble(split: str, shards: Sequence[Shard], folder: Path) -> dict[str, Any]:
    """Write a split's index into `folder`; return its part of the manifest, without what other splits tell of it.

    Raises:
        UserError: nothing of the split could be used.
    """
    entries, reasons, without = [], Counter[str](), Counter[str]()
    for shard in shards:
        record = read_record(shard)
        entries.append(record.entry)
        reasons.update(line["reason"].partition(":")[0] for line in record.rejects)
        without.update(image=record.without_image, rationale=record.without_rationale)
    rows, samples = sum(len(shard.rows) for shard in shards), sum(entry["samples"] for entry in entries)
    assert rows == samples + reasons.total()
    if not samples:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3)) or "it has no rows"
        listed = folder.with_name(REJECTS)
        write_rejects(listed, {split: shards})
        raise UserError(f"nothing of the split {split} could be used: {why} (see {listed})")

    def ids() -> Iterator[np.ndarray]:
        for shard in shards:
            yield from digests_of(shard.path(".npy"), "id")()

    index = folder / f"{split}.index.npy"
    write_records(index, map(read_part, shards), samples)
    return {
        "shards": entries,
        "index": {"name": index.name, "sha256": sha256(index)},
        "samples": samples,
        "counts": {
            "rows": rows,
            "without_image": without["image"],
            "without_rationale": without["rationale"],
            "repeated_ids": repeated(ids, samples),
            "skipped": reasons.pop(SKIPPED, 0),
            "rejected": dict(sorted(reasons.items())),
        },
    }


def count_duplicates(splits: Mapping[str, dict[str, Any]], indexes: Mapping[str, Path]) -> None:
    """Add to the counts of all splits how many samples ask the same as one before, and as one of another split."""
    questions = {split: digests_of(indexes[split], "question") for split in splits}
    found = shared(questions, sum(part["samples"] for part in splits.values()))
    for split, part in splits.items():
        duplicates, also_in = found[split]
        part["counts"] = part["counts"] | {"duplicates": duplicates, "also_in": also_in}


def write_rejects(path: Path, made: Mapping[str, Sequence[Shard]], older: Path | None = None) -> dict[str, Any]:
    """Write the rejects of the splits `made`, of others those in `older`; returns the manifest's entry."""
    rows = 0
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for split in SPLITS:
            lines = _lines_of(made[split]) if split in made else _older_lines(older, split)
            for line in lines:
                file.write(line)
                rows += 1
    return {"name": path.name, "sha256": sha256(path), "rows": rows}


def _lines_of(shards: Sequence[Shard]) -> Iterator[str]:
    for shard in shards:
        for line in read_record(shard).rejects:
            yield json.dumps(line, sort_keys=True) + "\n"


def _older_lines(older: Path | None, split: str) -> Iterator[str]:
    if older is not None:
        with open(older, encoding="utf-8") as file:
            yield from (line for line in file if parse_json(line)["split"] == split)


def check_unchanged(path: Path, digest: str) -> Path:
    """A file of a finished folder, for use in another manifest.  Raises UserError if it is not as it was written."""
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {REMAKE}") from None
    if found != digest:
        raise UserError(f"{path} was changed after it was written; {REMAKE}")
    return path
