"""The lease: who may write to a run folder, through failing disks and damaged files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.errors import UserError
from pipeline.keeping import lease as module
from pipeline.keeping.lease import STALE, Lease


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A lease that is renewed all the time."""
    monkeypatch.setattr(module, "RENEW", 0.01)
    lease = Lease(tmp_path)
    lease.acquire()
    yield lease
    lease.release()


def becomes_true(what: Callable[[], object]) -> bool:
    deadline = time.monotonic() + 5
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(what())


def renewed(lease: Lease) -> float:
    return json.loads(lease.path.read_text())["renewed"]


@pytest.mark.parametrize("failing", ["write", "read"])
def test_a_disk_that_fails_for_a_moment(held: Lease, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Renewal goes on afterwards, and nobody is said to have taken over."""
    failures = []

    def fail(*_: object, **__: object) -> str:
        failures.append(1)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(module, "write_atomic", fail)
        else:
            patch.setattr(Path, "read_bytes", fail)
        assert becomes_true(lambda: len(failures) > 2)
    assert held.lost == ""
    before = renewed(held)
    assert becomes_true(lambda: renewed(held) > before)


def test_taken_over(held: Lease) -> None:
    other = {**json.loads(held.path.read_text()), "token": "other", "pid": 7, "host": "elsewhere"}
    module.write_atomic(held.path, json.dumps(other))
    assert becomes_true(lambda: held.lost)
    assert held.lost.endswith("was taken over by process 7 on elsewhere")
    held.release()
    assert json.loads(held.path.read_text())["token"] == "other"


def test_removed(held: Lease) -> None:
    held.path.unlink()
    assert becomes_true(lambda: held.lost)


def test_being_written(held: Lease) -> None:
    """What cannot be understood is no takeover."""
    for text in ("", "[1]", '{"token": 3}'):
        held.path.write_text(text)
        time.sleep(0.05)
        assert held.lost == ""


@pytest.mark.parametrize(
    "text",
    ["", "null", "[1]", '{"token": "t"}', '{"token": "t", "host": "h", "pid": 1, "renewed": "yesterday"}',
     '{"token": "t", "host": "h", "pid": [1], "renewed": 1.0}'],
)  # fmt: skip
def test_damaged(tmp_path: Path, text: str) -> None:
    """One line; after a while it counts as left by somebody who was killed."""
    path = tmp_path / "lease.json"
    path.write_text(text)
    with pytest.raises(UserError, match="lease.json is damaged; remove it if nobody is training"):
        Lease(tmp_path).acquire(grace=0)
    os.utime(path, (time.time() - 2 * STALE,) * 2)
    lease = Lease(tmp_path)
    lease.acquire(grace=0)
    lease.release()


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as a run folder"):
        Lease(tmp_path / "file" / "run").acquire()


def test_a_write_looks_before(held: Lease) -> None:
    held.check()
    taken = {"token": "other", "host": "node9", "pid": 7, "renewed": time.time()}
    held.path.write_text(json.dumps(taken))
    with pytest.raises(UserError, match="was taken over by process 7 on node9"):
        held.check()
    assert held.lost
