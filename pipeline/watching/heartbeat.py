"""A run's sign of life: rank 0 writes RUN/heartbeat.json every few seconds, from a thread of its own.

Training hands over numbers that it has anyway; it never waits for the file, the GPU or another rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from pydantic import TypeAdapter

from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline.keeping.lease import Lease, this_process
from pipeline.watching.activity import ACTIVITY, Activity, Doing
from pipeline.watching.watch import STOP, STOPPED

EVERY, LOOK = 10.0, 1.0
"""Seconds between beats, and until a new phase is written."""


@dataclass(frozen=True)
class Where:
    """Where training stands after a step."""

    stage: int = -1
    """-1 before the first step of a start"""
    step: int = 0
    steps: int = 0
    """Length of the stage"""
    global_step: int = 0
    """Steps of all stages that are done"""
    loss: float | None = None
    rate: float = 0.0
    """Steps a second in this stage"""
    left: float | None = None
    """Seconds until the stage ends"""
    bad_samples: int = 0
    skipped: int = 0
    """Steps of the run that were not applied, since their loss or gradient was no number"""
    rollbacks: int = 0


@dataclass(frozen=True)
class Beat:
    """What heartbeat.json says."""

    time: float
    """When it was written; like all times in seconds since 1970"""
    host: str
    pid: int
    job: str
    """Slurm's job id, or nothing"""
    ranks: int
    started: float
    restarts: int
    """Starts of this run folder before this one that trained a step"""
    phase: str
    """As `activity.Doing.phase`; at the end stopped (on request; can go on), done or failed"""
    part: str
    seconds: float
    """How long phase and part have lasted"""
    where: Where
    checkpoint: str
    """The newest, or nothing"""
    checkpoint_time: float | None
    reason: str = ""
    """Why it failed"""
    process: dict[str, str | int | None] = field(default_factory=dict)
    """Host, process and when it was started, as `lease.has_ended` takes it"""


_BEAT = TypeAdapter(Beat)


def path_of(run: Path) -> Path:
    return run / "heartbeat.json"


def stop_path(run: Path) -> Path:
    """The file that asks a run to stop as SIGUSR1 does; rank 0 removes it when it has seen it."""
    return run / "stop"


def read_beat(run: Path) -> Beat | None:
    """The last beat, or nothing where there is none.  Raises UserError for a damaged file."""
    try:
        return _BEAT.validate_json(path_of(run).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{path_of(run)} is damaged; the next start of training replaces it") from None


class Heartbeat:
    """Around a start of training; on ranks other than 0 it does nothing."""

    def __init__(self, run: Path, lease: Lease, rank: int, ranks: int, activity: Activity = ACTIVITY) -> None:
        self.run, self.lease, self.main, self.ranks, self.activity = run, lease, rank == 0, ranks, activity
        self.where = Where()
        """To be replaced after every step"""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self.main:
            self.started, self.restarts = time.time(), 0
            with contextlib.suppress(OSError):
                stop_path(self.run).unlink(missing_ok=True)  # it asked the start before
            with contextlib.suppress(UserError):
                before = read_beat(self.run)
                self.restarts = before.restarts + (before.where.stage >= 0) if before else 0
            self.write(self.activity.now)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close("done")
        elif isinstance(error, SystemExit) and error.code == STOPPED:
            self.close("stopped")
        else:
            kind_of = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.close("failed", " ".join(f"{kind_of}{error}".split())[:1000])

    def close(self, phase: str, reason: str = "") -> None:
        """The last beat: what became of the run.  The first to tell is believed: what comes after follows from it."""
        if self.main and not self._end.is_set():
            self._end.set()
            self._thread.join(timeout=LOOK * 5)  # a disk that hangs keeps nobody here
            self.write(Doing(phase, "", self.activity.clock()), reason)

    def _beat(self) -> None:
        written, phase = time.monotonic(), self.activity.now.phase
        while not self._end.wait(LOOK):
            self._stop_if_asked()
            if self.activity.now.phase != phase or time.monotonic() - written >= EVERY:
                written, phase = time.monotonic(), self.activity.now.phase
                self.write(self.activity.now)

    def _stop_if_asked(self) -> None:
        with contextlib.suppress(OSError):
            stop_path(self.run).unlink()
            STOP.requested = True

    def write(self, now: Doing, reason: str = "") -> None:
        """Write a beat now, unless the folder is another trainer's; a disk that fails is left alone."""
        try:
            self.lease.check()
        except UserError:
            return
        beat = Beat(
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            ranks=self.ranks,
            started=self.started,
            restarts=self.restarts,
            phase=now.phase,
            part=now.part,
            seconds=self.activity.clock() - now.since,
            where=self.where,
            **newest_checkpoint(self.run),
            reason=reason,
            process=this_process(),
        )
        with contextlib.suppress(OSError):
            write_atomic(path_of(self.run), json.dumps(asdict(beat), indent=1) + "\n")


def newest_checkpoint(run: Path) -> dict:
    """`Beat.checkpoint` and `Beat.checkpoint_time`, as the run folder has them."""
    latest = run / "checkpoints" / "latest"
    try:
        return {"checkpoint": latest.read_text().strip(), "checkpoint_time": latest.stat().st_mtime}
    except (OSError, ValueError):
        return {"checkpoint": "", "checkpoint_time": None}
