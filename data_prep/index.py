"""A shard folder: tars for any WebDataset reader, and beside them an index to read any sample directly.

    manifest.json         what the folder holds, written last; a folder without it is unfinished
    SPLIT-000000.tar      the samples, `KEY.json` and `KEY.EXT`; KEY is the source row with nine digits
    SPLIT.index.npy       one `RECORD` per sample, in the tars' order
    SPLIT.rejects.jsonl   the rows that are not in the tars, each with its reason

`open_split` checks that these agree; `ShardIndex.read` gives one Example by position, from any process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.example import HASH_BYTES, IMAGE_EXTENSIONS, Example, InvalidExample, content_hash, image_size
from data_prep.files import atomic_path, sha256, write_atomic
from data_prep.steps import split_steps

FORMAT = 1
"""Version of the folder's layout; another one is refused."""

RECORD = np.dtype([
    ("shard", "<u4"),  # position in the manifest's list of shards
    ("json_offset", "<u8"), ("json_size", "<u4"),  # bytes in the tar
    ("image_offset", "<u8"), ("image_size", "<u4"),  # both 0 without a picture
    ("key", "S12"),
    ("hash", f"V{HASH_BYTES}"),  # data_prep.example.content_hash
    ("steps", "<u2"),  # reasoning steps before merging, at most 65535
    ("width", "<u2"), ("height", "<u2"),  # pixels, after EXIF orientation, at most 65535; 0 without a picture
    ("extension", "u1"),  # 1 + position in IMAGE_EXTENSIONS, 0 without a picture
])  # fmt: skip

_OPEN_TARS = 64
_REMAKE = "make the folder again with python -m data_prep.shard"


class BadSample(Exception):
    """A sample that cannot be used, by the key that names it in its tar."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple[Any, ...]:  # it crosses process borders
        return BadSample, (self.key, self.reason)


def scan_tar(path: Path, shard: int) -> np.ndarray:
    """Index records (`RECORD`) of a finished tar's samples, read back from what is on disk."""
    records = []
    with open(path, "rb") as file, tarfile.open(fileobj=file) as tar:
        members = tar.getmembers()
        at = 0
        while at < len(members):
            text = members[at]
            key, _, _ = text.name.partition(".")
            picture = members[at + 1] if at + 1 < len(members) else None
            if picture is not None and not picture.name.startswith(f"{key}."):
                picture = None
            records.append(_record(file.fileno(), shard, key, text, picture))
            at += 1 if picture is None else 2
    return np.array(records, dtype=RECORD)


def _record(file: int, shard: int, key: str, text: tarfile.TarInfo, picture: tarfile.TarInfo | None) -> tuple[Any, ...]:
    json_member = os.pread(file, text.size, text.offset_data)
    image_member = os.pread(file, picture.size, picture.offset_data) if picture else b""
    width, height = image_size(image_member) if picture else (0, 0)
    extension = 1 + IMAGE_EXTENSIONS.index(picture.name.partition(".")[2]) if picture else 0
    steps = len(split_steps(json.loads(json_member)["rationale"]))
    largest = np.iinfo("<u2").max
    return (
        shard, text.offset_data, text.size,
        picture.offset_data if picture else 0, len(image_member),
        key, content_hash(json_member, image_member),
        min(steps, largest), min(width, largest), min(height, largest), extension,
    )  # fmt: skip


def write_index(path: Path, records: np.ndarray) -> None:
    """Write `records` (samples,) of `RECORD` as a .npy file."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, records, allow_pickle=False)


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` with the format's version and a hash of the rest; returns what was written."""
    manifest = {**content, "format": FORMAT}
    manifest["hash"] = _manifest_hash(manifest)
    write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a folder's `manifest.json`.

    Raises:
        UserError: absent, damaged, edited, or of another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} has no manifest.json, so it is no finished shard folder; {_REMAKE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_REMAKE}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}; {_REMAKE}")
    if manifest.get("hash") != _manifest_hash(manifest):
        raise UserError(f"{path} was changed after it was written: its hash does not fit; {_REMAKE}")
    return manifest


def _manifest_hash(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "hash"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class ShardIndex:
    """The samples of a split by position; made by `open_split`. May be pickled, forked, shared by threads."""

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        self.folder, self.split = folder, split
        self.manifest_hash: str = manifest["hash"]
        """Hash of the folder's manifest."""
        part = manifest["splits"][split]
        self.index_hash: str = part["index"]["sha256"]
        """Hash of the index: equal for equal samples in equal order."""
        self.shards: list[str] = [shard["name"] for shard in part["shards"]]
        """The tars' names."""
        self.shard_sizes: list[int] = [shard["samples"] for shard in part["shards"]]
        """Samples of each tar."""
        self._index = folder / part["index"]["name"]

    @functools.cached_property
    def records(self) -> np.ndarray:
        """(samples,) of `RECORD`, mapped from the file."""
        return np.load(self._index, mmap_mode="r", allow_pickle=False)

    @functools.cached_property
    def _tar(self) -> Any:
        return functools.lru_cache(maxsize=_OPEN_TARS)(lambda name: _Descriptor(self.folder / name))

    def __getstate__(self) -> dict[str, Any]:
        # Mapped and open files stay behind: every process opens its own.
        return {name: value for name, value in vars(self).items() if name not in ("records", "_tar")}

    def __len__(self) -> int:
        return len(self.records)

    def key(self, position: int) -> str:
        """The name of a sample in its tar."""
        return self.records[position]["key"].decode()

    def read(self, position: int) -> Example:
        """The Example at a position.

        Raises:
            BadSample: its tar cannot be read, or holds other bytes than the index was made from.
        """
        record = self.records[position]
        key = self.key(position)
        shard = self.shards[record["shard"]]
        try:
            tar = self._tar(shard)
            json_member = tar.read(record["json_offset"], record["json_size"])
            image_member = tar.read(record["image_offset"], record["image_size"])
        except OSError as error:
            raise BadSample(key, f"{shard} cannot be read: {error.strerror}") from error
        if content_hash(json_member, image_member) != record["hash"].tobytes():
            raise BadSample(key, f"its bytes in {shard} are not those that were written")
        try:
            return Example.from_record(json.loads(json_member), image_member if record["extension"] else None)
        except InvalidExample as error:
            raise BadSample(key, str(error)) from error


class _Descriptor:
    """An open file that is read at given places, and closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._file, int(size), int(offset))

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not where opening failed
            os.close(self._file)


def open_split(folder: Path, split: str) -> ShardIndex:
    """Open one split of a shard folder after checking that its files agree.

    Checked are the manifest's hash, the index's hash, the tars' sizes, and that every sample lies inside its
    tar. The tars' content is checked sample by sample on reading.

    Raises:
        UserError: something disagrees; the line says what, and what to do.
    """
    manifest = read_manifest(folder)
    if split not in manifest["splits"]:
        raise UserError(f"{folder} has no split {split}; it has {', '.join(sorted(manifest['splits']))}")
    part = manifest["splits"][split]
    for name in (part["index"]["name"], *(shard["name"] for shard in part["shards"])):
        if name != Path(name).name or name in ("", ".", ".."):
            raise UserError(f"{folder}/manifest.json names {name}, which is no file of this folder; {_REMAKE}")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {_REMAKE}")
    _check_index(folder / part["index"]["name"], part)
    for shard in part["shards"]:
        size = (folder / shard["name"]).stat().st_size
        if size != shard["bytes"]:
            raise UserError(f"{folder / shard['name']} has {size} bytes, not {shard['bytes']}; {_REMAKE}")
    return ShardIndex(folder, split, manifest)


def _check_index(path: Path, part: dict[str, Any]) -> None:
    if sha256(path) != part["index"]["sha256"]:
        raise UserError(f"{path} is not the index that manifest.json was written for: its hash differs; {_REMAKE}")
    records = np.load(path, mmap_mode="r", allow_pickle=False)
    if records.dtype != RECORD or records.shape != (part["samples"],):
        raise UserError(f"{path} does not hold {part['samples']} index records; {_REMAKE}")
    sizes = np.array([shard["bytes"] for shard in part["shards"]], dtype=np.uint64)
    inside = bool(np.all(records["shard"] < len(sizes)))
    for member in ("json", "image") if inside else ():
        ends = records[f"{member}_offset"] + records[f"{member}_size"]
        inside = inside and bool(np.all(ends <= sizes[records["shard"]]))
    if not inside:
        raise UserError(f"{path} points outside the tars; {_REMAKE}")
