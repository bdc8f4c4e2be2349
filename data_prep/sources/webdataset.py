"""Tars in WebDataset's form: somebody else's, or this project's own shards.

`--input FILE.tar`, or `--input FOLDER` with tars at any depth; the name, or else the folder's, tells the split:
train-000000.tar, val.tar, test/7.tar.

    q1.json     as a line of the jsonl source; `image` is not needed, `split` may only repeat the tar's, and where `id`
                is missing it is the key, here q1. Or as `data_prep.example` writes it into this project's tars
    q1.jpg      optional: the picture, or q1.jpeg, q1.png, q1.webp, q1.gif, q1.bmp

The members of a sample follow each other. Nothing is extracted, followed or unpickled: a sample with a link, a path out
of the tar, or a member of another kind is a reject, and so is one whose key its tar has twice. Of a damaged tar the
samples in front of the damage are used; the rest, of which nobody knows how many it was, is one reject.
"""

from __future__ import annotations

import hashlib
from array import array
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.example import MAX_BYTES, RECORD_KEYS, Example, InvalidExample
from data_prep.sources import SPLITS, Input, Rejected, id_text
from data_prep.sources.folders import files_below, files_by_split, split_of
from data_prep.sources.jsonl import MAX_LINE, check_split, json_object, own_example
from data_prep.sources.tar import DamagedTar, Member, Tar

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class WebDataset:
    """The source; a split's rows are the samples of its tars, in order, and each tar's damage."""

    name = "webdataset"

    def __init__(self, files: dict[str, list[Path]], folder: Path) -> None:
        """`files` by split; `folder` is what they lie in."""
        self._names = {path.relative_to(folder).as_posix(): path for paths in files.values() for path in paths}
        self._splits: dict[str, _Samples] = {}
        for split, paths in files.items():
            samples = self._splits[split] = _Samples()
            for path in paths:
                samples.scan(path)

    def input(self) -> Input:
        return dict(self._names)

    def splits(self) -> list[str]:
        return [split for split in SPLITS if split in self._splits and len(self._splits[split])]

    def rows(self, split: str) -> int:
        return len(self._splits[split])

    def example(self, split: str, row: int) -> Example:
        samples = self._splits[split]
        if row in samples.damage:
            raise Rejected(*samples.damage[row])
        tar = samples.tars[samples.tar[row]]
        id = tar.path.name
        try:
            members = list(islice(tar.members(samples.start[row]), min(samples.members[row], 3)))
            if not members:
                raise DamagedTar("tar changed while it was read")
            id = members[0].key
            if samples.twice[row]:
                raise InvalidExample(f"key twice in a tar: {tar.path.name}")
            text, picture = _parts(members)
            content = json_object(tar.read(text.offset, text.size))
            image = tar.read(picture.offset, picture.size) if picture else None
            id = id_text(content.get("id")) or id
            check_split(content.get("split", split), split)
            return self._example(content | {"id": id}, split, image)
        except OSError as error:
            raise UserError(f"--input {tar.path}: cannot be read any more ({error.strerror})") from None
        except (InvalidExample, DamagedTar) as error:
            raise Rejected(id, str(error)) from error

    def _example(self, content: dict[str, Any], split: str, image: bytes | None) -> Example:
        if content.keys() == RECORD_KEYS:
            return Example.from_record(content, image)
        if content.get("image") is not None and image is None:
            raise InvalidExample(f"picture missing in the tar: {content['image']}")
        return own_example(content, self.name, split, image)


class _Samples:
    """Where the samples of a split are: 14 bytes for each."""

    def __init__(self) -> None:
        self.tars: list[Tar] = []
        self.tar, self.start = array("I"), array("Q")
        self.members = array("B")
        """How many, at most 255."""
        self.twice = bytearray()
        """Whether the tar has the key somewhere else, too."""
        self.damage: dict[int, tuple[str, str]] = {}
        """By row: name of the tar, and what is wrong with it."""

    def __len__(self) -> int:
        return len(self.start)

    def _add(self, start: int) -> None:
        self.tar.append(len(self.tars) - 1)
        self.start.append(start)
        self.members.append(0)

    def scan(self, path: Path) -> None:
        """Add a tar's samples.  Raises UserError where it cannot be read."""
        self.tars.append(Tar(path))
        first, digests = len(self), array("Q")
        last: Member | None = None
        pictures: set[bool] = set()
        try:
            for member in self.tars[-1].members():
                if last is None or member.key != last.key:
                    self._add(member.start)
                    digests.append(_digest(member.key))
                    pictures = set()
                self.members[-1] = min(self.members[-1] + 1, 255)
                pictures.add(member.suffix in _PICTURES)
                last = member
        except OSError as error:
            raise UserError(f"--input {path}: cannot be read ({error.strerror})") from None
        except DamagedTar as error:
            lost = "nothing of it can be used" if last is None else f"what follows {last.key} is lost"
            if last is not None and len(pictures) < 2:  # who knows whether it had a picture
                lost = f"{last.key} and what follows is lost"
                for column in (self.tar, self.start, self.members, digests):
                    column.pop()
            self.damage[len(self)] = path.name, f"{error}; {lost}"
            self._add(0)
            digests.append(_digest(f"damage of {path.name}"))
        _, place, counts = np.unique(np.array(digests), return_inverse=True, return_counts=True)
        self.twice += (counts[place] > 1).astype(np.uint8).tobytes()
        assert len(self.twice) == len(self) == first + len(digests)


def _digest(key: str) -> int:
    hashed = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(hashed.digest(), "big")


def _parts(members: list[Member]) -> tuple[Member, Member | None]:
    """The JSON and the picture of a sample.

    Raises:
        InvalidExample: there is no JSON, or something else, or more.
    """
    found: dict[bool, Member] = {}
    for member in members:
        if member.problem:
            raise InvalidExample(member.problem)
        if not member.key.rpartition("/")[2] or member.suffix not in ("json", *_PICTURES):
            raise InvalidExample(f"member of unknown kind: {member.name}")
        is_picture = member.suffix in _PICTURES
        if is_picture in found:
            raise InvalidExample(f"more than one {'picture' if is_picture else 'JSON'} in a sample: {member.name}")
        if member.size > (MAX_BYTES if is_picture else MAX_LINE):
            raise InvalidExample(f"member too large: {member.name}, {member.size} bytes")
        found[is_picture] = member
    if False not in found:
        raise InvalidExample(f"no JSON in a sample: only {members[0].name}")
    return found[False], found.get(True)


def open_table(input: str | None) -> WebDataset:
    """Open a tar or a folder.

    Raises:
        UserError: there is none, or one that cannot be read or tells no split.
    """
    if input is None:
        raise UserError("--input is missing: the source webdataset reads a tar or a folder of tars")
    path = Path(input).expanduser()
    if path.is_dir():
        if packed := [file.name for suffix in _PACKED for file in files_below(path, suffix)]:
            raise UserError(f"--input {input}: {packed[0]} is compressed; unpack it to a .tar first")
        return WebDataset(files_by_split(path, ".tar"), path)
    if not path.is_file():
        raise UserError(f"--input {input}: no such file or folder")
    split = split_of(path.name)
    if split is None:
        raise UserError(f"--input {input}: cannot tell the split of {path.name}; name it train, val or test")
    return WebDataset({split: [path]}, path.parent)
