"""Command: turn a source into WebDataset tars with an index (`python -m data_prep.shard --help`).

Shard k of a split holds the source's rows k*S to (k+1)*S-1, so the files do not depend on the number of workers, and a
second run writes the same bytes. A run that was stopped, however, goes on from the shards that it had finished
(`data_prep.making.parts`); until all of them are there, an older folder stays as it was (`data_prep.making.publish`).
"""

from __future__ import annotations

import errno
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm  # type: ignore[import-untyped]

from data_prep import cli
from data_prep.errors import UserError
from data_prep.index import read_manifest
from data_prep.making.assemble import REJECTS, assemble, check_unchanged, count_duplicates, write_rejects
from data_prep.making.crew import crew
from data_prep.making.duplicates import digests_of, write_sorted
from data_prep.making.made_from import MadeFrom, difference, fingerprint, made_from
from data_prep.making.parts import ALSO_IN, PARTS, Shard, TextOnly, make_shard
from data_prep.making.publish import check_ours, locked, publishing, recover, remove_unfinished, settle, tidy
from data_prep.making.verify import check_folder
from data_prep.sources import SPLITS, Source, open_source, source_options
from data_prep.sources.folders import check_apart

SplitOrAll = Literal["all", "train", "val", "test"]
Leaked = Literal["keep", "drop"]
_HELD_OUT = ("test", "val")
"""Splits whose questions training is not to see, in the order in which a reason names them."""


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
    leaked: Leaked = "keep",
    say: Callable[[str], object] = len,
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
        leaked: whether training examples that ask the same as one of test or val (`data_prep.example.question_hash`)
            are kept or dropped. To drop them, the splits test and val must be in `out` or made by the same call.
        say: is told what was kept of a run that was stopped.

    Raises:
        UserError: bad options or input, a source without rows, an `out` that cannot be written, is written by another
        run or is of other settings or input, a split of which nothing could be used, or a worker that was ended from
        outside.
    """
    if workers < 1 or samples_per_shard < 1:
        raise UserError("--workers and --samples_per_shard: expected 1 or more")
    table = open_source(source, input, options)
    check_apart(table.input(), out, (REJECTS, "manifest.json", PARTS))
    if not table.splits():
        raise UserError(f"--source {source}: {input or 'it'} has no rows")
    if split != "all" and split not in table.splits():
        raise UserError(f"--split {split}: the source has {', '.join(table.splits())}")
    settings = {"samples_per_shard": samples_per_shard, "text_only": text_only, "leaked": leaked}
    made = made_from(table, options or {}, **settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror})") from None
    try:
        with locked(out) as lock:
            try:
                return _Build(table, out, made, workers, lock, say).run(table.splits() if split == "all" else [split])
            finally:
                remove_unfinished(out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kept = "finished shards are kept: make room and start the same command again"
            raise UserError(f"--out {out}: no space left on the device; {kept}") from None
        raise UserError(f"--out {out}: cannot be written ({error})") from None


@dataclass
class _Build:
    """One run's work on a folder that is locked."""

    table: Source
    out: Path
    made_from: MadeFrom
    workers: int
    lock: Connection
    say: Callable[[str], object]

    def run(self, wanted: list[str]) -> dict[str, Any]:
        """Make the splits `wanted`; returns the manifest of all."""
        self.fingerprint = fingerprint(self.made_from)
        settled = recover(self.out, self.fingerprint)
        check_ours(self.out)
        older = self._older_manifest()
        self.older = older.get("splits", {})
        if settled and self.older.keys() >= set(wanted):
            self.say("an earlier run had finished all of it; put in place")
            return older
        self._check_held_out(wanted)
        publishing(self.out).mkdir(parents=True, exist_ok=True)
        self.shards: dict[str, list[Shard]] = {}
        self.new: dict[str, dict[str, Any]] = {}
        self._make(wanted)

        older_rejects = older and check_unchanged(self.out / REJECTS, older["rejects"]["sha256"])
        rejects = write_rejects(publishing(self.out) / REJECTS, self.shards, older_rejects or None)
        splits = {split: part for split in SPLITS if (part := self.new.get(split) or self.older.get(split))}
        count_duplicates(splits, {split: self._index(split) for split in splits})
        self._check_dropped(splits)
        shards = (shard for made in self.shards.values() for shard in made)
        manifest = settle(self.out, shards, {**self.made_from, "splits": splits, "rejects": rejects})
        tidy(self.out, self.fingerprint)
        return manifest

    def _older_manifest(self) -> dict[str, Any]:
        """The manifest of the splits that are there already, empty without any."""
        if not (self.out / "manifest.json").exists():
            return {}
        manifest = read_manifest(self.out)
        if found := difference(manifest, self.made_from):
            raise UserError(f"--out {self.out} was made {found}; choose another folder")
        return manifest

    def _check_held_out(self, wanted: list[str]) -> None:
        """Whether a training example is dropped must not depend on which split was made first."""
        there = {*wanted, *self.older}
        missing = [split for split in self.table.splits() if split in _HELD_OUT and split not in there]
        if self.made_from["leaked"] == "drop" and "train" in wanted and missing:
            told = f"--leaked drop: {self.out} has no {' and no '.join(missing)} yet to compare train with"
            raise UserError(f"{told}; make that first with --split, or all splits at once")

    def _make(self, wanted: list[str]) -> None:
        """Make and assemble the splits, held-out ones first."""
        rows = {split: self.table.rows(split) for split in wanted}
        kept = 0
        with (
            tqdm(total=sum(rows.values()), unit=" rows") as bar,
            crew(functools.partial(make_shard, self.table), self.workers, bar, self.lock) as work,
        ):
            for split in sorted(wanted, key=(*_HELD_OUT, "train").index):
                bar.set_description(split)
                shards = self.shards[split] = self._shards(split, rows[split])
                for was_there in work(shards):
                    kept += was_there
                    if was_there:
                        bar.set_postfix_str(f"kept {kept} shards")
                self.new[split] = assemble(split, shards, publishing(self.out))
        if kept:
            total = sum(map(len, self.shards.values()))
            self.say(f"kept {kept} of {total} shards, verified, of a run that was stopped; made {total - kept}")

    def _shards(self, split: str, rows: int) -> list[Shard]:
        made_from, held_out = self.fingerprint, []
        if split == "train" and self.made_from["leaked"] == "drop":
            for other in _HELD_OUT:
                if part := self.new.get(other) or self.older.get(other):
                    digests = self.out / PARTS / f"questions-of-{other}"
                    write_sorted(digests, digests_of(self._index(other), "question"), part["samples"])
                    held_out.append((other, digests))
                    made_from += f"+{part['index']['sha256']}"
        size, text_only = self.made_from["samples_per_shard"], self.made_from["text_only"]
        return [
            Shard(
                self.out / PARTS, split, number, range(start, min(start + size, rows)),
                text_only, made_from, tuple(held_out),
            )
            for number, start in enumerate(range(0, rows, size))
        ]  # fmt: skip

    def _index(self, split: str) -> Path:
        """A split's index, whether it is new or was there."""
        if split in self.new:
            return publishing(self.out) / self.new[split]["index"]["name"]
        index = self.older[split]["index"]
        return check_unchanged(self.out / index["name"], index["sha256"])

    def _check_dropped(self, splits: dict[str, dict[str, Any]]) -> None:
        """Held-out splits that are made again from pictures that were changed may ask what train keeps."""
        also_in = splits["train"]["counts"]["also_in"] if "train" in splits else {}
        if self.made_from["leaked"] == "drop" and any(also_in.values()):
            told = f"--leaked drop: train in {self.out} holds questions of the splits made now"
            raise UserError(f"{told}; make all splits again")


def summary(out: Path, manifest: dict[str, Any]) -> Iterable[str]:
    """The lines that the command prints at its end."""
    for split, part in manifest["splits"].items():
        counts = part["counts"]
        size = sum(shard["bytes"] for shard in part["shards"])
        yield (
            f"{split}: {part['samples']} samples in {len(part['shards'])} shards, {size / 1e6:.1f} MB"
            f" ({counts['without_image']} without image, {counts['without_rationale']} without rationale,"
            f" {counts['repeated_ids']} repeated ids, {counts['duplicates']} duplicates);"
            f" of {counts['rows']} rows skipped {counts['skipped']}, rejected {sum(counts['rejected'].values())}"
        )
        for reason, count in counts["rejected"].items():
            yield f"  rejected {count}: {reason}"
        if split == "train":
            yield from _leaks(counts["also_in"])
    if manifest["rejects"]["rows"]:
        yield f"{manifest['rejects']['rows']} rows are not in the tars: see {out / REJECTS}"
    yield f"written to {out}"


def _leaks(also_in: dict[str, int]) -> Iterable[str]:
    """Warnings that training examples are asked later."""
    for split, count in also_in.items():
        if count:
            told = f"{count} of train are {ALSO_IN.format(split)}, by question and image"
            yield f"  {told} (--leaked drop leaves them out)"


def main(
    *,
    out: Path,
    source: str | None = None,
    input: str | None = None,
    split: SplitOrAll = "all",
    workers: int = 1,
    samples_per_shard: int = 1000,
    text_only: TextOnly = "keep",
    leaked: Leaked = "keep",
    verify: bool = False,
    **options: str,
) -> None:
    """Turn a source into WebDataset tars with an index; or check such a folder with --verify.

    Sources: m3cot and scienceqa (--input: a hub id, or a folder of parquet files; scienceqa also its original
    problems.json), jsonl (your own: --input FILE.jsonl), webdataset (--input: a tar or a folder of tars), and trails
    (generated), with options of its own: --grid --cell --hops --colours --mix --seed --train --val --test (see
    data_prep/sources/trails.py).

    A run that was stopped goes on with the same command: finished shards are checked and kept. What cannot be used
    is in OUT/rejects.jsonl with its reason. --leaked drop leaves out training examples whose question and image are
    in test or val, too; these splits are then made before train, or with it.

    --verify --out OUT [--workers N] recomputes every hash of a folder and names what disagrees (exit status 2).

    Example: python -m data_prep.shard --source trails --train 2000 --val 100 --test 100 --out data/trails
    """
    if verify:
        given = {"source": source, "input": input, **options}
        if stray := [f"--{name}" for name, value in given.items() if value is not None]:
            raise UserError(f"--verify takes --out and --workers, not {', '.join(stray)}")
        with cli.terminated_as_interrupted():
            print(check_folder(out, workers))
        return
    if source is None:
        raise UserError("--source is missing")
    own = [name for name in inspect.signature(main).parameters if name != "options"]
    if problems := cli.unknown_options(options, [*own, *source_options(source)]):
        raise UserError(*problems)
    with cli.terminated_as_interrupted():
        manifest = build(
            source, out, input=input, options=options, split=split, workers=workers,
            samples_per_shard=samples_per_shard, text_only=text_only, leaked=leaked, say=print,
        )  # fmt: skip
    for line in summary(out, manifest):
        print(line)


if __name__ == "__main__":
    cli.run(main)
