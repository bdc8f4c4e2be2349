from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import cli, shard
from data_prep.errors import UserError
from data_prep.index import RECORD, BadSample, open_split, read_manifest, write_manifest
from data_prep.shard import build
from data_prep.sources import open_source, source_options
from data_prep.steps import split_steps
from tests.data_prep.conftest import m3cot_row, write_parquet

TRAILS = {"train": 25, "val": 5, "test": 4}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def trails(tmp_path: Path) -> Path:
    build("trails", tmp_path / "trails", options=TRAILS, samples_per_shard=10)
    return tmp_path / "trails"


def test_files_do_not_depend_on_workers_or_reruns(trails: Path, tmp_path: Path) -> None:
    first = contents(trails)
    build("trails", tmp_path / "two", options=TRAILS, samples_per_shard=10, workers=2)
    build("trails", trails, options=TRAILS, samples_per_shard=10)
    assert contents(tmp_path / "two") == first
    assert contents(trails) == first
    assert [name for name in first if name.startswith("train-")] == [f"train-{k:06d}.tar" for k in range(3)]


def test_a_source_without_rows(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"own\.jsonl has no rows"):
        build("jsonl", tmp_path / "out", input=str(tmp_path / "own.jsonl"))
    with pytest.raises(UserError, match="trails: it has no rows"):
        build("trails", tmp_path / "out", options={"train": 0, "val": 0, "test": 0})
    assert not (tmp_path / "out").exists()


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


def test_plain_webdataset_reads_the_tars(trails: Path) -> None:
    wds = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(trails.glob("train-*.tar"))]
    samples = list(wds.WebDataset(shards, shardshuffle=False))
    index = open_split(trails, "train")
    assert [sample["__key__"] for sample in samples] == [index.key(i) for i in range(25)]
    for i, sample in enumerate(samples):
        assert sample["png"] == index.read(i).image
        assert json.loads(sample["json"])["question"] == index.read(i).question


def test_tar_members_are_anonymous(trails: Path) -> None:
    with tarfile.open(trails / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["000000000.json", "000000000.png"]
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in members} == {(0, 0, 0, 0o644, "", "")}


def rejects(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.rejects.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_rejects(m3cot_folder: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    manifest = build("m3cot", out, input=str(m3cot_folder), samples_per_shard=2, workers=workers)
    part = manifest["splits"]["train"]
    assert part["samples"] == 4
    assert part["counts"] == {
        "without_image": 1, "without_rationale": 0, "repeated_ids": 0, "skipped": 0,
        "rejected": {"image cannot be decoded": 1, "no answer": 1},
    }  # fmt: skip
    assert [(line["id"], line["row"]) for line in rejects(out, "train")] == [("topic-1", 1), ("topic-2", 2)]
    assert all(line["source"] == "m3cot" and line["split"] == "train" for line in rejects(out, "train"))
    index = open_split(out, "train")
    assert [index.key(i) for i in range(4)] == ["000000000", "000000003", "000000004", "000000005"]
    assert [index.read(i).image is None for i in range(4)] == [False, True, False, False]
    assert manifest["source"]["input"] == "m3cot"  # no machine's path


def test_text_only_questions_can_be_skipped(scienceqa_folder: Path, tmp_path: Path) -> None:
    manifest = build("scienceqa", tmp_path / "out", input=str(scienceqa_folder), split="train", text_only="skip")
    part = manifest["splits"]["train"]
    assert (part["samples"], part["counts"]["skipped"]) == (1, 1)
    assert part["counts"]["rejected"] == {"image file cannot be read": 1}
    assert rejects(tmp_path / "out", "train")[0]["reason"] == "no image (text_only=skip)"


def test_nothing_usable(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "test.parquet", [m3cot_row(0, answer="Z"), m3cot_row(1, question="")])
    with pytest.raises(UserError, match="nothing of the split test could be used: 1 x answer outside the choices"):
        build("m3cot", tmp_path / "out", input=str(tmp_path / "in"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_odd_unicode_is_a_reject_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"question": "Up?", "choices": ["yes", "no"], "answer": 0, "rationale": ""}
    rows = [good | {"id": "a"}, good | {"id": "\ud800"}, good | {"id": "b", "\ud800": "x"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli.run(shard.main, ["--source=jsonl", f"--input={tmp_path / 'own.jsonl'}", f"--out={tmp_path / 'out'}"])
    assert len(rejects(tmp_path / "out", "train")) == 2
    assert "rejected 1: id not valid Unicode" in capsys.readouterr().out


def test_repeated_ids_are_counted(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "test.parquet", [m3cot_row(0), m3cot_row(0), m3cot_row(1)])
    manifest = build("m3cot", tmp_path / "out", input=str(tmp_path / "in"))
    assert manifest["splits"]["test"]["counts"]["repeated_ids"] == 1


def test_one_split_at_a_time(trails: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    for split in ("test", "train", "val"):
        build("trails", out, options=TRAILS, samples_per_shard=10, split=split)  # type: ignore[arg-type]
    assert contents(out) == contents(trails)
    with pytest.raises(UserError, match="was made with source"):
        build("trails", out, options=TRAILS | {"seed": 1}, samples_per_shard=10, split="val")
    with pytest.raises(UserError, match="was made with samples_per_shard 10, not 20"):
        build("trails", out, options=TRAILS, samples_per_shard=20)


def test_tars_of_a_longer_input_go_away(tmp_path: Path) -> None:
    for count in (5, 3):
        write_parquet(tmp_path / "in" / "test.parquet", [m3cot_row(i) for i in range(count)])
        build("m3cot", tmp_path / "out", input=str(tmp_path / "in"), samples_per_shard=2)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def damage(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as one who also writes a fitting hash would."""
    manifest = read_manifest(folder)
    change(manifest["splits"]["train"])
    write_manifest(folder, manifest)


def rewrite_index(folder: Path) -> None:
    from data_prep.files import sha256

    records = np.load(folder / "train.index.npy")
    records["image_offset"][3] = 2**40
    np.save(folder / "train.index.npy", records)
    edit_manifest(folder, lambda part: part["index"].update(sha256=sha256(folder / "train.index.npy")))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: damage(f, "manifest.json", lambda b: b[:-20]), "cannot be read"),
        (
            lambda f: damage(f, "manifest.json", lambda b: b.replace(b'"seed": "0"', b'"seed": "1"')),
            "was changed",
        ),
        (
            lambda f: damage(f, "manifest.json", lambda b: b.replace(b'"format": 1', b'"format": 9')),
            "not of format 1",
        ),
        (lambda f: damage(f, "train.index.npy", lambda b: b[:-1] + b"x"), "its hash differs"),
        (lambda f: (f / "train.index.npy").unlink(), "is missing"),
        (lambda f: damage(f, "train-000001.tar", lambda b: b[:-512]), "bytes, not"),
        (lambda f: (f / "train-000002.tar").unlink(), "is missing"),
        (lambda f: edit_manifest(f, lambda part: part.update(samples=24)), "does not hold 24"),
        (lambda f: edit_manifest(f, lambda part: part["shards"].pop()), "points outside"),
        (
            lambda f: edit_manifest(f, lambda part: part["shards"][0].update(name="../x.tar")),
            "no file of this folder",
        ),
        (rewrite_index, "points outside"),
    ],
)
def test_disagreeing_files_are_refused(trails: Path, spoil: Callable[[Path], Any], told: str) -> None:
    spoil(trails)
    with pytest.raises(UserError, match=told) as caught:
        open_split(trails, "train")
    assert len(caught.value.lines) == 1
    assert "python -m data_prep.shard" in str(caught.value)


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


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--source",
        "trails",
        "--out",
        str(tmp_path / "out"),
        "--train=12",
        "--val=3",
        "--test=3",
        "--grid",
        "3",
    ]
    cli.run(shard.main, [*words, "--samples-per-shard", "5"])
    shown = capsys.readouterr().out
    assert "train: 12 samples in 3 shards" in shown
    assert str(tmp_path / "out") in shown
    assert read_manifest(tmp_path / "out")["source"]["options"]["grid"] == "3"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--source", "trails", "--hop", "3"], "unknown option --hop; did you mean --hops?"),
        (["--source", "trails", "--worker", "3"], "unknown option --worker; did you mean --workers?"),
        (["--source", "trails", "--grid", "four"], "--grid four: expected a whole number"),
        (["--source", "trails", "--workers", "0"], "--workers and --samples_per_shard: expected 1 or more"),
        (["--source", "trails", "--split", "dev"], "--split dev: expected one of all, train, val, test"),
        (["--source", "trials"], "--source trials: no such source; did you mean trails?"),
        (["--source", "m3cot", "--seed", "1"], "unknown option --seed"),
        (["--source", "trails", "--val", "0", "--split", "val"], "--split val: the source has train, test"),
        ([], "--source is missing"),
    ],
)
def test_command_mistakes(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(shard.main, ["--out", str(tmp_path / "out"), *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[0].startswith(f"error: {told}")


def test_help_names_every_option() -> None:
    shown = cli.help_text(shard.main, "shard")
    assert all(f"--{name}" in shown for name in source_options("trails"))


def test_data_prep_needs_no_torch() -> None:
    modules = ["example", "index", "shard", "tokenizer", "sources.m3cot", "sources.trails"]
    code = f"import sys, {', '.join(f'data_prep.{name}' for name in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
