"""Preparation that is stopped at any moment: what was finished is kept, and the end is that of an undisturbed run.

IVTLR_KILLS says how many real kills `test_killed_at_random_moments` makes, each at another moment.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from data_prep.making import publish
from data_prep.making.parts import PARTS
from data_prep.shard import build
from tests.data_prep.conftest import TRAILS, picture
from tests.data_prep.test_shard import contents

KILLS = int(os.environ.get("IVTLR_KILLS", "2"))


class Stopped(BaseException):
    """An end that nothing catches."""


def stop(_: object) -> BaseException:
    return Stopped()


def full(path: object) -> BaseException:
    return OSError(errno.ENOSPC, "No space left on device", str(path))


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, at: int, failure: Callable[[object], BaseException]) -> None:
    """Let call number `at` of a function of `os` fail, and all later ones."""
    real, calls = getattr(os, name), iter(range(1_000_000))

    def failing(*arguments: Any) -> Any:
        if next(calls) >= at:
            raise failure(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(os, name, failing)


def write_own(folder: Path, colour: str) -> Path:
    """Rows of two splits about one picture, whose content is not part of the input's identity; one row is rejected."""
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(picture(colour))
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "rationale": "", "image": "a.png"}
    rows = [row | {"id": f"{split}-{i}", "split": split} for split in ("train", "test") for i in range(3)]
    rows[1]["answer"] = 7
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "own.jsonl"


def build_own(input: Path, out: Path, **options: Any) -> dict[str, Any]:
    return build("jsonl", out, input=str(input), samples_per_shard=2, **options)


@pytest.mark.parametrize(("name", "failure"), [("replace", stop), ("fsync", full)])
@pytest.mark.parametrize("older", [False, True])
def test_stopped_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, failure: Callable[[object], BaseException], older: bool
) -> None:
    """Before every rename, and with a disk that is full at every file; in a new folder, and over a finished one."""
    build_own(write_own(tmp_path / "in", "red"), tmp_path / "red")
    input = write_own(tmp_path / "in", "blue")
    build_own(input, tmp_path / "blue")
    before, wanted = contents(tmp_path / "red") if older else {}, contents(tmp_path / "blue")
    assert wanted["manifest.json"] != contents(tmp_path / "red")["manifest.json"]
    at, kept_some = 0, False
    while True:
        out, said = tmp_path / f"out-{at}", list[str]()
        shutil.copytree(tmp_path / "red", out) if older else out.mkdir()
        with monkeypatch.context() as patch:
            fail_at(patch, name, at, failure)
            try:
                build_own(input, out)
                break
            except Stopped:
                pass
            except UserError as error:
                told = f"--out {out}: no space left on the device; finished shards are kept: make room and"
                assert len(error.lines) == 1 and error.lines[0].startswith(told)
        if not (out / PARTS / "publish" / "manifest.json").exists():
            assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
        build_own(input, out, say=said.append)
        assert contents(out) == wanted  # and PARTS is gone: it is no file
        kept_some |= any(line.startswith("kept") for line in said)
        at += 1
    assert at > 10 and kept_some


def interrupted(monkeypatch: pytest.MonkeyPatch, out: Path, renames: int = 6, **options: Any) -> None:
    """A run of trails with 25 rows of train in three shards, stopped; the shards of test and val come first."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        fail_at(patch, "replace", renames, stop)
        build("trails", out, options=TRAILS, samples_per_shard=10, **options)


def resumed(out: Path, **options: Any) -> list[str]:
    said: list[str] = []
    build("trails", out, **{"options": TRAILS, "samples_per_shard": 10, "say": said.append} | options)
    return said


@pytest.mark.parametrize("workers", [1, 2])
def test_kept_shards_are_counted(trails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    interrupted(monkeypatch, tmp_path / "out", 3 + 1 + 3 + 1 + 3)  # of three files a shard and an index a split
    assert resumed(tmp_path / "out", workers=workers) == [
        "kept 3 of 5 shards, verified, of a run that was stopped; made 2"
    ]
    assert contents(tmp_path / "out") == contents(trails)


@pytest.mark.parametrize("suffix", ["tar", "npy", "json"])
def test_a_damaged_part_is_made_again(
    trails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    interrupted(monkeypatch, tmp_path / "out", split="train")
    part = tmp_path / "out" / PARTS / f"train-000000.{suffix}"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert "kept 1 of 3" in resumed(tmp_path / "out", split="train")[0]
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == (trails / "train-000000.tar").read_bytes()


@pytest.mark.parametrize("changed", [{"options": TRAILS | {"seed": 1}}, {"samples_per_shard": 5}])
def test_parts_of_other_settings_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    interrupted(monkeypatch, tmp_path / "out", 9)
    assert resumed(tmp_path / "out", **changed) == []
    resumed(tmp_path / "whole", **changed)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_of_an_edited_input_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    input, said = write_own(tmp_path / "in", "red"), list[str]()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        fail_at(patch, "replace", 8, stop)
        build_own(input, tmp_path / "out")
    input.write_text(input.read_text().replace("Which?", "Whose?"))
    build_own(input, tmp_path / "out", say=said.append)
    assert said == [] and b"Whose" in (tmp_path / "out" / "test-000000.tar").read_bytes()


def test_parts_of_another_split_stay(trails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    interrupted(monkeypatch, out, split="train")
    for split in ("test", "val"):
        assert resumed(out, split=split) == []
    assert (out / PARTS).is_dir()
    assert "kept 2 of 3" in resumed(out, split="train")[0]
    assert contents(out) == contents(trails)


def test_a_settled_result_is_put_in_place(trails: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(publish, "put_in_place", lambda out: (_ for _ in ()).throw(Stopped))
        resumed(tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert resumed(tmp_path / "out") == ["an earlier run had finished all of it; put in place"]
    assert contents(tmp_path / "out") == contents(trails)


def test_one_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_PATIENCE", 0.1)
    with publish.locked(tmp_path), pytest.raises(UserError, match="another run is writing to this folder"):
        resumed(tmp_path)
    resumed(tmp_path)


def test_a_full_disk(trails: Path, tmp_path: Path) -> None:
    """A real one, with two workers."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        with pytest.raises(UserError, match="no space left on the device; finished shards are kept") as caught:
            resumed(disk / "out", workers=2)
        assert len(caught.value.lines) == 1
        subprocess.run(["mount", "-o", "remount,size=10M", str(disk)], check=True)
        assert resumed(disk / "out", workers=2)[0].startswith("kept ")
        assert contents(disk / "out") == contents(trails)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SIZES = {"train": 60, "val": 6, "test": 6}
SHARDS = 15 + 2 + 2


def start(out: Path) -> subprocess.Popen[bytes]:
    """The command at work with two workers."""
    words = ["--source=trails", *(f"--{split}={rows}" for split, rows in SIZES.items()), "--samples_per_shard=4"]
    command = [sys.executable, "-m", "data_prep.shard", *words, "--workers=2", f"--out={out}"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """At so many finished shards and a little later, the last ones while all is put in place."""
    build("trails", tmp_path / "whole", options=SIZES, samples_per_shard=4)
    wanted = contents(tmp_path / "whole")
    for kill in range(KILLS):
        draw, out = random.Random(kill), tmp_path / f"out-{kill}"
        process, shards = start(out), draw.randrange(SHARDS + 1)
        while len(list((out / PARTS).glob("*.json"))) < shards and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        alone = draw.random() < 0.5  # its workers then end by themselves
        with contextlib.suppress(ProcessLookupError):
            process.kill() if alone else os.killpg(process.pid, signal.SIGKILL)
        status, said = process.wait(), list[str]()
        kept = sum(record.with_suffix(".tar").exists() for record in (out / PARTS).glob("*.json"))
        build("trails", out, options=SIZES, samples_per_shard=4, say=said.append)
        print(f"kill {kill}: {'alone' if alone else 'all'}, after {shards} shards, status {status}: {' '.join(said)}")
        assert contents(out) == wanted, f"kill {kill}"
        assert not kept or int(said[0].split()[1]) >= kept  # a worker of a killed command may still finish one
