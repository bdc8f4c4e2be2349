"""The lease: who may write to a run folder, through failing disks and damaged files."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import PassingFault, UserError
from data_prep.files import write_atomic
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


def content(lease: Lease) -> dict[str, Any]:
    return json.loads(lease.path.read_text())


def renewed(lease: Lease) -> float:
    return content(lease)["renewed"]


@pytest.mark.parametrize("failing", ["write", "read"])
def test_a_disk_that_fails_for_a_moment(held: Lease, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Renewal goes on afterwards, and nobody is said to have taken over."""
    failures = []

    def fail(*_: object, **__: object) -> str:
        failures.append(1)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if failing == "write":
            patch.setattr(held, "_write", fail)
        else:
            patch.setattr(Path, "read_bytes", fail)
        assert becomes_true(lambda: len(failures) > 2)
    assert held.lost == ""
    before = renewed(held)
    assert becomes_true(lambda: renewed(held) > before)


def test_taken_over(held: Lease) -> None:
    replace(held, id="other", pid=7, host="elsewhere")
    assert becomes_true(lambda: held.lost)
    assert held.lost.endswith("was taken over by process 7 on elsewhere")
    held.release()
    assert content(held)["id"] == "other"
    assert "released" not in content(held)


def replace(held: Lease, **fields: object) -> None:
    """Another's lease in the place of the holder's."""
    write_atomic(held.path, json.dumps({**content(held), "token": int(held.token) + 1, **fields}))


def test_removed(held: Lease) -> None:
    held.path.unlink()
    assert becomes_true(lambda: held.lost)


def test_being_written(held: Lease) -> None:
    """What cannot be understood is no takeover."""
    for text in ("", "[1]", '{"token": 3}'):
        held.path.write_text(text)
        time.sleep(0.05)
        assert held.lost == ""
        held.check()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[1]", '{"token": 1}', '{"token": 1, "id": "i", "host": "h", "pid": 1, "renewed": "yesterday"}',
     '{"token": 1, "id": "i", "host": "h", "pid": [1], "renewed": 1.0}',
     '{"token": "t", "host": "h", "pid": 1}'],
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


@pytest.mark.parametrize(("number", "kind"), [(errno.ESTALE, PassingFault), (errno.EACCES, UserError)])
def test_folder_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[UserError]
) -> None:
    def take(_: Lease) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Lease, "_take", take)
    with pytest.raises(UserError, match="cannot be used as a run folder") as told:
        Lease(tmp_path).acquire(grace=0)
    assert type(told.value) is kind


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as a run folder"):
        Lease(tmp_path / "file" / "run").acquire()


def test_a_write_looks_before(held: Lease) -> None:
    held.check()
    replace(held, id="other", host="node9", pid=7, job="55@cluster")
    with pytest.raises(UserError, match=r"was taken over by process 7 on node9 \(Slurm job 55\)"):
        held.check()
    assert held.lost


# ---- the number --------------------------------------------------------------------------------------------
def test_the_number_grows_with_every_holder(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        lease = Lease(tmp_path)
        lease.acquire(grace=0)
        assert (lease.token, content(lease)["token"], "released" in content(lease)) == (str(number), number, False)
        lease.release()
        assert (content(lease)["token"], content(lease)["released"]) == (number, True)
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]
    # a taker that was killed after it had moved the lease away, before or while it wrote its own
    for left in ("", None):
        lease.path.rename(tmp_path / "lease.0badc0de.old")
        if left is not None:
            lease.path.write_text(left)
            os.utime(lease.path, (time.time() - 2 * STALE,) * 2)
        lease = Lease(tmp_path)
        lease.acquire(grace=0)
        lease.release()
    assert lease.token == "5"
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


def test_a_holder_of_a_version_without_numbers(tmp_path: Path) -> None:
    """It is respected while it renews, and its successor is the first."""
    old = {"token": "0123", "host": "elsewhere", "space": "", "pid": 7, "started": "1", "renewed": time.time()}
    (tmp_path / "lease.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="in use by process 7 on elsewhere, which"):
        Lease(tmp_path).acquire(grace=0)
    (tmp_path / "lease.json").write_text(json.dumps({**old, "renewed": time.time() - 2 * STALE}))
    lease = Lease(tmp_path)
    lease.acquire(grace=0)
    assert content(lease)["token"] == 1
    lease.release()


def test_a_late_renewal_leaves_the_successor_alone(tmp_path: Path) -> None:
    """As of a process that was stopped between looking and renewing."""
    old, new = Lease(tmp_path), Lease(tmp_path)
    old.acquire()
    replace(old, started="0")  # its process is no more
    new.acquire(grace=0)
    old._write()
    old.release()
    assert content(new)["id"] == new._identity["id"]
    assert "released" not in content(new)
    new.check()
    new.release()


def test_of_many_takers_one_gets_it(tmp_path: Path) -> None:
    for _round in range(20):
        leases = [Lease(tmp_path) for _ in range(8)]
        barrier = threading.Barrier(len(leases))

        def take(lease: Lease, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return lease._take()

        with ThreadPoolExecutor(len(leases)) as pool:
            took = list(pool.map(take, leases))
        # one that had to put the new lease back may have none left to hold: then nobody has it, never two
        assert took.count(True) >= 1
        holders = [lease for lease in leases if content(lease)["id"] == lease._identity["id"]]
        assert len(holders) == 1
        holders[0].release()


# ---- takeover and its notice -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("job", "restarts", "cluster", "taken"),
    [("7", "1", "c", True), ("7", "0", "c", False), ("8", "1", "c", False), ("7", "1", "d", False)],
)
def test_a_later_start_of_the_same_job_takes_over_at_once(
    held: Lease, monkeypatch: pytest.MonkeyPatch, job: str, restarts: str, cluster: str, taken: bool
) -> None:
    """Even from a holder that renews all the time."""
    held._identity |= {"job": "7@c", "restarts": 0, "host": "elsewhere"}
    before = renewed(held)
    assert becomes_true(lambda: renewed(held) > before)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
    new = Lease(held.path.parent)
    if not taken:
        with pytest.raises(UserError, match=r"in use by process \d+ on elsewhere \(Slurm job 7\), which renewed its"):
            new.acquire(grace=0)
        return
    new.acquire(grace=0)
    assert int(new.token) == int(held.token) + 1
    assert becomes_true(lambda: held.lost)
    with pytest.raises(UserError, match="was taken over by"):
        held.check()
    new.check()
    new.release()


def test_who_cannot_renew_counts_himself_as_replaced(held: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    held.check()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        held.check()  # a moment
        now = module._clock()
        patch.setattr(module, "_clock", lambda: now + 1.5 * STALE)
        with pytest.raises(PassingFault, match=r"could not be renewed for 9\d s and cannot be read"):
            held.check()
    held.check()


def test_who_hangs_and_lost_it_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "RENEW", 0.01)
    monkeypatch.setattr(module, "GRACE", 0.05)
    ended: list[int] = []
    lease = Lease(tmp_path, end=ended.append)
    lease.acquire()
    replace(lease, id="other", host="node9")
    assert becomes_true(lambda: ended)
    assert ended == [module.LOST]
    line = capfd.readouterr().err
    assert line.startswith(f"error: {tmp_path} was taken over by process ")
    assert line.endswith("on node9; this training ends with status 2\n")


def test_who_ends_by_himself_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RENEW", 0.01)
    ended: list[int] = []
    lease = Lease(tmp_path, end=ended.append)
    lease.acquire()
    replace(lease, id="other")
    assert becomes_true(lambda: lease.lost)
    lease.release()
    assert becomes_true(lambda: not any(thread.name == "lease" for thread in threading.enumerate()))
    assert not ended
