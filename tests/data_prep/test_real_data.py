"""Preparation of real questions through the public command: IVTLR_QUESTIONS=DIR names a folder that has them.

DIR/scienceqa/*.json    problems in the layout of ScienceQA's problems.json, without pictures (these are drawn)
DIR/m3cot/*.jsonl       M3CoT's published answers, whose questions go into files in the layout of its parquet
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import cli, shard
from data_prep.index import read_manifest
from data_prep.reader import open_split
from data_prep.sources import open_source
from tests.data_prep.conftest import write_parquet
from tests.fuzz.pictures import encoded

QUESTIONS = os.environ.get("IVTLR_QUESTIONS")
pytestmark = pytest.mark.skipif(QUESTIONS is None, reason="IVTLR_QUESTIONS names no folder of real questions")


def drawn(name: str) -> bytes:
    """A picture of noise, in one of the formats that the benchmarks hold."""
    draw = random.Random(name)
    noise = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((draw.randrange(60, 500), draw.randrange(60, 500)))
    return encoded(size=image.size, format=draw.choice(["PNG", "JPEG"]))


def prepared(out: Path, *words: str) -> dict[str, Any]:
    """The manifest of a folder that the command made, after every sample was read and compared with its row."""
    cli.run(shard.main, ["--out", str(out), "--samples_per_shard=100", *words])
    manifest = read_manifest(out)
    for split in manifest["splits"]:
        index = open_split(out, split)
        for position in range(len(index)):
            index.read(position).validate()
    return manifest


def outcome(manifest: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """By split: samples and rejects."""
    parts = manifest["splits"].items()
    return {name: (part["samples"], sum(part["counts"]["rejected"].values())) for name, part in parts}


def test_scienceqa(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = {}
    for file in sorted(Path(str(QUESTIONS), "scienceqa").glob("*.json")):
        problems |= json.loads(file.read_text())
    folder = tmp_path / "scienceqa"
    for id, problem in problems.items():
        if problem["image"]:
            place = folder / "images" / problem["split"] / id
            place.mkdir(parents=True)
            (place / problem["image"]).write_bytes(drawn(id))
    (folder / "problems.json").write_text(json.dumps(problems))
    manifest = prepared(tmp_path / "out", "--source=scienceqa", f"--input={folder}", "--workers=2")
    found = outcome(manifest)
    with capsys.disabled():
        print(f"\nscienceqa: {len(problems)} problems, (samples, rejects) {found}")
    assert sum(map(sum, found.values())) == len(problems)
    assert all(rejected == 0 for _, rejected in found.values())
    example = open_split(tmp_path / "out", "train").read(0)
    problem = problems[example.id]
    assert (example.question, list(example.choices)) == (problem["question"], problem["choices"])
    assert (example.answer, example.image is not None) == (problem["answer"], bool(problem["image"]))


def test_m3cot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(str(QUESTIONS), "m3cot").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            told = json.loads(line)
            if "question" in told:
                image = {"bytes": drawn(told["image_id"]), "path": f"{told['id']}.png"}
                told |= {"rationale": told["messages"][-1], "split": "test", "image": image}
                rows.setdefault(told["id"], {name: value for name, value in told.items() if name != "messages"})
    folder = tmp_path / "m3cot" / "data"
    write_parquet(folder / "test-00000-of-00001.parquet", list(rows.values()))
    manifest = prepared(tmp_path / "out", "--source=m3cot", f"--input={folder.parent}", "--workers=2")
    found = outcome(manifest)
    with capsys.disabled():
        print(f"\nm3cot: {len(rows)} questions, (samples, rejects) {found}, {manifest['splits']['test']['counts']}")
    assert sum(found["test"]) == len(rows)
    again = open_source("webdataset", str(tmp_path / "out"))
    index = open_split(tmp_path / "out", "test")
    assert [again.example("test", i) for i in range(0, len(index), 50)] == [
        index.read(i) for i in range(0, len(index), 50)
    ]
