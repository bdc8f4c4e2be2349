"""Counting equal digests in files of any length, with memory for a part of them.

Digests are uniformly distributed, so their leading bits share them out into buckets of about equal size. The files are
read once for every bucket; what repeats is folded block by block and does not fill a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from data_prep.example import HASH_BYTES
from data_prep.files import atomic_path

DIGEST = np.dtype(f"S{HASH_BYTES}")
"""A digest as numpy sorts it: as bytes, those of equal length."""

BUCKET = 2**19
"""Digests that are held at a time; counting them takes some 60 MiB."""

_BLOCK = 2**15
"""Records that are read at a time."""

Digests = Callable[[], Iterable[np.ndarray]]
"""Reads a file's digests from its start, in blocks of (n,) `DIGEST`."""


def digests_of(path: Path, field: str) -> Digests:
    """The digests in one field of a .npy file of records."""

    def read() -> Iterator[np.ndarray]:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            _, _, dtype = np.lib.format.read_array_header_1_0(file)
            while len(block := np.fromfile(file, dtype, _BLOCK)):
                yield np.ascontiguousarray(block[field]).view(DIGEST)

    return read


def counted(files: Mapping[str, Digests], total: int) -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The different digests of each file, sorted, with how often each occurs: bucket by bucket, in rising order.

    total: digests of all files together, at least about.
    """
    buckets = min(2**16, -(-total // BUCKET) or 1)
    for bucket in range(buckets):
        yield {name: _count(_of_bucket(block, bucket, buckets) for block in read()) for name, read in files.items()}


def _of_bucket(block: np.ndarray, bucket: int, buckets: int) -> np.ndarray:
    if buckets == 1:
        return block
    leading = block.view(">u2").reshape(len(block), -1)[:, 0].astype(np.int64)
    return block[leading * buckets >> 16 == bucket]


def _count(blocks: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    parts = [np.unique(block, return_counts=True) for block in blocks]
    if not parts:
        return np.empty(0, DIGEST), np.empty(0, np.int64)
    digests, places = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    counts = np.zeros(len(digests), np.int64)
    np.add.at(counts, places, np.concatenate([part[1] for part in parts]))
    return digests, counts


def repeated(read: Digests, total: int) -> int:
    """How many digests of a file are there before."""
    return sum(int(counts.sum()) - len(counts) for found in counted({"": read}, total) for _, counts in found.values())


def shared(files: Mapping[str, Digests], total: int) -> dict[str, tuple[int, dict[str, int]]]:
    """By file: how many of its digests are there before, and by other file how many of its digests are there, too."""
    duplicates = dict.fromkeys(files, 0)
    also_in = {name: {other: 0 for other in files if other != name} for name in files}
    for found in counted(files, total):
        for name, (digests, counts) in found.items():
            duplicates[name] += int(counts.sum()) - len(counts)
            for other in also_in[name]:
                both = np.isin(digests, found[other][0], assume_unique=True)
                also_in[name][other] += int(counts[both].sum())
    return {name: (duplicates[name], also_in[name]) for name in files}


def write_sorted(path: Path, read: Digests, total: int) -> None:
    """Write the different digests of a file in order, nothing else, for `is_in`."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        for found in counted({"": read}, total):
            file.write(found[""][0].tobytes())


def open_sorted(path: Path) -> np.ndarray:
    """(n,) `DIGEST`, mapped from what `write_sorted` wrote."""
    return np.memmap(path, dtype=DIGEST, mode="r")


def is_in(digest: bytes, ordered: np.ndarray) -> bool:
    """Whether `ordered`, (n,) sorted `DIGEST`, holds a digest."""
    wanted = np.array(digest, DIGEST)
    at = int(np.searchsorted(ordered, wanted))
    return at < len(ordered) and bool(ordered[at] == wanted)
