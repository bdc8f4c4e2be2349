"""The report of a shard folder: its numbers against data counted by hand, and a page that no data can break."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import cli, report
from data_prep.errors import UserError
from data_prep.files import sha256
from data_prep.index import RECORD, read_manifest, write_manifest
from data_prep.reader import open_split
from data_prep.report import Report, make_report
from data_prep.reporting import measure
from data_prep.reporting.gallery import data_uri, pick
from data_prep.reporting.html import bin_width, histogram
from data_prep.reporting.measure import measure_index, quantile, spread, z_score
from data_prep.reporting.page import page
from data_prep.shard import build
from tests.data_prep.conftest import picture

QUESTIONS: list[dict[str, Any]] = [
    {"id": "a", "question": "Which fruit is it?", "choices": ["fig", "a pear"], "answer": "B", "topic": "food",
     "rationale": "It is green. It has a stem.", "image": "red.png"},
    {"id": "b", "question": "Which fruit is it?", "choices": ["fig", "nut"], "answer": "A", "topic": "food",
     "rationale": "No. Yes. So. Done.", "image": "red.png"},
    {"id": "c", "question": "Which?", "choices": ["one", "two", "three four"], "answer": "C", "topic": "drink",
     "rationale": ""},
    {"id": "d", "question": "Which?", "choices": ["one", "two"], "answer": "A", "topic": "drink",
     "rationale": "", "context": "Three words here"},
    {"id": "e", "question": "Which fruit is it?", "choices": ["fig", "nut"], "answer": "E", "rationale": "",
     "topic": "food"},
    {"id": "t", "question": "Which fruit is it?", "choices": ["fig", "a pear"], "answer": "A", "topic": "food",
     "rationale": "It is red.", "image": "red.png", "split": "test"},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four usable training rows, two of which ask the same as the test row; a fifth has no right answer."""
    return shards(tmp_path, QUESTIONS)


def shards(place: Path, questions: list[dict[str, Any]]) -> Path:
    (place / "red.png").write_bytes(picture("red", (40, 30)))
    (place / "own.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    build("jsonl", place / "own", input=str(place / "own.jsonl"), samples_per_shard=2)
    return place / "own"


def plain(folder: Path, rows: int = 100, samples: int = 12, seed: int = 0) -> Report:
    """Without a recipe, so without the trainer's libraries."""
    return make_report(str(folder), [], {}, rows, samples, seed, ranks=1)


def test_numbers_of_a_folder(folder: Path) -> None:
    made = plain(folder)
    assert [*made.folder.splits] == ["train", "test"]
    train = made.folder.splits["train"]
    assert (train.samples, train.shards, train.rows, train.bad) == (4, 3, 4, 0)
    assert train.steps == {2: 1, 4: 1, 0: 2}
    assert train.sizes == {(40, 30): 2}
    assert train.fields == {"topic": {"food": 2, "drink": 2}}
    assert train.answers == {2: {1: 1, 0: 2}, 3: {2: 1}}
    assert train.lengths == {
        "question": {4: 2, 1: 2}, "choices": {3: 1, 2: 2, 4: 1}, "rationale": {7: 1, 4: 1, 0: 2},
        "answer": {2: 2, 1: 2}, "context": {3: 1},
    }  # fmt: skip
    assert made.folder.duplicates == {"train": 1, "test": 0}
    assert made.folder.also_in == {("train", "test"): 2, ("test", "train"): 1}
    assert [(entry["split"], entry["id"]) for entry in made.folder.rejects] == [("train", "e")]
    found = [line for _, line in made.findings]
    assert "2 samples of train also in test (same question and picture): results on test would be too good" in found
    assert "train: 1 source row rejected when the folder was made" in found
    assert "train: 2 samples (50.0%) without a rationale" in found


def test_an_even_sample(trails: Path) -> None:
    assert spread(10, 3).tolist() == [0, 4, 9] and spread(2, 5).tolist() == [0, 1] and spread(0, 5).tolist() == []
    made = plain(trails, rows=7)
    train = made.folder.splits["train"]
    assert (train.rows, train.steps.total(), train.samples) == (7, 25, 25)
    assert "7 evenly spread rows of each split were read" in page(made)


def test_bad_samples_are_counted_and_named(trails: Path) -> None:
    offset = int(open_split(trails, "train").records[12]["json_offset"])
    with open(trails / "train-000001.tar", "r+b") as tar:
        tar.seek(offset)
        tar.write(b"X")
    records = np.load(trails / "train.index.npy")
    records["steps"][20:] = 9
    np.save(trails / "train.index.npy", records)
    made = plain(trails, samples=25)
    train = made.folder.splits["train"]
    assert (train.bad, train.rows, train.steps.total()) == (6, 19, 20)
    assert train.bad_named[0].startswith("the index of train-000002.tar")
    assert train.bad_named[1].startswith("000000012: its bytes")
    shown = page(made)
    assert shown.count("000000012: its bytes") == 2  # under the splits, and in the gallery
    assert ("bad", f"train: 6 rows cannot be read, such as {train.bad_named[0]}") in made.findings


def test_a_split_that_cannot_be_opened(trails: Path) -> None:
    (trails / "val.index.npy").unlink()
    made = plain(trails)
    assert [*made.folder.splits] == ["train", "test"]
    assert "val.index.npy is missing" in made.findings[0][1] and "val.index.npy is missing" in page(made)
    for name in ("train", "test"):
        (trails / f"{name}.index.npy").unlink()
    with pytest.raises(UserError, match="is missing"):
        plain(trails)


def test_an_empty_split(trails: Path) -> None:
    np.save(trails / "val.index.npy", np.zeros(0, RECORD))
    manifest = read_manifest(trails)
    index = {"name": "val.index.npy", "sha256": sha256(trails / "val.index.npy")}
    manifest["splits"]["val"] |= {"shards": [], "samples": 0, "index": index}
    write_manifest(trails, manifest)
    made = plain(trails)
    assert ("bad", "val: the split is empty") in made.findings
    assert not re.search(r"\bnan\b", re.sub(r"base64,[^\"]*", "", page(made)).lower())


def test_a_folder_of_text_alone(tmp_path: Path) -> None:
    made = plain(shards(tmp_path, [QUESTIONS[2], QUESTIONS[3]]))
    shown = page(made)
    assert "All questions are text alone." in shown and "no picture" in shown and "data:image" not in shown


def test_without_rejects_file(folder: Path) -> None:
    (folder / "rejects.jsonl").unlink()
    made = plain(folder)
    assert made.folder.rejects == [] and "is not in the folder" in page(made)


def test_rejects_that_somebody_edited(folder: Path) -> None:
    lines = [json.dumps({"split": "train", "key": f"00000000{i}", "reason": f"kind: {i}"}) for i in range(9)]
    (folder / "rejects.jsonl").write_text("\n".join(["[1]", "{", '{"id": "\\ud800", "reason": 7}', *lines]))
    made = plain(folder)
    assert [entry["reason"] for entry in made.folder.rejects] == ["7", "kind: 0", "kind: 1", "kind: 2"]
    page(made).encode()


class Elements(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]


EVIL = "\"'><script>alert(1)</script><img src=http://x.example/y onerror=alert(2)>&lt;b&gt; \x1b[31m \u202e $title"


def test_no_data_becomes_markup(tmp_path: Path) -> None:
    evil = {
        "id": EVIL, "question": EVIL, "choices": [EVIL, "other"], "answer": "A", "rationale": f"{EVIL}. {EVIL}",
        "context": EVIL, EVIL: EVIL, "image": "red.png",
    }  # fmt: skip
    folder = shards(tmp_path, [evil, evil | {"id": "2"}, evil | {"id": f"{EVIL}3", "answer": EVIL}])
    made = plain(folder)
    made.findings.append(("note", EVIL))
    shown = page(made)
    found = Elements(shown)
    assert not found.tags.keys() & {"script", "b", "iframe", "object", "link"}
    assert found.tags["img"] == 2
    for name, value in found.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or value.startswith(("data:image/", "#"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", shown)
    assert shown.count("&lt;script&gt;alert(1)") > 8
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", "\n".join(report.summary(made)))


def test_the_gallery(folder: Path) -> None:
    index = open_split(folder, "train")
    first = pick(index, 3, 0, None)
    assert [s.key for s in first] == [s.key for s in pick(index, 3, 0, None)] and len(first) == 3
    assert len({tuple(s.key for s in pick(index, 3, seed, None)) for seed in range(9)}) > 1
    made = plain(folder)
    shown = page(made)
    assert '<li class=right>B. <bdi>a pear</bdi> <span aria-label="right answer">✓</span></li>' in shown
    assert re.search(r'>1</span><span><span class="step" dir="auto">It is green</span>', shown)


@pytest.mark.parametrize(("mode", "size"), [("RGB", (900, 300)), ("I;16", (20, 10)), ("LA", (5, 5)), ("P", (9, 9))])
def test_pictures_of_every_kind_are_shown(mode: str, size: tuple[int, int]) -> None:
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG")
    uri, *shown = data_uri(out.getvalue())
    decoded = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert tuple(shown) == size and max(decoded.size) <= 320
    assert decoded.width / decoded.height == pytest.approx(size[0] / size[1], rel=0.02)
    with pytest.raises(ValueError, match="cannot be decoded"):
        data_uri(out.getvalue()[:30])


def test_statistics() -> None:
    values = Counter({1: 50, 3: 45, 9: 5})
    assert [quantile(values, share) for share in (0, 0.5, 0.51, 0.95, 0.96, 1)] == [1, 1, 3, 3, 9, 9]
    assert quantile(Counter(), 0.5) == 0
    assert z_score(40, 100, 4) == pytest.approx(0.15 / (0.25 * 0.75 / 100) ** 0.5)
    assert [bin_width(Counter(range(n))) for n in (12, 13, 24, 25, 60, 61, 1200)] == [1, 2, 2, 5, 5, 10, 100]
    drawn = histogram({"train": Counter({0: 300, 1: 100}), "test": Counter({10**6: 1}), "val": Counter()})
    assert "train, 0: 75.0%" in drawn and "test, 13+: 100.0%" in drawn and "val, 0: 0.0%" in drawn


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(report.main, ["--data", f"{folder}/", "--recipe", "none"])
    shown = capsys.readouterr().out
    written = folder.parent / "own-report.html"
    assert f"written to {written}" in shown and "5 samples in 2 splits" in shown and "worth a look:" in shown
    assert written.read_text().startswith("<!doctype html>")
    assert not [*folder.parent.glob("*.tmp")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--recipe", "none", "--sampel", "3"], "unknown option --sampel; did you mean --sample?"),
        (["--sample", "0"], "--sample 0: expected 1 or more"),
        (["--recipe", "nowhere.yaml"], "recipe nowhere.yaml: No such file"),
        (["--recipe", "none", "--out", "no/such/folder/x.html"], "--out no/such/folder/x.html: cannot be written"),
    ],
)
def test_mistakes(folder: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(report.main, ["--data", str(folder), *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {told}")


def test_no_torch_without_a_recipe(folder: Path) -> None:
    words = ["--data", str(folder), "--recipe", "none"]
    code = f"import sys; from data_prep import cli, report; cli.run(report.main, {words})"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_damaged_parts_do_not_stop_the_index(trails: Path) -> None:
    index = open_split(trails, "train")
    split = measure.SplitMeasure("train", 25, 3, 0, {})
    index.records = np.array(index.records)
    index.records["steps"][3] = 7
    measure_index(index, split)
    assert (split.bad, split.damaged, split.steps.total()) == (10, {0}, 15)
