"""A shard folder's format: tars for any WebDataset reader, and beside them an index to read any sample directly.

    manifest.json         what the folder holds, written last; a folder without it is unfinished
    SPLIT-000000.tar      the samples, `KEY.json` and `KEY.EXT`; KEY is the source row with nine digits
    SPLIT.index.npy       one `RECORD` per sample, in the tars' order
    rejects.jsonl         the rows that are not in the tars, in order, each with its split, key, id and reason

This module writes it; `data_prep.reader` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # noqa: UP035  (Python 3.10)

from data_prep.errors import UserError
from data_prep.example import HASH_BYTES, IMAGE_EXTENSIONS, content_hash, image_size, question_hash
from data_prep.files import atomic_path, write_atomic
from data_prep.steps import split_steps
from data_prep.storage import LocalStorage, Location, Storage, open_storage

FORMAT = 2
"""Version of the folder's layout; another one is refused."""

RECORD = np.dtype([
    ("shard", "<u4"),  # position in the manifest's list of shards
    ("json_offset", "<u8"), ("json_size", "<u4"),  # bytes in the tar
    ("image_offset", "<u8"), ("image_size", "<u4"),  # both 0 without a picture
    ("key", "S12"),
    ("hash", f"V{HASH_BYTES}"),  # data_prep.example.content_hash
    ("question", f"V{HASH_BYTES}"),  # data_prep.example.question_hash
    ("steps", "<u2"),  # reasoning steps before merging, at most 65535
    ("width", "<u2"), ("height", "<u2"),  # pixels, after EXIF orientation, at most 65535; 0 without a picture
    ("extension", "u1"),  # 1 + position in IMAGE_EXTENSIONS, 0 without a picture
])  # fmt: skip

REMAKE = "make the folder again with python -m data_prep.shard"
_MAKE = "make it with python -m data_prep.shard --source NAME --out {folder} (--help has the sources)"


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""In hexadecimal. A file of a cache is named after it, so it is nothing else."""


Count = Annotated[int, Field(ge=0, lt=2**48)]
"""Of bytes or samples: more than any folder has, and sums of them still fit where numpy counts."""


class ShardEntry(TypedDict):
    """A tar in the manifest."""

    name: str
    bytes: Count
    sha256: Digest
    samples: Count
    index_sha256: Digest
    """Of its part of the index, so that a reader checks no more of it than it reads"""


class IndexEntry(TypedDict):
    """A split's index in the manifest."""

    name: str
    sha256: Digest


class Counts(TypedDict):
    """What became of a split's source rows, of what is used here."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    skipped: Count
    rejected: dict[str, Count]


class RejectsEntry(TypedDict):
    """The file of rejects in the manifest."""

    name: str
    sha256: Digest
    rows: Count


class SplitEntry(TypedDict):
    """A split in the manifest."""

    shards: list[ShardEntry]
    index: IndexEntry
    samples: Count
    counts: Counts


class Manifest(TypedDict):
    """What a reader needs of `manifest.json`; the settings that the folder was made with are beside it."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]
    format: int
    hash: str
    splits: dict[str, SplitEntry]
    rejects: NotRequired[RejectsEntry]


_MANIFEST = TypeAdapter(Manifest)


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
    record = json.loads(json_member)
    steps = len(split_steps(record["rationale"]))
    largest = np.iinfo("<u2").max
    return (
        shard, text.offset_data, text.size,
        picture.offset_data if picture else 0, len(image_member),
        key, content_hash(json_member, image_member), question_hash(record, image_member),
        min(steps, largest), min(width, largest), min(height, largest), extension,
    )  # fmt: skip


def write_records(path: Path, blocks: Iterable[np.ndarray], length: int, dtype: np.dtype = RECORD) -> None:
    """Write `blocks`, (n,) of `dtype` and `length` in all, one after the other as a .npy file."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(block.astype(dtype, copy=False).tobytes())


def write_manifest(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write `manifest.json` with the format's version and a hash of the rest; returns what was written."""
    manifest = {**content, "format": FORMAT}
    manifest["hash"] = _manifest_hash(manifest)
    write_atomic(folder / "manifest.json", manifest_text(manifest))
    return manifest


def manifest_text(manifest: dict[str, Any]) -> str:
    """The text of `manifest.json`."""
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def read_manifest(location: Location | Storage) -> dict[str, Any]:
    """The content of a folder's `manifest.json`, a `Manifest` with the settings that made it.

    Raises:
        UserError: absent, damaged, edited, of another format, or out of reach.
    """
    storage = open_storage(location) if isinstance(location, str | Path) else location
    path, folder = storage.describe("manifest.json"), storage.describe("")
    try:
        manifest = json.loads(storage.read("manifest.json"))
    except (FileNotFoundError, NotADirectoryError):
        if isinstance(storage, LocalStorage) and not storage.folder.is_dir():
            state = "is a file, not a folder" if storage.folder.exists() else "is not there"
            raise UserError(f"the shard folder {folder} {state}; {_MAKE.format(folder=folder)}") from None
        raise UserError(f"{folder} has no manifest.json, so it is no finished shard folder; {REMAKE}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {REMAKE}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT}; {REMAKE}")
    if manifest.get("hash") != _manifest_hash(manifest):
        raise UserError(f"{path} was changed after it was written: its hash does not fit; {REMAKE}")
    try:
        checked = dict(_MANIFEST.validate_python(manifest))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path}: {place}: {error.errors()[0]['msg']}; {REMAKE}") from None
    for name in _names(checked):
        if name != Path(name).name or name in ("", ".", "..") or not name.isprintable():
            raise UserError(f"{path} names {name!r}, which is no file of this folder; {REMAKE}")
    return checked


def _names(manifest: dict[str, Any]) -> Iterator[str]:
    """All files that a manifest names."""
    for part in manifest["splits"].values():
        yield part["index"]["name"]
        yield from (shard["name"] for shard in part["shards"])
    if "rejects" in manifest:
        yield manifest["rejects"]["name"]


def _manifest_hash(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "hash"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
