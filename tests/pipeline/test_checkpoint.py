"""Checkpoints on disk: damage is found, the best and the newest stay, a full disk is one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from data_prep.errors import UserError
from data_prep.files import sha256
from pipeline import distributed
from pipeline.distributed import World
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.state import Checkpoint
from pipeline.keeping.writing import full_disk_told
from pipeline.watching.guard import GuardState
from tests.pipeline.test_plan import STATE, run_folder, write_checkpoint


@pytest.fixture
def sound(tmp_path: Path) -> Checkpoint:
    folder = write_checkpoint(tmp_path, STATE)
    manifest_of(folder)
    return Checkpoint(folder, STATE)


def manifest_of(folder: Path, *more: str) -> None:
    """Say of a checkpoint's state.json, and other files, that they were written as they are."""
    files = {name: folder / name for name in ("state.json", *more)}
    entries = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
    (folder / "manifest.json").write_text(json.dumps(entries))


def test_sound(sound: Checkpoint) -> None:
    assert sound.damaged() == ""


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state.json": 3}', '{"state.json": {"bytes": 1}}'])
def test_damaged_manifest(sound: Checkpoint, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (sound.path / "manifest.json").write_text(text)
    assert sound.damaged() == "manifest.json"
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    with pytest.raises(UserError, match=r"manifest.json is damaged; remove this folder to use the one before"):
        Checkpoints(sound.path.parents[1]).load(None, sound, World(), False)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", '{"stage": 1}', '{"stage": "one"}'])
def test_damaged_state(sound: Checkpoint, text: str) -> None:
    """It is no checkpoint any more; one that was written so, by another version, is refused."""
    checkpoints = Checkpoints(sound.path.parents[1])
    (sound.path / "state.json").write_text(text)
    assert checkpoints.all() == [] and checkpoints.unreadable() == [sound.path]
    with pytest.raises(UserError, match=r"has no sound checkpoint, only damaged ones .stage0-step000008.; to begin"):
        checkpoints.refuse_none_left()
    manifest_of(sound.path)
    with pytest.raises(UserError, match=r"another version of this program, .* choose another --out"):
        checkpoints.all()


def test_set_aside(tmp_path: Path) -> None:
    """Nothing finds it any more: not all, latest, best or prune; the name may come again."""
    checkpoints = run_folder(tmp_path, 0, inside={1: 3})
    newest = write_checkpoint(tmp_path, replace(STATE, stage=1, step=6))
    (checkpoints.folder / "latest").write_text(newest.name + "\n")
    name_best(tmp_path, 1, 6)
    aside = [checkpoints.set_aside(newest)]
    assert (checkpoints.folder / "latest").read_text() == "stage1-step000003\n" and checkpoints.best(1) is None
    assert [c.path.name for c in checkpoints.all()] == ["stage0-step000008", "stage1-step000003"]
    aside.append(checkpoints.set_aside(write_checkpoint(tmp_path, replace(STATE, stage=1, step=6))))
    checkpoints.prune(1)
    assert len(checkpoints.all()) == 2 and all((path / "state.json").exists() for path in aside)
    for checkpoint in checkpoints.all():
        checkpoints.set_aside(checkpoint.path)
    assert not (checkpoints.folder / "latest").exists()
    with pytest.raises(UserError, match=r"no sound checkpoint, only damaged ones .damaged-stage0-step000008, damaged-"):
        checkpoints.refuse_none_left()


def name_best(out: Path, stage: int, step: int, accuracy: float = 0.5) -> None:
    named = {"checkpoint": f"stage{stage}-step{step:06d}", "val/accuracy": accuracy}
    (out / f"best-stage{stage}.json").write_text(json.dumps(named))


def test_best(tmp_path: Path) -> None:
    checkpoints = run_folder(tmp_path, 0)
    assert checkpoints.best(0) is None
    name_best(tmp_path, 0, 8)
    assert checkpoints.best(0) == ("stage0-step000008", 0.5)
    name_best(tmp_path, 0, 5)
    assert checkpoints.best(0) is None, "its checkpoint is gone"
    for text in ("", "{}", "[]", '{"checkpoint": "stage0-step000008", "val/accuracy": null}'):
        (tmp_path / "best-stage0.json").write_text(text)
        assert checkpoints.best(0) is None


def test_prune(tmp_path: Path) -> None:
    checkpoints = run_folder(tmp_path, 0)
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, replace(STATE, stage=1, step=step))
    name_best(tmp_path, 1, 2)
    (tmp_path / "best-stage0.json").write_text("")
    checkpoints.prune(1)
    assert [(c.state.stage, c.state.step) for c in checkpoints.all()] == [(0, 8), (1, 2), (1, 4)]


def test_prune_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old checkpoint that cannot be removed whole ends no run, is none any more, and goes at the next start."""
    checkpoints = run_folder(tmp_path, inside={0: 3})
    newest = write_checkpoint(tmp_path, replace(STATE, step=6))

    def rmtree(path: Path, **_: object) -> None:
        raise OSError(39, "Directory not empty", ".nfs0001")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        checkpoints.prune(1)
    assert [c.path for c in checkpoints.all()] == [newest] and len(list(checkpoints.folder.iterdir())) == 2
    checkpoints.remove_unfinished()
    assert list(checkpoints.folder.iterdir()) == [newest]


def test_prune_keeps_what_to_roll_back_to(tmp_path: Path) -> None:
    """A stop amid steps that go wrong is a checkpoint, too, but none to go back to."""
    checkpoints = run_folder(tmp_path, 0, inside={1: 3})
    write_checkpoint(tmp_path, replace(STATE, stage=1, step=5, guard=GuardState(in_a_row=2)))
    checkpoints.prune(1)
    assert [c.state.step for c in checkpoints.all()] == [8, 3, 5]
    write_checkpoint(tmp_path, replace(STATE, stage=1, step=6))
    checkpoints.prune(1)
    assert [c.state.step for c in checkpoints.all()] == [8, 6]


FULL = [
    OSError(28, "No space left on device"),
    OSError(122, "Disk quota exceeded"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534\nand more"),  # torch
    RuntimeError("basic_ios::clear: iostream error"),  # torch
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]
"""What a write to a full disk raised, by library."""


@pytest.mark.parametrize("error", FULL, ids=str)
def test_full_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(UserError) as caught, full_disk_told(tmp_path):
        raise error
    (line,) = caught.value.lines
    assert "could not be written" in line and "free some disk space" in line and "\n" not in line


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"), full_disk_told(tmp_path):
        raise RuntimeError("a bug")
