"""A lease on a run folder, so that two trainers never write to one.

The holder renews RUN/lease.json from a thread.  Another trainer takes over when the holder is gone: at once if it was a
process of this machine that no longer exists, or an earlier start of the same Slurm job; otherwise after `STALE`
seconds without renewal.  Every holder has a number one above that of the holder before (the fencing token), and looks
at the file before it writes anything to the folder: one that was cut off and comes back finds that it has been
replaced, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import PassingFault, UserError, kind_of
from data_prep.files import parse_json

RENEW, STALE = 5.0, 60.0
"""Seconds between renewals, and without one until the holder counts as gone, to others and to itself."""
GRACE = 20.0
"""Seconds to wait for a holder that may be about to stop, before refusing; and from losing the lease to being ended."""
LOST = 2
"""Exit status of a trainer that was replaced: its job is not to be queued again."""
_SIZE = 1024


class Lease:
    """Held from `acquire` to `release`; rank 0 of a run holds it for all."""

    def __init__(self, folder: Path, end: Callable[[int], object] | None = None) -> None:
        """`end`: what ends this process when it lost the lease and goes on for `GRACE` seconds, such as os._exit; a
        trainer that was cut off from the others hangs in a collective, and cannot look by itself."""
        self.path, self.end = folder / "lease.json", end
        # token: the number, 0 before `acquire`
        self._identity = {"token": 0, **this_process(), **_this_job(), "id": os.urandom(8).hex()}
        self._stop, self._writing = threading.Event(), threading.Lock()
        self._file, self._renewed = -1, 0.0
        self.lost = ""
        """Who has taken the folder over, if somebody has; to be looked at before writing to it."""

    @property
    def token(self) -> str:
        """What tells this holder from every other; a part of the names of folders that are being written."""
        return str(self._identity["token"])

    def acquire(self, grace: float = GRACE) -> None:
        """Take the lease.  Raises UserError naming the holder where it is still there after `grace` seconds."""
        deadline = time.monotonic() + grace
        try:
            while not self._take():
                holder = self._read()
                if holder is not None and time.monotonic() > deadline:
                    raise UserError(
                        f"{self.path.parent} is in use by {_named(holder)}, which renewed its lease"
                        f" {max(0.0, time.time() - holder['renewed']):.0f} s ago; stop it, or choose another --out"
                        if holder
                        else f"{self.path} is damaged; remove it if nobody is training in {self.path.parent}"
                    )
                time.sleep(0.5)
        except OSError as error:
            raise kind_of(error)(f"{self.path.parent} cannot be used as a run folder: {error}") from None
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def check(self) -> None:
        """To be called before every write to the folder, by the rank that holds the lease.

        Reads the file.  Raises UserError where another trainer has taken the folder over.  A disk that fails for a
        moment takes the lease from nobody; where it could not be renewed for `STALE` seconds, another may hold it, and
        a file that cannot be read is an error.
        """
        if not self.lost:
            try:
                found = self._look()
            except OSError:
                found = False
            held = _clock() - self._renewed
            if not found and held > STALE:
                raise PassingFault(
                    f"{self.path} could not be renewed for {held:.0f} s and cannot be read: another training may have"
                    f" taken {self.path.parent} over; look after the file system, then start again"
                )
        if self.lost:
            raise UserError(self.lost)

    def release(self) -> None:
        """Give the folder free.  The file stays and keeps the number."""
        self._stop.set()
        with self._writing, contextlib.suppress(OSError):  # not marked it goes stale
            if self._file >= 0:
                self._write(released=True)

    # ---- taking it ---------------------------------------------------------------------------------------------
    def _take(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        holder = self._read()
        grave = self.path.with_name(f"lease.{os.urandom(8).hex()}.old")
        if holder is not None:
            if not (holder.get("released") or _is_gone(holder) or self._left_empty(holder)):
                return False
            # exactly one of several takers succeeds in moving the dead lease away
            try:
                os.rename(self.path, grave)
            except FileNotFoundError:
                return False
            if _id(self._read(grave)) != _id(holder):  # somebody was quicker, and this is its lease: put it back
                with contextlib.suppress(OSError):
                    os.link(grave, self.path)
                    grave.unlink()
                return False
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        graves = self._graves()
        self._identity["token"] = 1 + max(graves.values(), default=0)
        try:
            self._write()
        except OSError:
            self.path.unlink()
            raise
        for path, token in graves.items():
            if token or path == grave:  # another that says nothing yet may be a taker's that was just moved away
                path.unlink(missing_ok=True)
        return True

    def _graves(self) -> dict[Path, int]:
        """Leases that were moved away, by this taker or by one that was killed before it had its own; their numbers."""
        while True:
            graves = {path: self._read(path) for path in self.path.parent.glob("lease.*.old")}
            if None not in graves.values():  # else somebody who has counted it has just removed it: look at his
                return {path: (found or {}).get("token", 0) for path, found in graves.items()}

    def _left_empty(self, holder: dict[str, Any]) -> bool:
        """Whether the lease is unreadable and has been for long: its writer was killed while writing."""
        with contextlib.suppress(OSError):
            return not holder and time.time() - self.path.stat().st_mtime > STALE
        return False

    # ---- keeping it --------------------------------------------------------------------------------------------
    def _keep(self) -> None:
        """Renew until released, or lost."""
        while not self.lost and not self._stop.wait(RENEW):
            # a disk that fails for a moment takes the lease from nobody
            with self._writing, contextlib.suppress(OSError):
                if not self._stop.is_set() and self._look():
                    self._write()
        if self.lost:
            self._end()

    def _end(self) -> None:
        """The trainer's next look ends it.  If none comes, because it hangs, this does."""
        if self.end is not None and not self._stop.wait(GRACE):
            line = f"error: {self.lost}; this training ends with status {LOST}"
            if sys.__stderr__ is not None:
                # on a thread of its own: it may be the screen that hangs
                say = threading.Thread(target=print, args=[line], kwargs={"file": sys.__stderr__, "flush": True})
                say.daemon = True
                say.start()
                say.join(1)
            self.end(LOST)

    def _look(self) -> bool:
        """Whether the file says that we hold the lease; where somebody else does, `lost` says who."""
        holder = self._read()
        if holder is None:
            time.sleep(0.2)  # a taker that came too late moves a living lease away for a moment
            holder = self._read()
        if holder != {} and _id(holder) != self._identity["id"]:
            self.lost = f"{self.path.parent} was taken over by {_named(holder or {})}"
        return bool(holder) and not self.lost

    def _write(self, **more: bool) -> None:
        """Renew.  In place, through the file that we created: once replaced, we cannot touch our successor's."""
        began = _clock()
        content = {**self._identity, "renewed": time.time(), **more}
        os.pwrite(self._file, json.dumps(content).ljust(_SIZE).encode(), 0)
        os.fsync(self._file)
        self._renewed = began

    def _read(self, path: Path | None = None) -> dict[str, Any] | None:
        """What the lease says; None without one, {} for one that is damaged or being written this moment."""
        try:
            value = parse_json((path or self.path).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        if isinstance(value, dict) and type(value.get("token")) is str:  # of a version that did not number its holders
            value |= {"token": 0, "id": value["token"]}
        kinds = {"token": int, "id": str, "host": str, "pid": int, "renewed": float}
        sound = isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in kinds.items())
        return value if sound else {}


def _clock() -> float:
    """Seconds that go on while the machine is suspended, whatever is done to the time of day."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def this_process() -> dict[str, Any]:
    """What `has_ended` tells this process by."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "space": _pid_space(), "pid": pid, "started": _start_time(pid)}


def _this_job() -> dict[str, Any]:
    """The Slurm job of this process, and its how manieth start this is; nothing outside of Slurm."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return {}
    restarts = env.get("SLURM_RESTART_COUNT", "0")
    job = f"{env['SLURM_JOB_ID']}@{env.get('SLURM_CLUSTER_NAME', '')}"
    return {"job": job, "restarts": int(restarts) if restarts.isdecimal() else 0}


def _is_gone(holder: dict[str, Any]) -> bool:
    if not holder:
        return False
    if _is_replaced(holder):
        return True
    ended = has_ended(holder)
    return time.time() - holder["renewed"] > STALE if ended is None else ended


def has_ended(process: Mapping[str, Any]) -> bool | None:
    """Whether a process, as `this_process` names it, is no more; None where it is of another machine or container."""
    if process["host"] != socket.gethostname() or process.get("space") != _pid_space():
        return None
    return _start_time(process["pid"]) != process.get("started")


def _is_replaced(holder: dict[str, Any]) -> bool:
    """Whether Slurm has started the holder's job anew: it has ended the holder, or cannot reach it.  With a pulled
    cable it lives on, and may renew all the time."""
    ours, theirs = _this_job(), holder.get("restarts")
    return bool(ours) and holder.get("job") == ours["job"] and isinstance(theirs, int) and theirs < ours["restarts"]


def _id(holder: dict[str, Any] | None) -> str | None:
    return (holder or {}).get("id")


def _named(holder: dict[str, Any]) -> str:
    if not holder:
        return "somebody who removed its lease"
    job = str(holder.get("job", "")).partition("@")[0]
    return f"process {holder['pid']} on {holder['host']}" + (f" (Slurm job {job})" if job else "")


def _pid_space() -> str:
    """Which set of process numbers we are in; containers of one host name have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """When process `pid` started, in clock ticks since boot; None where there is no such live process."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] in "ZX" else after_name[19]
