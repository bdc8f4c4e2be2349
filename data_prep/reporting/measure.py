"""What a shard folder holds, in numbers: from its manifest, its index, and an even sample of its rows.

Memory does not grow with the folder: indexes are mapped and gone through in parts, and no more rows are read than
asked for.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.errors import UserError
from data_prep.example import Example
from data_prep.files import parse_json
from data_prep.index import read_manifest
from data_prep.making.assemble import REJECTS
from data_prep.reader import BadSample, ShardIndex, open_split
from data_prep.storage import open_storage

Counts = Counter[int]
"""Value -> how often"""
NAMED = 20
"""Most bad samples of a split that are named."""
SHOWN = 3
"""Rejects that are shown of each reason in each split."""
ODD = 4
"""Standard errors from chance above which the position of right answers is worth a look."""
LONGEST_LINE = 2**20
_ORDER = ("train", "val", "test")


@dataclass
class SplitMeasure:
    """One split."""

    name: str
    samples: int
    shards: int
    bytes: int
    counts: dict[str, Any]
    """The manifest's"""
    steps: Counts = field(default_factory=Counter)
    """Reasoning steps before merging, of all samples"""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(width, height) of all pictures in pixels"""
    rows: int = 0
    """Rows that were read; what follows is of these"""
    lengths: dict[str, Counts] = field(default_factory=dict)
    """question, choices, rationale, answer (the right choice's text), and context of the rows that have one"""
    fields: dict[str, Counter[str]] = field(default_factory=dict)
    """Breakdown field -> value -> rows"""
    answers: dict[int, Counts] = field(default_factory=dict)
    """Number of choices -> position of the right one, from 0"""
    bad: int = 0
    """Rows that could not be read, and all those of damaged parts of the index"""
    bad_named: list[str] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)
    """Shards whose part of the index is"""

    def add(self, example: Example, count: Callable[[str], int]) -> None:
        """Take a row into the numbers; count: the length of a text.

        Raises ValueError for one that breaks the rules of an Example.
        """
        if not 0 <= example.answer < len(example.choices):
            raise ValueError(f"answer outside the choices: {example.answer} of {len(example.choices)}")
        texts = {
            "question": example.question,
            "choices": "\n".join(example.choices),
            "rationale": example.rationale,
            "answer": example.choices[example.answer],
        } | ({"context": example.context} if example.context else {})
        lengths = {name: count(text) for name, text in texts.items()}
        for name, length in lengths.items():
            self.lengths.setdefault(name, Counter())[length] += 1
        for name, value in example.fields.items():
            self.fields.setdefault(name, Counter())[value] += 1
        self.answers.setdefault(len(example.choices), Counter())[example.answer] += 1
        self.rows += 1

    def add_bad(self, what: str, rows: int = 1) -> None:
        """Count rows that cannot be used; the first are named."""
        self.bad += rows
        if len(self.bad_named) < NAMED:
            self.bad_named.append(what)


@dataclass
class Folder:
    """A shard folder and what was measured of it."""

    location: str
    manifest: dict[str, Any]
    indexes: dict[str, ShardIndex]
    """The splits that can be opened, train first"""
    broken: list[str]
    """Why others cannot"""
    splits: dict[str, SplitMeasure]
    duplicates: dict[str, int] = field(default_factory=dict)
    """Split -> samples that ask what another one of the split asks already"""
    also_in: dict[tuple[str, str], int] = field(default_factory=dict)
    """(split, other split) -> samples of the first that ask what one of the other asks"""
    rejects: list[dict[str, str]] = field(default_factory=list)
    """Some rows that are not in the tars: split, row or key, id, reason"""


def open_folder(location: str) -> Folder:
    """Open all splits of a shard folder, and count what the index and manifest say.

    Raises:
        UserError: no sound shard folder, or none of its splits can be opened.
    """
    manifest = read_manifest(location)
    folder = Folder(location, manifest, {}, [], {})
    for name in sorted(manifest["splits"], key=lambda name: (name not in _ORDER, (*_ORDER, name).index(name), name)):
        part = manifest["splits"][name]
        try:
            folder.indexes[name] = open_split(location, name)
        except UserError as error:
            folder.broken += error.lines
            continue
        size = sum(shard["bytes"] for shard in part["shards"])
        folder.splits[name] = SplitMeasure(name, part["samples"], len(part["shards"]), size, part["counts"])
        folder.duplicates[name] = part["counts"].get("duplicates", 0)
        folder.also_in |= {(name, other): count for other, count in part["counts"].get("also_in", {}).items()}
    if not folder.indexes:
        raise UserError(*(folder.broken or [f"{location} has no split"]))
    return folder


def measure_index(index: ShardIndex, split: SplitMeasure) -> None:
    """Count steps and picture sizes of all samples; those of damaged parts of the index count as bad."""
    start = 0
    for shard, samples in enumerate(index.shard_sizes):
        part, start = index.records[start : start + samples], start + samples
        if problem := index.problem_of_shard(shard):
            split.add_bad(problem, samples)
            split.damaged.add(shard)
            continue
        steps, often = np.unique(part["steps"], return_counts=True)
        split.steps.update(dict(zip(steps.tolist(), often.tolist(), strict=True)))
        pictures = part[part["extension"] > 0]
        sizes, often = np.unique(pictures["width"].astype(np.uint32) << 16 | pictures["height"], return_counts=True)
        for size, count in zip(sizes.tolist(), often.tolist(), strict=True):
            split.sizes[size >> 16, size & 0xFFFF] += count


def spread(samples: int, rows: int) -> np.ndarray:
    """Positions of at most `rows` samples, evenly spread over a split; all where it has no more."""
    return np.unique(np.linspace(0, max(0, samples - 1), min(samples, rows)).astype(np.int64))


def measure_rows(index: ShardIndex, split: SplitMeasure, rows: int, count: Callable[[str], int]) -> None:
    """Read at most `rows` samples; count: the length of a text.  One that cannot be used is counted and named."""
    for position in tqdm(spread(len(index), rows), desc=split.name, unit=" rows", delay=1):
        if index.shard_of(position) in split.damaged:
            continue  # counted already
        try:
            split.add(index.read(position), count)
        except BadSample as error:
            split.add_bad(str(error))
        except Exception as error:  # of many kinds: what odd records make the libraries raise
            split.add_bad(f"{index.key(position)}: {error}")


def read_rejects(folder: Folder) -> Iterator[dict[str, str]]:
    """The first rejects of each split and reason, as texts; none where the files are gone or hold something else."""
    seen = Counter[tuple[str, str]]()
    with contextlib.suppress(OSError, UserError):  # not there, or out of reach: the manifest has the counts
        for line in _lines(folder.location, REJECTS):
            entry = {key: str(value) for key, value in _entry(line).items()}
            kind = (entry.get("split", ""), entry.get("reason", "").partition(":")[0])
            seen[kind] += 1
            if entry and seen[kind] <= SHOWN:
                yield entry


def _lines(location: str, name: str) -> Iterator[bytes]:
    path = Path(location) / name
    if not path.is_file():
        yield from open_storage(location).read(name).splitlines()
        return
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_LINE):
            yield line


def _entry(line: bytes) -> dict[str, Any]:
    try:
        entry = parse_json(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def quantile(counts: Counts, share: float) -> int:
    """The smallest value that at least this share of all is not above; 0 of nothing."""
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    return values[int(np.searchsorted(ends, share * ends[-1] - 1e-9))] if values else 0


def mean(counts: Counts) -> float:
    """Of all values; 0 of nothing."""
    return sum(value * often for value, often in counts.items()) / max(1, counts.total())


def z_score(right: int, rows: int, choices: int) -> float:
    """By how many standard errors an answer's position is away from its share by chance."""
    chance = 1 / choices
    return (right / rows - chance) / (chance * (1 - chance) / rows) ** 0.5 if choices > 1 else 0.0
