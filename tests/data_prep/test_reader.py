"""Reading a shard folder: every sample as it was written, and whatever disagrees is refused or named."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import storage
from data_prep.errors import UserError
from data_prep.index import RECORD, read_manifest, write_manifest
from data_prep.reader import BadSample, open_split
from data_prep.shard import build
from data_prep.sources import open_source
from data_prep.steps import split_steps
from tests.data_prep.conftest import TRAILS


def test_index_reads_equal_examples(trails: Path) -> None:
    source = open_source("trails", options=TRAILS)
    for split, count in TRAILS.items():
        index = open_split(trails, split)
        assert len(index) == count
        for row in range(count):
            example = source.example(split, row)
            assert index.read(row) == example
            assert index.key(row) == f"{row:09d}"
            record = index.records[row]
            assert record["hash"].tobytes() == example.content_hash()
            assert record["steps"] == len(split_steps(example.rationale))
            assert (record["width"], record["height"]) == (112, 112)
    assert RECORD.itemsize < 100


def test_index_crosses_processes(trails: Path) -> None:
    index = open_split(trails, "train")
    index.read(0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(24) == index.read(24)
    assert (copy.index_hash, copy.manifest_hash) == (index.index_hash, index.manifest_hash)
    assert len(pickle.dumps(index)) < 2000  # the index stays on disk


def damage(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as one who also writes a fitting hash would."""
    manifest = read_manifest(folder)
    change(manifest["splits"]["train"])
    write_manifest(folder, manifest)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: damage(f, "manifest.json", lambda b: b[:-20]), "cannot be read"),
        (lambda f: damage(f, "manifest.json", lambda b: b"[" * 100_000), "cannot be read"),
        (shutil.rmtree, "is not there"),
        (
            lambda f: damage(f, "manifest.json", lambda b: b.replace(b'"seed": "0"', b'"seed": "1"')),
            "was changed",
        ),
        (
            lambda f: damage(f, "manifest.json", lambda b: b.replace(b'"format": 2', b'"format": 9')),
            "not of format 2",
        ),
        (lambda f: damage(f, "train.index.npy", lambda b: b[:-1]), "cannot be read"),
        (lambda f: damage(f, "train.index.npy", lambda b: b""), "cannot be read"),
        (lambda f: damage(f, "train.index.npy", lambda b: b"not numpy" + b[9:]), "cannot be read"),
        (lambda f: np.save(f / "train.index.npy", np.zeros(25)), "does not hold 25"),
        (lambda f: (f / "train.index.npy").unlink(), "is missing"),
        (lambda f: damage(f, "train-000001.tar", lambda b: b[:-512]), "bytes, not"),
        (lambda f: (f / "train-000002.tar").unlink(), "is missing"),
        (lambda f: edit_manifest(f, lambda part: part.update(samples=24)), "do not add up"),
        (lambda f: edit_manifest(f, lambda part: part["shards"].pop()), "do not add up"),
        (lambda f: edit_manifest(f, lambda part: part["shards"][1].update(samples="10")), "shards.1.samples"),
        (lambda f: edit_manifest(f, lambda part: part.pop("index")), "index: Field required"),
        (lambda f: edit_manifest(f, lambda part: part["shards"][1].update(sha256="../x")), "shards.1.sha256"),
        (
            lambda f: edit_manifest(f, lambda part: part["shards"][0].update(name="../x.tar")),
            "no file of this folder",
        ),
        (
            lambda f: edit_manifest(f, lambda part: part["shards"][0].update(name="x\0.tar")),
            "no file of this folder",
        ),
        (
            lambda f: edit_manifest(f, lambda part: part["shards"][0].update(name="\ud800.tar")),
            "no file of this folder",
        ),
        (lambda f: damage(f, "train.index.npy", lambda b: b.replace(b"(25,)", b"(25 ,")), "cannot be read"),
    ],
)
def test_disagreeing_files_are_refused(trails: Path, spoil: Callable[[Path], Any], told: str) -> None:
    spoil(trails)
    with pytest.raises(UserError, match=told) as caught:
        open_split(trails, "train")
    assert len(caught.value.lines) == 1
    assert "python -m data_prep.shard" in str(caught.value)


def bad_shard(folder: Path, change: Callable[[np.ndarray], None], refit: bool) -> str:
    """What reading says after the second shard's part of the index was changed, with a fitting hash or without."""
    records = np.load(folder / "train.index.npy")
    change(records[10:20])
    np.save(folder / "train.index.npy", records)
    digest = hashlib.sha256(records[10:20].tobytes()).hexdigest()
    if refit:
        edit_manifest(folder, lambda part: part["shards"][1].update(index_sha256=digest))
    index = open_split(folder, "train")
    assert index.read(9).id and index.read(20).id
    with pytest.raises(BadSample) as caught:
        index.read(13)
    assert caught.value.key == "train-000001.tar[3]"
    return caught.value.reason


def test_a_damaged_part_of_the_index_costs_its_shard(trails: Path) -> None:
    def change(part: np.ndarray) -> None:
        part["key"][5] = b"\xff\x00"

    assert bad_shard(trails, change, refit=False) == "the index of train-000001.tar is not the one that was written"


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_offset", 2**40), ("json_offset", 2**64 - 5), ("image_size", 2**32 - 1), ("shard", 0), ("shard", 99)],
)
def test_an_index_that_points_elsewhere_is_not_followed(trails: Path, name: str, value: int) -> None:
    """Also where somebody wrote hashes that fit."""

    def change(part: np.ndarray) -> None:
        part[name][5] = value

    assert bad_shard(trails, change, refit=True) == "the index points outside train-000001.tar"


def test_a_size_that_nobody_writes_is_not_read_into_memory(trails: Path) -> None:
    """A tar with a hole of gigabytes takes no room on a disk, but would in memory before its hash could be compared."""
    hole, sizes = 2**31, read_manifest(trails)["splits"]["train"]["shards"][1]["bytes"]
    with open(trails / "train-000001.tar", "r+b") as tar:
        tar.truncate(sizes + hole)
    edit_manifest(trails, lambda part: part["shards"][1].update(bytes=sizes + hole))

    def change(part: np.ndarray) -> None:
        part["image_size"][5] = hole

    told = "the index of train-000001.tar has a sample larger than any that is written"
    assert bad_shard(trails, change, refit=True) == told


def test_keys_of_a_damaged_index_are_places(trails: Path) -> None:
    """Else all samples of a part that was overwritten with zeros would have one name, and count as one."""

    def change(part: np.ndarray) -> None:
        part["key"] = b""

    bad_shard(trails, change, refit=False)
    index = open_split(trails, "train")
    assert [index.key(row) for row in (9, 10, 11)] == ["000000009", "train-000001.tar[0]", "train-000001.tar[1]"]


@pytest.mark.parametrize("byte", [0, 255])
def test_an_index_that_is_damaged_while_it_is_read(trails: Path, byte: int) -> None:
    """It is mapped, not copied: what was checked may change. Samples still have names of their own, and no memory."""
    index = open_split(trails, "train")
    assert index.read(12).id
    path = trails / "train.index.npy"
    size = len(index) * RECORD.itemsize
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size - size)
        file.write(bytes([byte]) * size)
    for row in (12, 13):
        with pytest.raises(BadSample, match="the index of train-000001.tar is not the one that was written") as caught:
            index.read(row)
        assert caught.value.key == index.key(row) == f"train-000001.tar[{row - 10}]"


def test_an_index_that_hides_a_picture_is_not_followed(trails: Path) -> None:
    def change(part: np.ndarray) -> None:
        part["extension"][3] = 0

    assert "pictures without bytes" in bad_shard(trails, change, refit=True)


def test_opening_reads_no_index(trails: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of ten million samples opens as fast as a small one."""
    index = open_split(trails, "train")
    checked: list[int] = []
    whole = type(index).problem_of_shard
    monkeypatch.setattr(type(index), "problem_of_shard", lambda self, n: checked.append(n) or whole(self, n))
    for position in (3, 4, 24, 3):
        index.read(position)
    assert checked == [0, 2]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_errors_of_a_network_file_system_pass(trails: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """A stale handle is opened anew; what stays is a bad sample."""
    index = open_split(trails, "train")
    sound, pread, handles, left = index.read(12), os.pread, [], [3]

    def failing(handle: int, size: int, offset: int) -> bytes:
        handles.append(os.fstat(handle).st_ino)
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return pread(handle, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(storage, "_LONGEST_PAUSE", 0.01)
    os.rename(trails / "train-000001.tar", trails / "old.tar")
    shutil.copy(trails / "old.tar", trails / "train-000001.tar")
    assert index.read(12) == sound and handles[0] != handles[-1]
    left[0], handles[:] = 10**9, []
    monkeypatch.setattr(storage, "_LOCAL_SECONDS", 0.1)
    with pytest.raises(BadSample, match=f"train-000001.tar cannot be read: {os.strerror(code)}"):
        index.read(12)
    assert len(handles) > 2
    left[0] = 0
    assert index.read(12) == sound


def test_other_errors_are_told_at_once(trails: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", None)
    index = open_split(trails, "train")
    (trails / "train-000001.tar").unlink()
    with pytest.raises(BadSample, match="No such file"):
        index.read(12)


def test_missing_split(tmp_path: Path) -> None:
    build("trails", tmp_path, options=TRAILS | {"val": 0})
    with pytest.raises(UserError, match="no split val; it has test, train"):
        open_split(tmp_path, "val")


def test_changed_bytes_are_noticed_on_reading(trails: Path) -> None:
    index = open_split(trails, "train")
    offset = int(index.records[12]["image_offset"]) + 100
    damage(trails, "train-000001.tar", lambda b: b[:offset] + bytes([b[offset] ^ 1]) + b[offset + 1 :])
    index.read(11)
    with pytest.raises(BadSample, match="000000012: its bytes in train-000001.tar are not those") as caught:
        index.read(12)
    assert pickle.loads(pickle.dumps(caught.value)).key == "000000012"
    (trails / "train-000002.tar").unlink()
    with pytest.raises(BadSample, match="000000020: train-000002.tar cannot be read"):
        index.read(20)
