from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_prep import cli, shard
from data_prep.errors import UserError
from data_prep.files import sha256
from data_prep.index import read_manifest
from data_prep.reader import open_split
from data_prep.shard import build
from data_prep.sources import source_options
from tests.data_prep.conftest import TRAILS, m3cot_row, write_parquet


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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


def rejects(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [1, 2])
def test_rejects(m3cot_folder: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    manifest = build("m3cot", out, input=str(m3cot_folder), samples_per_shard=2, workers=workers)
    part = manifest["splits"]["train"]
    assert part["samples"] == 4
    assert part["counts"] == {
        "rows": 6, "without_image": 1, "without_rationale": 0, "repeated_ids": 0, "skipped": 0,
        "rejected": {"image cannot be decoded": 1, "no answer": 1}, "duplicates": 0, "also_in": {"val": 0, "test": 0},
    }  # fmt: skip
    told = [(line["id"], line["row"], line["key"]) for line in rejects(out)]
    assert told == [("topic-1", 1, "000000001"), ("topic-2", 2, "000000002")]
    assert all(line.keys() == {"source", "split", "key", "row", "id", "reason"} for line in rejects(out))
    assert all(line["source"] == "m3cot" and line["split"] == "train" for line in rejects(out))
    assert manifest["rejects"] == {"name": "rejects.jsonl", "rows": 2, "sha256": sha256(out / "rejects.jsonl")}
    index = open_split(out, "train")
    assert [index.key(i) for i in range(4)] == ["000000000", "000000003", "000000004", "000000005"]
    assert [index.read(i).image is None for i in range(4)] == [False, True, False, False]
    names = [file["name"] for file in manifest["source"]["input"]]
    assert names == [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")]
    assert str(tmp_path) not in (out / "manifest.json").read_text()  # no machine's path


def test_text_only_questions_can_be_skipped(scienceqa_folder: Path, tmp_path: Path) -> None:
    manifest = build("scienceqa", tmp_path / "out", input=str(scienceqa_folder), split="train", text_only="skip")
    part = manifest["splits"]["train"]
    assert (part["samples"], part["counts"]["skipped"]) == (1, 1)
    assert part["counts"]["rejected"] == {"image file cannot be read": 1}
    assert rejects(tmp_path / "out")[0]["reason"] == "no image (text_only=skip)"


def test_nothing_usable(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "test.parquet", [m3cot_row(0, answer="Z"), m3cot_row(1, question="")])
    told = r"nothing of the split test could be used: 1 x answer outside the choices, 1 x no question \(see (.*)\)"
    with pytest.raises(UserError, match=told) as caught:
        build("m3cot", tmp_path / "out", input=str(tmp_path / "in"))
    assert not (tmp_path / "out" / "manifest.json").exists()
    match = re.search(told, str(caught.value))
    assert match and len(Path(match[1]).read_text().splitlines()) == 2


def test_odd_unicode_is_a_reject_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"question": "Up?", "choices": ["yes", "no"], "answer": 0, "rationale": ""}
    rows = [good | {"id": "a"}, good | {"id": "\ud800"}, good | {"id": "b", "\ud800": "x"}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli.run(shard.main, ["--source=jsonl", f"--input={tmp_path / 'own.jsonl'}", f"--out={tmp_path / 'out'}"])
    assert len(rejects(tmp_path / "out")) == 2
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
        (tmp_path / "out" / "manifest.json").unlink(missing_ok=True)  # the longer run was not finished
        build("m3cot", tmp_path / "out", input=str(tmp_path / "in"), samples_per_shard=2)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2


def test_tars_of_somebody_else_stay(tmp_path: Path) -> None:
    (tmp_path / "train-000123.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds train-000123\.tar, which this program did not write"):
        build("trails", tmp_path, options=TRAILS)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000123.tar"]


@pytest.mark.parametrize("name", ["rejects.jsonl", ".parts/own.jsonl"])
def test_an_input_where_something_is_written_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / ".parts").mkdir()
    (tmp_path / name).write_text(jsonl_rows("a"))
    with pytest.raises(UserError, match="holds the input"):
        build("jsonl", tmp_path, input=str(tmp_path / name))
    assert (tmp_path / name).read_text() == jsonl_rows("a")


def jsonl_rows(*ids: str, split: str = "train") -> str:
    row = {"question": "Up?", "choices": ["yes", "no"], "answer": 0, "rationale": "", "split": split}
    return "".join(json.dumps(row | {"id": id}) + "\n" for id in ids)


def build_part(source: str, out: Path, input: Path, split: str = "val") -> dict[str, Any]:
    return build(source, out, input=str(input), split=split)  # type: ignore[arg-type]


def test_splits_of_another_input_are_not_mixed(tmp_path: Path) -> None:
    for folder, ids in (("a", "xy"), ("same", "xy"), ("b", "xz"), ("c", "xyz")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.jsonl").write_text(jsonl_rows(*ids) + jsonl_rows("v", split="val"))
    out, one = tmp_path / "out", tmp_path / "one"
    build_part("jsonl", out, tmp_path / "a" / "own.jsonl", "train")
    before = contents(out)
    with pytest.raises(UserError, match=r"made from another input: input\.jsonl has other content now; choose another"):
        build_part("jsonl", out, tmp_path / "b" / "own.jsonl")
    with pytest.raises(UserError, match=r"another input: input\.jsonl has \d+ bytes now, not \d+;") as caught:
        build_part("jsonl", out, tmp_path / "c" / "own.jsonl")
    assert len(caught.value.lines) == 1
    assert contents(out) == before
    (tmp_path / "same" / "own.jsonl").rename(tmp_path / "same" / "renamed.jsonl")
    build_part("jsonl", out, tmp_path / "same" / "renamed.jsonl")
    build("jsonl", one, input=str(tmp_path / "a" / "own.jsonl"))
    assert contents(out) == contents(one)


def test_splits_of_other_parquet_files_are_not_mixed(m3cot_folder: Path, tmp_path: Path) -> None:
    out, copy = tmp_path / "out", tmp_path / "elsewhere" / "copy"
    build_part("m3cot", out, m3cot_folder, "train")
    shutil.copytree(m3cot_folder, copy)
    build_part("m3cot", out, copy)
    write_parquet(copy / "data" / "validation-00001-of-00002.parquet", [m3cot_row(11)])
    (copy / "data" / "test-00000-of-00001.parquet").unlink()
    told = "data/test-00000-of-00001.parquet is missing now, data/validation-00001-of-00002.parquet is new;"
    with pytest.raises(UserError, match=told):
        build_part("m3cot", out, copy)


def test_many_changed_files_are_one_short_line(m3cot_folder: Path, tmp_path: Path) -> None:
    build_part("m3cot", tmp_path / "out", m3cot_folder, "train")
    for number in range(5):
        write_parquet(m3cot_folder / "data" / f"test-{number}.parquet", [m3cot_row(30 + number)])
    told = r"input: data/test-0\.parquet is new, data/test-1\.parquet is new, data/test-2\.parquet is new and 2 more;"
    with pytest.raises(UserError, match=told):
        build_part("m3cot", tmp_path / "out", m3cot_folder)


def test_splits_of_edited_problems_are_not_mixed(scienceqa_folder: Path, tmp_path: Path) -> None:
    build_part("scienceqa", tmp_path / "out", scienceqa_folder, "train")
    (scienceqa_folder / "pid_splits.json").write_text(json.dumps({"train": ["1", "2"], "val": ["4", "3"]}))
    with pytest.raises(UserError, match=r"another input: pid_splits\.json has \d+ bytes now"):
        build_part("scienceqa", tmp_path / "out", scienceqa_folder)
    (scienceqa_folder / "pid_splits.json").unlink()
    with pytest.raises(UserError, match=r"another input: pid_splits\.json is missing now"):
        build_part("scienceqa", tmp_path / "out", scienceqa_folder)


def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").mkdir()
    with pytest.raises(UserError, match=f"--out {tmp_path}: cannot be written") as caught:
        build("trails", tmp_path, options=TRAILS)
    assert len(caught.value.lines) == 1
    if Path("/sys/kernel").is_dir():
        with pytest.raises(UserError, match="--out /sys: cannot be written"):
            build("trails", Path("/sys"), options=TRAILS, workers=2)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The command at work with two workers, which would go on for many minutes."""
    words = ["--source=trails", "--train=500000", "--val=0", "--test=0", "--samples_per_shard=100000", "--workers=2"]
    command = [sys.executable, "-m", "data_prep.shard", *words, f"--out={tmp_path / 'out'}"]
    heed_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores them
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts) as process:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").rglob("*.tar.tmp"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        helpers = psutil.Process(process.pid).children(recursive=True)
        yield process
        left = psutil.wait_procs(helpers, timeout=20)[1]
        for helper in left:
            helper.kill()
        process.kill()
    assert not left


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    helpers = psutil.Process(process.pid).children()
    return [helper for helper in helpers if any("spawn_main" in word for word in helper.cmdline())]


def end_of(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit status, and what it said beside its progress."""
    _, said = process.communicate(timeout=30)
    lines = said.replace("\r", "\n").splitlines()
    return process.returncode, [line for line in lines if line and not re.match(r"(train: +| +)?\d+%", line)]


def test_workers_end_with_a_killed_command(running: subprocess.Popen[str]) -> None:
    assert len(workers_of(running)) == 2
    running.kill()  # the fixture waits for the others


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_command_cleans_up(
    running: subprocess.Popen[str], tmp_path: Path, number: int, status: int
) -> None:
    running.send_signal(number)
    assert end_of(running) == (status, ["error: interrupted"])
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_a_killed_worker(running: subprocess.Popen[str], tmp_path: Path) -> None:
    workers_of(running)[0].kill()
    status, said = end_of(running)
    assert status == 2 and len(said) == 1
    assert said[0].startswith("error: a worker process was ended from outside")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--source", "trails", "--out", str(tmp_path / "out"), "--train=12", "--val=3", "--test=3", "--grid", "3"]
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
