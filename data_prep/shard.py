"""Command: turn a source into WebDataset tars with an index (`python -m data_prep.shard --help`).

Shard k of a split holds the source's rows k*S to (k+1)*S-1, so the files do not depend on the number of
workers, and a second run writes the same bytes. Each file is written under a temporary name and renamed; the
manifest comes last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from data_prep import cli
from data_prep.errors import UserError
from data_prep.example import Example, InvalidExample, image_extension
from data_prep.files import atomic_path, sha256, temporary_path, write_atomic
from data_prep.index import read_manifest, scan_tar, write_index, write_manifest
from data_prep.sources import SPLITS, Input, Rejected, Source, open_source, source_options
from data_prep.sources.folders import check_apart

TextOnly = Literal["keep", "skip"]
SplitOrAll = Literal["all", "train", "val", "test"]
_SKIPPED = "no image (text_only=skip)"


@dataclass(frozen=True)
class Shard:
    """One tar to be written."""

    folder: Path
    split: str
    number: int
    rows: range
    text_only: TextOnly

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}.tar"


@dataclass
class Written:
    """What came of a `Shard`."""

    entry: dict[str, Any] = field(default_factory=dict)
    """Its line in the manifest: name, bytes, sha256, samples."""
    records: np.ndarray | None = None
    """Its part of the index, (samples,) of `data_prep.index.RECORD`."""
    left_out: list[dict[str, Any]] = field(default_factory=list)
    """Its lines of the rejects file."""
    without_image: int = 0
    without_rationale: int = 0
    ids: list[str] = field(default_factory=list)


def build(
    source: str,
    out: Path,
    *,
    input: str | None = None,
    options: Mapping[str, Any] | None = None,
    split: SplitOrAll = "all",
    workers: int = 1,
    samples_per_shard: int = 1000,
    text_only: TextOnly = "keep",
) -> dict[str, Any]:
    """Write a source's splits as a shard folder (`data_prep.index`), and return its manifest.

    Args:
        source, input, options: as in `data_prep.sources.open_source`.
        out: the folder; splits that it already has are kept, and must have been made with the same settings from
            the same input. A hub dataset is the same by its name, files are by their content (not by where they
            lie; pictures in files of their own are not compared).
        split: one of the source's splits, or all of them.
        workers: processes that write; the files do not depend on it.
        samples_per_shard: source rows per tar.
        text_only: whether questions without a picture are kept or skipped.

    Raises:
        UserError: bad options or input, a source without rows, an `out` that cannot be written or is of other
        settings or input, a split of which nothing could be used, or a worker that was ended from outside.
    """
    if workers < 1 or samples_per_shard < 1:
        raise UserError("--workers and --samples_per_shard: expected 1 or more")
    table = open_source(source, input, options)
    check_apart(table.input(), out)
    if not table.splits():
        raise UserError(f"--source {source}: {input or 'it'} has no rows")
    settings = {
        "source": {
            "name": source,
            "input": _identity(table.input()),
            "options": source_options(source) | {name: str(value) for name, value in (options or {}).items()},
        },
        "samples_per_shard": samples_per_shard,
        "text_only": text_only,
    }
    splits = table.splits() if split == "all" else [split]
    if split != "all" and split not in table.splits():
        raise UserError(f"--split {split}: the source has {', '.join(table.splits())}")
    try:
        finished = _finished_splits(out, settings)
        _remove_unfinished(out)
        written = {name: _build_split(table, out, name, workers, samples_per_shard, text_only) for name in splits}
        manifest = write_manifest(out, {**settings, "splits": {**finished, **written}})
        _remove_stale_tars(out, manifest)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error})") from None
    return manifest


def _identity(input: Input) -> str | list[dict[str, Any]] | None:
    """What a manifest says of an input: of files their names, sizes and hashes, so that equal ones give equal bytes."""
    if not isinstance(input, dict):
        return input
    entries = []
    try:
        sizes = {name: path.stat().st_size for name, path in sorted(input.items())}
        with tqdm(total=sum(sizes.values()), desc="input", unit="B", unit_scale=True, delay=1) as progress:
            for name, size in sizes.items():
                entries.append({"name": name, "bytes": size, "sha256": sha256(input[name], progress.update)})
    except OSError as error:
        raise UserError(f"--input: cannot be read ({error})") from None
    return entries


def _finished_splits(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run left in `out`, which is made if it is not there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror})") from None
    if not (out / "manifest.json").exists():
        return {}
    manifest = read_manifest(out)
    if difference := _difference(manifest, settings):
        raise UserError(f"--out {out} was made {difference}; choose another folder")
    return manifest["splits"]


def _difference(made: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """In which way a folder was made other than is wanted now, None if in none."""
    before, now = made["source"], wanted["source"]
    options = [f"source option {name}" for name in now["options"]]
    pairs = [
        *((name, made[name], wanted[name]) for name in ("samples_per_shard", "text_only")),
        ("source", before["name"], now["name"]),
        *zip(options, map(before["options"].get, now["options"]), now["options"].values(), strict=True),
    ]
    for name, there, here in pairs:
        if there != here:
            return f"with {name} {there}, not {here}"
    if before["input"] == now["input"]:
        return None
    if not isinstance(before["input"], list) or not isinstance(now["input"], list):
        there, here = ("files" if isinstance(input, list) else input for input in (before["input"], now["input"]))
        return f"from the input {there}, not {here}"
    changes = list(_changes(before["input"], now["input"]))
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return f"from another input: {', '.join(changes[:3])}{more}"


def _changes(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    """What became of each file of an input that is not as it was."""
    there, here = ({entry["name"]: entry for entry in entries} for entries in (before, now))
    for name in sorted(there.keys() | here.keys()):
        if name not in here:
            yield f"{name} is missing now"
        elif name not in there:
            yield f"{name} is new"
        elif there[name]["bytes"] != here[name]["bytes"]:
            yield f"{name} has {here[name]['bytes']} bytes now, not {there[name]['bytes']}"
        elif there[name] != here[name]:
            yield f"{name} has other content now"


def _build_split(
    table: Source, out: Path, split: str, workers: int, samples_per_shard: int, text_only: TextOnly
) -> dict[str, Any]:
    """Write one split's tars, index and rejects; return its part of the manifest."""
    rows = table.rows(split)
    starts = range(0, rows, samples_per_shard)
    shards = [
        Shard(out, split, number, range(start, min(start + samples_per_shard, rows)), text_only)
        for number, start in enumerate(starts)
    ]
    results = []
    # Closed also where an interrupt comes between two results: the workers are not to wait for the traceback's end.
    with (
        contextlib.closing(_write_all(table, shards, workers)) as writing,
        tqdm(total=rows, desc=split, unit=" rows") as progress,
    ):
        for shard, result in zip(shards, writing, strict=True):
            results.append(result)
            progress.update(len(shard.rows))

    left_out = [line for result in results for line in result.left_out]
    lines = [json.dumps(line, sort_keys=True) + "\n" for line in left_out]
    write_atomic(out / f"{split}.rejects.jsonl", "".join(lines))
    reasons = Counter(line["reason"].partition(":")[0] for line in left_out)
    samples = sum(result.entry["samples"] for result in results)
    if not samples:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3)) or "it has no rows"
        raise UserError(f"nothing of the split {split} could be used: {why} (see {out / split}.rejects.jsonl)")

    index = out / f"{split}.index.npy"
    write_index(index, np.concatenate([result.records for result in results]))
    return {
        "shards": [result.entry for result in results],
        "index": {"name": index.name, "sha256": sha256(index)},
        "samples": samples,
        "counts": {
            "without_image": sum(result.without_image for result in results),
            "without_rationale": sum(result.without_rationale for result in results),
            "repeated_ids": samples - len({id for result in results for id in result.ids}),
            "skipped": reasons.pop(_SKIPPED, 0),
            "rejected": dict(sorted(reasons.items())),
        },
    }


def _write_all(table: Source, shards: list[Shard], workers: int) -> Generator[Written, None, None]:
    """Write the shards, in this process or in `workers` others; results come in the shards' order."""
    if workers == 1:
        yield from map(functools.partial(write_shard, table), shards)
        return
    # Not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    # Nothing is sent. Only this process holds the second end, so its death, too, tells the workers to end.
    told, end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(table, told))
    try:
        yield from pool.map(_write_in_worker, shards)
        pool.shutdown()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside, by a signal or for want of memory;"
            " start the same command again, with fewer --workers if memory is short"
        ) from None
    finally:
        end.close()
        pool.shutdown(cancel_futures=True)
        told.close()
        for shard in shards:  # what workers were writing as they ended
            temporary_path(shard.folder / shard.name).unlink(missing_ok=True)


_worker_table: Source


def _start_worker(table: Source, told: Connection) -> None:
    global _worker_table
    _worker_table = table
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which then ends the pool
    threading.Thread(target=_end_when_told, args=(told,), daemon=True).start()


def _end_when_told(told: Connection) -> None:
    told.poll(None)  # until the other end is closed
    os._exit(1)


def _write_in_worker(shard: Shard) -> Written:
    return write_shard(_worker_table, shard)


def write_shard(table: Source, shard: Shard) -> Written:
    """Write one tar, then read it back for the index."""
    path = shard.folder / shard.name
    written = Written()
    with atomic_path(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row, example in _examples(table, shard, written):
                key = f"{row:09d}"
                _add_member(tar, f"{key}.json", example.to_json())
                if example.image is not None:
                    _add_member(tar, f"{key}.{image_extension(example.image)}", example.image)
                written.without_image += example.image is None
                written.without_rationale += not example.rationale.strip()
                written.ids.append(example.id)
        written.records = scan_tar(temporary, shard.number)
        assert len(written.records) == len(written.ids)
        written.entry = {
            "name": shard.name,
            "bytes": temporary.stat().st_size,
            "sha256": sha256(temporary),
            "samples": len(written.ids),
            "index_sha256": hashlib.sha256(written.records.tobytes()).hexdigest(),
        }
    return written


def _examples(table: Source, shard: Shard, written: Written) -> Iterator[tuple[int, Example]]:
    """The usable Examples of a shard's rows; the others are noted in `written`."""
    for row in shard.rows:
        try:
            example = table.example(shard.split, row)
            example.validate()
        except (Rejected, InvalidExample) as error:
            id, reason = (error.id, error.reason) if isinstance(error, Rejected) else (example.id, str(error))
            written.left_out.append(_reject_line(table, shard, row, id, reason))
            continue
        if example.image is None and shard.text_only == "skip":
            written.left_out.append(_reject_line(table, shard, row, example.id, _SKIPPED))
            continue
        yield row, example


def _reject_line(table: Source, shard: Shard, row: int, id: str, reason: str) -> dict[str, Any]:
    return {"source": table.name, "split": shard.split, "row": row, "id": str(id), "reason": reason}


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults: time 0, owner 0, mode 0644
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _remove_unfinished(out: Path) -> None:
    """What a killed run was writing; `out` is for one run at a time."""
    for path in out.iterdir():
        if re.fullmatch(rf"({'|'.join(SPLITS)})(-[0-9]{{6}}\.tar|\.index\.npy|\.rejects\.jsonl)\.tmp", path.name):
            path.unlink()


def _remove_stale_tars(out: Path, manifest: dict[str, Any]) -> None:
    """A reader that takes SPLIT-*.tar must not find the tars of an earlier, longer run."""
    current = {shard["name"] for part in manifest["splits"].values() for shard in part["shards"]}
    for path in out.iterdir():
        if re.fullmatch(rf"({'|'.join(SPLITS)})-[0-9]{{6}}\.tar", path.name) and path.name not in current:
            path.unlink()


def summary(out: Path, manifest: dict[str, Any]) -> Iterable[str]:
    """The lines that the command prints at its end."""
    for split, part in manifest["splits"].items():
        counts = part["counts"]
        size = sum(shard["bytes"] for shard in part["shards"])
        yield (
            f"{split}: {part['samples']} samples in {len(part['shards'])} shards, {size / 1e6:.1f} MB"
            f" ({counts['without_image']} without image, {counts['without_rationale']} without rationale,"
            f" {counts['repeated_ids']} repeated ids); skipped {counts['skipped']},"
            f" rejected {sum(counts['rejected'].values())}"
        )
        for reason, count in counts["rejected"].items():
            yield f"  rejected {count}: {reason}"
    yield f"written to {out}"


def main(
    *,
    source: str,
    out: Path,
    input: str | None = None,
    split: SplitOrAll = "all",
    workers: int = 1,
    samples_per_shard: int = 1000,
    text_only: TextOnly = "keep",
    **options: str,
) -> None:
    """Turn a source into WebDataset tars with an index.

    Sources: m3cot and scienceqa (--input: a hub id, or a folder of parquet files; scienceqa also its original
    problems.json), jsonl (your own: --input FILE.jsonl), webdataset (--input: a tar or a folder of tars), and trails
    (generated), with options of its own: --grid --cell --hops --colours --mix --seed --train --val --test (see
    data_prep/sources/trails.py).

    Example: python -m data_prep.shard --source trails --train 2000 --val 100 --test 100 --out data/trails
    """
    own = [name for name in inspect.signature(main).parameters if name != "options"]
    if problems := cli.unknown_options(options, [*own, *source_options(source)]):
        raise UserError(*problems)
    with cli.terminated_as_interrupted():
        manifest = build(
            source, out, input=input, options=options, split=split,
            workers=workers, samples_per_shard=samples_per_shard, text_only=text_only,
        )  # fmt: skip
    for line in summary(out, manifest):
        print(line)


if __name__ == "__main__":
    cli.run(main)
