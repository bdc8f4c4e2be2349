"""Any sample of a shard folder (`data_prep.index`) by position, from any process, checked as far as it is read.

Opening looks at the manifest and at the files' sizes, so it takes no longer for a large folder. A shard's part of the
index is checked when a process first needs it, a sample's bytes each time that they are read.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.example import MAX_BYTES, MAX_RECORD, Example, InvalidExample, content_hash
from data_prep.index import RECORD, REMAKE, ShardEntry, SplitEntry, read_manifest
from data_prep.storage import Location, Storage, open_storage

_HEAD = 2**16
"""Bytes of the head of an index, at most."""


class BadSample(Exception):
    """A sample that cannot be used, by the key that names it in its tar."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses process borders
        return BadSample, (self.key, self.reason)


class ShardIndex:
    """The samples of a split by position; made by `open_split`. May be pickled, forked, shared by threads."""

    def __init__(self, storage: Storage, split: str, manifest_hash: str, part: SplitEntry) -> None:
        self.storage, self.split = storage, split
        self.manifest_hash = manifest_hash
        """Hash of the folder's manifest."""
        self.index_hash = part["index"]["sha256"]
        """Hash of the index: equal for equal samples in equal order."""
        self.shards = part["shards"]
        """The manifest's entries of the tars."""
        self.shard_sizes = [shard["samples"] for shard in self.shards]
        """Samples of each tar."""
        self._starts = np.cumsum([0, *self.shard_sizes])
        self._index = part["index"]

    def __getstate__(self) -> dict[str, Any]:
        # What is mapped and checked stays behind: every process does both for itself.
        return {name: value for name, value in vars(self).items() if name not in ("records", "_checked")}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @functools.cached_property
    def records(self) -> np.ndarray:
        """(samples,) of `RECORD`, mapped from the file, unchecked.  Raises UserError where it does not fit."""
        path = self.storage.describe(self._index["name"])
        try:
            records = self.storage.array(self._index, _HEAD + len(self) * RECORD.itemsize)
        except Exception as error:  # numpy reads the head as Python's grammar has it, with as many kinds of errors
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read ({reason}); {REMAKE}") from None
        if not isinstance(records, np.ndarray) or records.dtype != RECORD or records.shape != (len(self),):
            raise UserError(f"{path} does not hold {len(self)} index records; {REMAKE}")
        return records

    @functools.cached_property
    def _checked(self) -> dict[int, str]:
        """By shard: what is wrong with its part of the index, empty for nothing."""
        return {}

    def shard_of(self, position: int) -> int:
        """The shard that a sample is in."""
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def key(self, position: int) -> str:
        """The name of a sample in its tar; where the index is damaged its place there, as `train-000000.tar[7]`."""
        shard = self.shard_of(position)
        if self._problem(shard):
            return f"{self.shards[shard]['name']}[{position - int(self._starts[shard])}]"
        return _key(self.records[position])

    def read(self, position: int) -> Example:
        """The Example at a position.

        Raises:
            BadSample: its part of the index is damaged, or its tar cannot be read or holds other bytes than the index
            was made from.
        """
        shard, record = self.shard_of(position), self.records[position]
        name = self.shards[shard]["name"]
        if problem := self._problem(shard):
            raise BadSample(self.key(position), problem)
        try:
            members = self._members(self.shards[shard], record)
        except OSError as error:
            raise BadSample(_key(record), f"{name} cannot be read: {error.strerror or error}") from error
        if members is None:
            self._checked.pop(shard, None)  # its part of the index may be damaged since
            problem = self._problem(shard) or f"its bytes in {name} are not those that were written"
            raise BadSample(self.key(position), problem)
        json_member, image_member = members
        try:
            return Example.from_record(json.loads(json_member), image_member if record["extension"] else None)
        except (ValueError, TypeError, RecursionError) as error:  # InvalidExample is a ValueError
            reason = str(error) if isinstance(error, InvalidExample) else f"not an Example: {error}"
            raise BadSample(_key(record), reason) from error

    def _members(self, shard: ShardEntry, record: np.void) -> tuple[bytes, bytes] | None:
        """The JSON and the picture of a sample, which have its hash; None where nothing has it.  Raises OSError."""
        text = int(record["json_offset"]), int(record["json_size"])
        picture = int(record["image_offset"]), int(record["image_size"])
        if text[1] > MAX_RECORD or picture[1] > MAX_BYTES or max(sum(text), sum(picture)) > shard["bytes"]:
            return None  # the record has changed since it was checked
        for _ in range(2):
            json_member, image_member = self.storage.read_parts(shard, text, picture)
            if content_hash(json_member, image_member) == record["hash"].tobytes():
                return json_member, image_member
            if not self.storage.forget(shard, text, picture):
                break
        return None

    def _problem(self, shard: int) -> str:
        if shard not in self._checked:
            self._checked[shard] = self.problem_of_shard(shard)
        return self._checked[shard]

    def problem_of_shard(self, shard: int) -> str:
        """What is wrong with a shard's part of the index, such as that it points outside; empty for nothing."""
        entry = self.shards[shard]
        part = self.records[self._starts[shard] : self._starts[shard + 1]]
        if hashlib.sha256(part.tobytes()).hexdigest() != entry["index_sha256"]:
            return f"the index of {entry['name']} is not the one that was written"
        size = np.uint64(entry["bytes"])
        inside, small = bool(np.all(part["shard"] == shard)), True
        for member, most in (("json", MAX_RECORD), ("image", MAX_BYTES)):
            offsets, sizes = part[f"{member}_offset"], part[f"{member}_size"]
            inside = inside and bool(np.all((sizes <= size) & (offsets <= size - np.minimum(sizes, size))))
            small = small and bool(np.all(sizes <= most))  # else they would be read into memory before their hash
        if not inside:
            return f"the index points outside {entry['name']}"
        if not small:
            return f"the index of {entry['name']} has a sample larger than any that is written"
        pictures = (part["extension"] > 0) == (part["image_size"] > 0)
        return (
            "" if bool(np.all(pictures)) else f"the index of {entry['name']} has pictures without bytes, or the reverse"
        )


def open_split(folder: Location, split: str, cache_gb: float | None = None) -> ShardIndex:
    """Open one split of a shard folder after checking that its files are there and of the right size.

    Behind a URL, a tar is looked at when it is read; cache_gb: room for what comes from there
    (`data_prep.storage.cache`).

    Raises:
        UserError: something disagrees or is out of reach; the line says what, and what to do.
    """
    storage = open_storage(folder, cache_gb)
    manifest = read_manifest(storage)
    if split not in manifest["splits"]:
        raise UserError(f"{storage.describe('')} has no split {split}; it has {', '.join(sorted(manifest['splits']))}")
    part: SplitEntry = manifest["splits"][split]
    if sum(shard["samples"] for shard in part["shards"]) != part["samples"]:
        raise UserError(f"{storage.describe('manifest.json')}: the shards of {split} do not add up; {REMAKE}")
    for shard in part["shards"]:
        size = _size(storage, shard["name"])
        if size not in (None, shard["bytes"]):
            raise UserError(f"{storage.describe(shard['name'])} has {size} bytes, not {shard['bytes']}; {REMAKE}")
    _size(storage, part["index"]["name"])
    index = ShardIndex(storage, split, manifest["hash"], part)
    _ = index.records  # its shape is checked
    return index


def _key(record: np.void) -> str:
    return str(record["key"].decode(errors="replace"))


def _size(storage: Storage, name: str) -> int | None:
    try:
        return storage.size(name)
    except FileNotFoundError:
        raise UserError(f"{storage.describe(name)} is missing; {REMAKE}") from None
    except OSError as error:
        raise UserError(f"{storage.describe(name)} cannot be read ({error.strerror or error}); {REMAKE}") from None
