"""Equal questions within and across splits, counted in bounded memory, and left out of training on request."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.example import HASH_BYTES
from data_prep.making import duplicates
from data_prep.reader import open_split
from data_prep.shard import build, summary
from tests.data_prep.conftest import picture
from tests.data_prep.test_shard import contents, rejects


def digest(value: int) -> bytes:
    return hashlib.blake2b(str(value).encode(), digest_size=HASH_BYTES).digest()


@pytest.mark.parametrize("bucket", [3, 40, 10_000])
def test_counts_are_those_of_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int) -> None:
    """In one bucket and in many, with values that repeat in a block and across blocks."""
    monkeypatch.setattr(duplicates, "BUCKET", bucket)
    monkeypatch.setattr(duplicates, "_BLOCK", 7)
    draw = random.Random(0)
    values = {name: [digest(draw.randrange(200)) for _ in range(count)] for name, count in (("a", 300), ("b", 50))}
    values["a"] += [digest(-1)] * 100
    values["b"][0] = b"\0" * HASH_BYTES
    values["b"][1] = b"\xff" * (HASH_BYTES - 1) + b"\0"
    for name, found in values.items():
        np.save(tmp_path / f"{name}.npy", np.array([(0, value) for value in found], [("n", "u1"), ("it", "V16")]))
    files = {name: duplicates.digests_of(tmp_path / f"{name}.npy", "it") for name in values}
    total = sum(map(len, values.values()))

    counts = {name: Counter(found) for name, found in values.items()}
    assert duplicates.shared(files, total) == {
        name: (
            len(values[name]) - len(counts[name]),
            {other: sum(value in counts[other] for value in values[name])},
        )
        for name, other in (("a", "b"), ("b", "a"))
    }
    assert duplicates.repeated(files["a"], 400) == 400 - len(counts["a"])
    for name, count in counts.items():
        duplicates.write_sorted(tmp_path / name, files[name], total)
        ordered = duplicates.open_sorted(tmp_path / name)
        assert [bytes(value).ljust(HASH_BYTES, b"\0") for value in ordered] == sorted(count)
        for value in [*count, *map(digest, range(200, 250))]:
            assert duplicates.is_in(value, ordered) == (value in count)


def test_a_bucket_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BUCKET", 100)
    np.save(tmp_path / "a.npy", np.array([(digest(i),) for i in range(2000)], [("it", "V16")]))
    found = list(duplicates.counted({"a": duplicates.digests_of(tmp_path / "a.npy", "it")}, 2000))
    assert len(found) == 20 and max(len(digests) for each in found for digests, _ in each.values()) < 200


def own_rows(split: str, questions: str) -> list[dict[str, Any]]:
    row = {"choices": ["yes", "no"], "answer": 0, "rationale": "", "split": split}
    return [row | {"id": f"{split}-{i}", "question": question} for i, question in enumerate(questions)]


@pytest.fixture
def leaky(tmp_path: Path) -> str:
    """Train asks c of val, d of test and e of both; b twice, d three times."""
    rows = [*own_rows("train", "abbcdddef"), *own_rows("val", "cexx"), *own_rows("test", "dey")]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "own.jsonl")


def counts_of(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return {split: part["counts"][name] for split, part in manifest["splits"].items()}


def test_duplicates_are_counted_and_kept(leaky: str, tmp_path: Path) -> None:
    manifest = build("jsonl", tmp_path / "out", input=leaky, samples_per_shard=2)
    assert counts_of(manifest, "duplicates") == {"train": 3, "val": 1, "test": 0}
    assert counts_of(manifest, "also_in") == {
        "train": {"val": 2, "test": 4}, "val": {"train": 2, "test": 1}, "test": {"train": 2, "val": 1},
    }  # fmt: skip
    shown = "\n".join(summary(tmp_path / "out", manifest))
    assert "4 of train are also in test, by question and image (--leaked drop" in shown
    assert "2 of train are also in val" in shown


def drop(leaky: str, out: Path, **options: Any) -> dict[str, Any]:
    return build("jsonl", out, input=leaky, samples_per_shard=2, leaked="drop", **options)


@pytest.mark.parametrize("workers", [1, 2])
def test_leaked_examples_can_be_dropped(leaky: str, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    manifest = drop(leaky, out, workers=workers)
    index = open_split(out, "train")
    assert [index.read(i).question for i in range(len(index))] == list("abbf")
    assert [(line["row"], line["reason"]) for line in rejects(out)] == [
        (3, "also in val"), (4, "also in test"), (5, "also in test"), (6, "also in test"), (7, "also in test"),
    ]  # fmt: skip
    counts = manifest["splits"]["train"]["counts"]
    assert counts["rejected"] == {"also in test": 4, "also in val": 1}
    assert (counts["rows"], counts["also_in"], counts["duplicates"]) == (9, {"val": 0, "test": 0}, 1)


def test_dropping_does_not_depend_on_the_order(leaky: str, tmp_path: Path) -> None:
    drop(leaky, tmp_path / "whole")
    for number, order in enumerate(itertools.permutations(("train", "val", "test"))):
        out = tmp_path / str(number)
        for split in order:
            if split == "train" and order[2] != "train":
                with pytest.raises(
                    UserError, match=r"--leaked drop: .* has no .* yet to compare train with; make that"
                ):
                    drop(leaky, out, split=split)
            else:
                drop(leaky, out, split=split)
        drop(leaky, out, split="train")
        assert contents(out) == contents(tmp_path / "whole")
    drop(leaky, out, split="test")
    assert contents(out) == contents(tmp_path / "whole")


def test_keeping_does_not_depend_on_the_order(leaky: str, tmp_path: Path) -> None:
    build("jsonl", tmp_path / "whole", input=leaky)
    for split in ("train", "test", "val"):
        build("jsonl", tmp_path / "out", input=leaky, split=split)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(UserError, match="was made with leaked keep, not drop"):
        build("jsonl", tmp_path / "out", input=leaky, leaked="drop")


def test_damaged_files_of_other_splits_are_not_taken_over(leaky: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build("jsonl", out, input=leaky)
    for name in ("val.index.npy", "rejects.jsonl"):
        before = (out / name).read_bytes()
        (out / name).write_bytes(before + b" ")
        with pytest.raises(UserError, match=f"{name} was changed after it was written"):
            build("jsonl", out, input=leaky, split="train")
        (out / name).write_bytes(before)


def test_held_out_splits_of_edited_pictures(tmp_path: Path) -> None:
    """Pictures in files of their own are not part of the input's identity: train might have dropped too little."""
    rows = [row | {"image": f"{row['split']}.png"} for split in ("train", "test") for row in own_rows(split, "a")]
    rows += [rows[0] | {"id": "other", "question": "b"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, colour in (("train", "red"), ("test", "blue")):
        (tmp_path / f"{split}.png").write_bytes(picture(colour))
    drop(str(tmp_path / "own.jsonl"), tmp_path / "out")
    (tmp_path / "test.png").write_bytes(picture("red"))
    with pytest.raises(UserError, match="train in .* holds questions of the splits made now; make all splits again"):
        drop(str(tmp_path / "own.jsonl"), tmp_path / "out", split="test")
    drop(str(tmp_path / "own.jsonl"), tmp_path / "out")
    assert [line["reason"] for line in rejects(tmp_path / "out")] == ["also in test"]
