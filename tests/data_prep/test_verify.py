"""Every byte of a finished folder is held by a hash, and --verify names what disagrees."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import cli, shard
from data_prep.errors import UserError
from data_prep.files import sha256
from data_prep.index import read_manifest, write_manifest
from data_prep.making.verify import check_folder
from data_prep.reader import open_split


def found(folder: Path, workers: int = 1) -> list[str]:
    told: list[str] = []
    try:
        check_folder(folder, workers, told.append)
    except UserError as error:
        if "disagreement" not in str(error):
            raise
        assert f"{len(told)} disagreement" in str(error)
    return told


def change(path: Path, at: int, byte: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[at] = content[at] ^ 1 if byte is None else byte
    path.write_bytes(content)


def edit(folder: Path, edited: Callable[[dict[str, Any]], None]) -> None:
    manifest = read_manifest(folder)
    edited(manifest)
    write_manifest(folder, manifest)


@pytest.mark.parametrize("edited", [lambda text: text[:-1], lambda text: text.replace('"format": 2', '"format":  2')])
def test_the_manifests_bytes_count_too(trails: Path, edited: Callable[[str], str]) -> None:
    """What it says is held by its own hash; how it is written is not."""
    path = trails / "manifest.json"
    path.write_text(edited(path.read_text()))
    assert found(trails) == ["manifest.json: is not as it was written"]


@pytest.mark.parametrize(
    ("edited", "told"),
    [
        (lambda m: m["splits"]["val"]["counts"].update(rejected="none"), "splits.val.counts.rejected"),
        (lambda m: m["splits"]["val"]["counts"].pop("skipped"), "splits.val.counts.skipped"),
        (lambda m: m["splits"]["train"].update(samples=-1), "splits.train.samples"),
        (lambda m: m["splits"]["train"]["shards"][0].update(bytes=2**63), "splits.train.shards.0.bytes"),
        (lambda m: m["splits"]["val"]["index"].update(name="../val.index.npy"), "no file of this folder"),
        (lambda m: m["rejects"].update(name="/etc/hostname"), "no file of this folder"),
    ],
)
def test_a_manifest_that_somebody_else_wrote(trails: Path, edited: Callable[[dict[str, Any]], None], told: str) -> None:
    """With a hash that fits: it neither ends the command with a traceback nor points outside."""
    edit(trails, edited)
    with pytest.raises(UserError, match=told):
        check_folder(trails)


@pytest.mark.parametrize("head", [b"(" * 118, b"\xff" * 118, b"1" * 118, b"{'descr': '|O', 'fortran_order': False}"])
def test_an_index_with_another_head(trails: Path, head: bytes) -> None:
    path = trails / "test.index.npy"
    content = path.read_bytes()
    size = int.from_bytes(content[8:10], "little")
    path.write_bytes(content[:10] + head.ljust(size) + content[10 + size :])
    told = found(trails)
    assert told[0] == "test.index.npy: is not as it was written"
    assert told[1].startswith("test.index.npy: the part of test-000000.tar cannot be read: ") and len(told) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_all_disagreements_are_named(trails: Path, workers: int) -> None:
    record = open_split(trails, "train").records[12]
    change(trails / "train-000001.tar", int(record["image_offset"]) + 100)
    (trails / "val-000000.tar").write_bytes((trails / "val-000000.tar").read_bytes()[:2000])
    change(trails / "train.index.npy", -5)
    (trails / "rejects.jsonl").write_text("{}\n")
    (trails / "test-000000.tar").unlink()
    shutil.copy(trails / "train-000000.tar", trails / "train-000007.tar")
    told = found(trails, workers)
    assert told[:4] == [
        "train-000007.tar: is not in the manifest",
        "rejects.jsonl: is not as it was written",
        "train.index.npy: is not as it was written",
        "train-000001.tar: is not as it was written",
    ]
    assert told[4:6] == [
        "train-000001.tar: 000000012: its content is not as it was written",
        "train.index.npy: the part of train-000002.tar is not as it was written",
    ]
    assert told[6].startswith("val-000000.tar: has 2000 bytes, not")
    assert "val-000000.tar: 000000003: its content is not as it was written" in told
    assert told[-1] == "test-000000.tar: cannot be read (No such file or directory)"


def test_any_changed_byte_is_found(trails: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    assert found(trails) == []
    for path in sorted(trails.iterdir()):
        for _ in range(3 if path.stat().st_size else 0):
            copy = tmp_path / "copy"
            shutil.copytree(trails, copy)
            change(copy / path.name, draw.randrange(path.stat().st_size))
            try:
                assert any(line.startswith(path.name) for line in found(copy))
            except UserError as error:
                assert path.name == "manifest.json" and "manifest.json" in str(error)
            shutil.rmtree(copy)


def test_a_manifest_that_fits_a_wrong_index(trails: Path) -> None:
    """Hashes of samples are looked at, not those of files alone."""
    path = trails / "test.index.npy"
    records = np.load(path)
    records["question"][2] = records["question"][1]
    np.save(path, records)

    def fit(manifest: dict[str, Any]) -> None:
        part = manifest["splits"]["test"]
        part["index"]["sha256"] = sha256(path)
        part["shards"][0]["index_sha256"] = hashlib.sha256(records.tobytes()).hexdigest()

    edit(trails, fit)
    assert found(trails) == ["test-000000.tar: 000000002: its question's hash is not that of the index"]


def test_a_manifest_whose_figures_disagree(trails: Path) -> None:
    def edited(manifest: dict[str, Any]) -> None:
        manifest["splits"]["val"]["counts"]["rows"] += 1
        manifest["splits"]["test"]["shards"][0]["samples"] -= 1
        del manifest["rejects"]

    edit(trails, edited)
    told = found(trails)
    assert "manifest.json: samples and rejects of val are not its rows" in told
    assert "manifest.json: the shards of test do not add up" in told
    assert "manifest.json: names no file of rejects" in told


def test_command(trails: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(shard.main, ["--verify", "--out", str(trails)])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 and shown[0].startswith(f"{trails}: all of 34 samples in 5 shards")
    (trails / "train-000000.tar").unlink()
    for words, told in (
        (["--out", str(trails)], f"error: {trails}: 1 disagreement, listed above"),
        (["--out", str(tmp_path / "none")], f"error: the shard folder {tmp_path / 'none'} is not there"),
        (["--out", str(trails), "--source", "trails"], "error: --verify takes --out and --workers, not --source"),
        (["--out", str(trails), "--workers", "0"], "error: --workers: expected 1 or more"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.run(shard.main, ["--verify", *words])
        assert caught.value.code == 2
        assert [line for line in capsys.readouterr().err.splitlines() if "%|" not in line][-1].startswith(told)
