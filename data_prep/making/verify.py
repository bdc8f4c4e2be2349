"""Checking a finished shard folder (`data_prep.index`) against every hash that was written with it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from data_prep.errors import UserError
from data_prep.example import content_hash, question_hash
from data_prep.files import sha256
from data_prep.index import RECORD, ShardEntry, manifest_text, read_manifest
from data_prep.making.crew import Progress, crew
from data_prep.sources import SPLITS


@dataclass(frozen=True)
class _File:
    """A file that is compared as a whole."""

    name: str
    sha256: str


@dataclass(frozen=True)
class _Tar:
    """A tar that is compared as a whole, in its part of the index, and sample by sample."""

    entry: ShardEntry
    index: str
    start: int
    """Position of its first sample in the index."""
    total: int
    """Samples in the index."""


def check_folder(folder: Path, workers: int = 1, tell: Callable[[str], object] = tqdm.write) -> str:
    """Recompute all hashes of a folder; `tell` is given each disagreement, with its file and key, in a fixed order.

    Returns:
        One line on what agrees.

    Raises:
        UserError: something disagrees, or the manifest cannot be read.
    """
    if workers < 1:
        raise UserError("--workers: expected 1 or more")
    manifest = read_manifest(folder)
    problems = 0
    samples = sum(part["samples"] for part in manifest["splits"].values())
    with (
        tqdm(total=samples, desc="verify", unit=" samples") as bar,
        crew(functools.partial(_check, folder), workers, bar) as work,
    ):
        found = itertools.chain([_of_manifest(folder, manifest)], work(_jobs(manifest)))
        for problem in itertools.chain.from_iterable(found):
            problems += 1
            tell(problem)
    if problems:
        raise UserError(f"{folder}: {problems} {'disagreement' if problems == 1 else 'disagreements'}, listed above")
    shards = [shard for part in manifest["splits"].values() for shard in part["shards"]]
    size = sum(shard["bytes"] for shard in shards)
    return f"{folder}: all of {samples} samples in {len(shards)} shards, {size / 1e6:.1f} MB, are as they were written"


def _jobs(manifest: dict[str, Any]) -> Iterator[_File | _Tar]:
    if rejects := manifest.get("rejects"):
        yield _File(rejects["name"], rejects["sha256"])
    for part in (manifest["splits"][split] for split in SPLITS if split in manifest["splits"]):
        yield _File(part["index"]["name"], part["index"]["sha256"])
        start = 0
        for entry in part["shards"]:
            yield _Tar(entry, part["index"]["name"], start, part["samples"])
            start += entry["samples"]


def _of_manifest(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """What the manifest's own figures, and the names in the folder, disagree in."""
    if (folder / "manifest.json").read_bytes() != manifest_text(manifest).encode():  # such as spaces, or a key twice
        yield "manifest.json: is not as it was written"
    for split, part in manifest["splits"].items():
        counts = part["counts"]
        if sum(shard["samples"] for shard in part["shards"]) != part["samples"]:
            yield f"manifest.json: the shards of {split} do not add up"
        if part["samples"] + counts["skipped"] + sum(counts["rejected"].values()) != counts.get("rows"):
            yield f"manifest.json: samples and rejects of {split} are not its rows"
    if "rejects" not in manifest:
        yield "manifest.json: names no file of rejects"
    named = {shard["name"] for part in manifest["splits"].values() for shard in part["shards"]}
    for path in sorted(folder.iterdir()):
        if re.fullmatch(rf"({'|'.join(SPLITS)})-[0-9]+\.tar", path.name) and path.name not in named:
            yield f"{path.name}: is not in the manifest"


def _check(folder: Path, job: _File | _Tar, progress: Progress) -> list[str]:
    """What disagrees in a file, a line each."""
    if isinstance(job, _File):
        problem = _of_file(folder / job.name, job.sha256)
        return [f"{job.name}: {problem}"] if problem else []
    name, samples = job.entry["name"], job.entry["samples"]
    problem = _of_file(folder / name, job.entry["sha256"], job.entry["bytes"])
    problems = [f"{name}: {problem}"] if problem else []
    try:
        records = _read_records(folder / job.index, job.start, samples, job.total)
        if hashlib.sha256(records.tobytes()).hexdigest() != job.entry["index_sha256"]:
            raise ValueError("is not as it was written")
        with open(folder / name, "rb") as file:
            for record in records:
                if problem := _of_sample(file.fileno(), record):
                    problems.append(f"{name}: {record['key'].decode()}: {problem}")
    except ValueError as error:
        problems.append(f"{job.index}: the part of {name} {error}")
    except OSError as error:
        if not problems:
            problems.append(f"{name}: its samples cannot be read ({error.strerror or error})")
    progress(samples)
    return problems


def _of_file(path: Path, digest: str, size: int | None = None) -> str:
    """What is wrong with a file as a whole, empty for nothing."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return f"has {found} bytes, not {size}"
        return "" if sha256(path) == digest else "is not as it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _read_records(path: Path, start: int, count: int, total: int) -> np.ndarray:
    """(count,) of `RECORD` from a position of an index.  Raises ValueError or OSError."""
    with open(path, "rb") as file:
        try:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # numpy reads the head as Python's grammar has it, with as many kinds of errors
            raise ValueError(f"cannot be read: {error}") from None
        if dtype != RECORD or shape != (total,):
            raise ValueError(f"cannot be read: it does not hold {total} records")
        file.seek(start * RECORD.itemsize, os.SEEK_CUR)
        return np.fromfile(file, RECORD, count)


def _of_sample(file: int, record: np.void) -> str:
    """What is wrong with a sample in the tar `file`, empty for nothing."""
    json_member = os.pread(file, int(record["json_size"]), int(record["json_offset"]))
    image_member = os.pread(file, int(record["image_size"]), int(record["image_offset"]))
    if content_hash(json_member, image_member) != record["hash"].tobytes():
        return "its content is not as it was written"
    try:
        asked = question_hash(json.loads(json_member), image_member)
    except (ValueError, TypeError, KeyError) as error:
        return f"not an Example: {error}"
    return "" if asked == record["question"].tobytes() else "its question's hash is not that of the index"
