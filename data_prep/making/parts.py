"""One shard of a folder that is being made: its tar, and what a run that goes on later must know of it.

    SPLIT-000000.tar      as it will be in the folder
    SPLIT-000000.npy      one `PART` per sample: the shard's part of the index, and of each id a digest
    SPLIT-000000.json     a `Record`, written last; a shard without it is unfinished

They lie in `PARTS` inside the folder until all of it is written (`data_prep.making.publish`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_prep.errors import UserError
from data_prep.example import HASH_BYTES, Example, InvalidExample, image_extension, question_hash, shortened
from data_prep.files import atomic_path, parse_json, sha256, write_atomic
from data_prep.index import RECORD, scan_tar, write_records
from data_prep.making.crew import Progress
from data_prep.making.duplicates import is_in, open_sorted
from data_prep.sources import Rejected, Source

TextOnly = Literal["keep", "skip"]
SKIPPED = "no image (text_only=skip)"
ALSO_IN = "also in {}"
"""Reason of a training example that is left out because a held-out split asks the same."""

PARTS = ".parts"
_COLUMNS = list(RECORD.names or ())
PART = np.dtype([*((name, RECORD[name]) for name in _COLUMNS), ("id", f"V{HASH_BYTES}")])


@dataclass(frozen=True)
class Shard:
    """One tar to be written."""

    folder: Path
    """Where parts are kept."""
    split: str
    number: int
    rows: range
    text_only: TextOnly
    made_from: str
    """Digest of all that decides what comes of these rows: another one's parts are not kept."""
    held_out: tuple[tuple[str, Path], ...] = ()
    """Splits whose questions are left out of this one, each with the sorted digests of its questions."""

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.split}-{self.number:06d}{suffix}"


@dataclass
class Record:
    """What came of a `Shard`."""

    made_from: str
    entry: dict[str, Any] = field(default_factory=dict)
    """Its line in the manifest: `data_prep.index.ShardEntry`."""
    part_sha256: str = ""
    without_image: int = 0
    without_rationale: int = 0
    rejects: list[dict[str, Any]] = field(default_factory=list)
    """Its lines of rejects.jsonl."""


def make_shard(table: Source, shard: Shard, progress: Progress) -> bool:
    """See to it that a shard is there and finished; whether it was so before, and every byte of it as written."""
    if _is_finished(shard):
        progress(len(shard.rows))
        return True
    shard.path(".json").unlink(missing_ok=True)
    record = Record(shard.made_from)
    with atomic_path(shard.path(".tar")) as temporary:
        ids = _write_tar(temporary, _examples(table, shard, record, progress), record)
        records = scan_tar(temporary, shard.number)
        record.entry = {
            "name": shard.path(".tar").name,
            "bytes": temporary.stat().st_size,
            "sha256": sha256(temporary),
            "samples": len(ids),
            "index_sha256": hashlib.sha256(records.tobytes()).hexdigest(),
        }
    part = np.zeros(len(ids), PART)
    part[_COLUMNS], part["id"] = records[_COLUMNS], np.array(ids, PART["id"])
    write_records(shard.path(".npy"), [part], len(part), PART)
    record.part_sha256 = sha256(shard.path(".npy"))
    write_atomic(shard.path(".json"), json.dumps(vars(record)))
    return False


def _write_tar(path: Path, examples: Iterator[tuple[int, Example]], record: Record) -> list[bytes]:
    """Write the samples of a shard and count them in `record`; returns a digest of each one's id."""
    ids = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, example in examples:
            _add_member(tar, f"{_key(row)}.json", example.to_json())
            if example.image is not None:
                _add_member(tar, f"{_key(row)}.{image_extension(example.image)}", example.image)
            record.without_image += example.image is None
            record.without_rationale += not example.rationale.strip()
            ids.append(hashlib.blake2b(example.id.encode(), digest_size=HASH_BYTES).digest())
    return ids


def _is_finished(shard: Shard) -> bool:
    """Whether a shard's files are there, from this run or an earlier one's, and still as they were written."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        record = read_record(shard)
        sums = sha256(shard.path(".tar")), sha256(shard.path(".npy"))
        return record.made_from == shard.made_from and sums == (record.entry["sha256"], record.part_sha256)
    return False


def read_record(shard: Shard) -> Record:
    """The record of a shard.  Raises OSError, ValueError or TypeError where there is none."""
    return Record(**parse_json(shard.path(".json").read_bytes()))


def read_part(shard: Shard) -> np.ndarray:
    """(samples,) of `RECORD`: a shard's part of the index."""
    part = np.load(shard.path(".npy"), allow_pickle=False)
    records = np.zeros(len(part), RECORD)
    records[_COLUMNS] = part[_COLUMNS]
    return records


def _examples(table: Source, shard: Shard, record: Record, progress: Progress) -> Iterator[tuple[int, Example]]:
    """The usable Examples of a shard's rows; the others are noted in `record`."""
    held_out = [(split, open_sorted(path)) for split, path in shard.held_out]
    for row in shard.rows:
        progress(1)
        try:
            example = _read(table, shard.split, row)
            example.validate()
        except (Rejected, InvalidExample) as error:
            id, reason = (error.id, error.reason) if isinstance(error, Rejected) else (example.id, str(error))
        else:
            reason, id = _left_out(example, shard.text_only, held_out), example.id
            if not reason:
                yield row, example
                continue
        line = {"source": table.name, "split": shard.split, "key": _key(row), "row": row, "id": shortened(str(id))}
        record.rejects.append(line | {"reason": reason})


def _read(table: Source, split: str, row: int) -> Example:
    try:
        return table.example(split, row)
    except OSError as error:  # not to be taken for one of the folder that is written
        raise UserError(f"--source {table.name}: row {row} of {split} cannot be read ({error})") from None


def _left_out(example: Example, text_only: TextOnly, held_out: list[tuple[str, np.ndarray]]) -> str:
    """Why a sound Example is not wanted, empty where it is."""
    if example.image is None and text_only == "skip":
        return SKIPPED
    if held_out:
        digest = question_hash(example.to_record(), example.image or b"")
        return next((ALSO_IN.format(split) for split, digests in held_out if is_in(digest, digests)), "")
    return ""


def _key(row: int) -> str:
    return f"{row:09d}"


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults: time 0, owner 0, mode 0644
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
