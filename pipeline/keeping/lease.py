"""A lease on a run folder, so that two trainers never write to one.

The holder renews a small file from a thread.  Another trainer takes over when the holder is gone: at once if it was a
process of this machine that no longer exists, otherwise after `STALE` seconds without renewal.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import parse_json, write_atomic

RENEW, STALE = 5.0, 60.0
"""Seconds between renewals, and without one until the holder counts as gone."""
GRACE = 20.0
"""Seconds to wait for a holder that may be about to stop, before refusing."""


class Lease:
    """Held from `acquire` to `release`; rank 0 of a run holds it for all."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lease.json"
        self._identity = {**this_process(), "token": os.urandom(8).hex()}
        self._stop = threading.Event()
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
                        f"{self.path.parent} is in use by {_named(holder)}; stop it, or choose another --out"
                        if holder
                        else f"{self.path} is damaged; remove it if nobody is training in {self.path.parent}"
                    )
                time.sleep(0.5)
        except OSError as error:
            raise UserError(f"{self.path.parent} cannot be used as a run folder: {error}") from None
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    def check(self) -> None:
        """To be called before every write to the folder, by the rank that holds the lease.

        Reads the file.  Raises UserError where another trainer has taken the folder over; a disk that fails for a
        moment takes the lease from nobody.
        """
        if not self.lost:
            with contextlib.suppress(OSError):
                self._look()
        if self.lost:
            raise UserError(self.lost)

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):  # left behind it goes stale
            if self._is_ours():
                self.path.unlink(missing_ok=True)

    def _take(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        holder = self._read()
        if holder is not None:
            if not _is_gone(holder) and not self._left_empty(holder):
                return False
            # exactly one of several takers succeeds in moving the dead lease away
            grave = self.path.with_name(f"lease.{self._identity['token']}")
            try:
                os.rename(self.path, grave)
            except FileNotFoundError:
                return False
            moved = self._read(grave)
            grave.unlink()
            if (moved or {}).get("token") != holder.get("token"):
                return False
        try:
            with open(self.path, "x") as file:
                json.dump(self._content(), file)
        except FileExistsError:
            return False
        return True

    def _left_empty(self, holder: dict[str, Any]) -> bool:
        """Whether the lease is unreadable and has been for long: its writer was killed while writing."""
        with contextlib.suppress(OSError):
            return not holder and time.time() - self.path.stat().st_mtime > STALE
        return False

    def _renew(self) -> None:
        while not self._stop.wait(RENEW):
            # a disk that fails for a moment takes the lease from nobody
            with contextlib.suppress(OSError):
                if self._is_ours():
                    write_atomic(self.path, json.dumps(self._content()))
                elif self._look():
                    return

    def _look(self) -> str:
        """Note in `lost` who holds the lease now, if we do not."""
        holder = self._read()
        if holder != {} and (holder or {}).get("token") != self._identity["token"]:
            self.lost = f"{self.path.parent} was taken over by {_named(holder or {})}"
        return self.lost

    def _content(self) -> dict[str, Any]:
        return {**self._identity, "renewed": time.time()}

    def _is_ours(self) -> bool:
        return (self._read() or {}).get("token") == self._identity["token"]

    def _read(self, path: Path | None = None) -> dict[str, Any] | None:
        """What the lease says; None without one, {} for one that is damaged or being written this moment."""
        try:
            value = parse_json((path or self.path).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        kinds = {"token": str, "host": str, "pid": int, "renewed": float}
        sound = isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in kinds.items())
        return value if sound else {}


def this_process() -> dict[str, Any]:
    """What `has_ended` tells this process by."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "space": _pid_space(), "pid": pid, "started": _start_time(pid)}


def _is_gone(holder: dict[str, Any]) -> bool:
    if not holder:
        return False
    ended = has_ended(holder)
    return time.time() - holder["renewed"] > STALE if ended is None else ended


def has_ended(process: Mapping[str, Any]) -> bool | None:
    """Whether a process, as `this_process` names it, is no more; None where it is of another machine or container."""
    if process["host"] != socket.gethostname() or process.get("space") != _pid_space():
        return None
    return _start_time(process["pid"]) != process.get("started")


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}" if holder else "somebody who removed its lease"


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
