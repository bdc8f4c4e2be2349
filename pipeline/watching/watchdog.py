"""A rank that hangs says so and ends, so that its launcher ends the others: no node waits for hours on a dead step.

Only steps and validation are watched.  What may take long is not: data and model being made, the first step of a start,
checkpoints, exports.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from pipeline.watching.activity import ACTIVITY, SHORT, Activity, Doing
from pipeline.watching.heartbeat import Heartbeat

HUNG = 70
"""Exit status of a rank that hung (EX_SOFTWARE)."""
PAUSE, GRACE = 10.0, 10.0
"""Seconds between looks, and from speaking to ending: a rank that waits for this one speaks too, whoever hung first."""


class Watchdog:
    """Ends this process when one part of a step lasts longer than a limit; 0 minutes: never."""

    def __init__(
        self,
        rank: int,
        minutes: float,
        log: Path,
        heartbeat: Heartbeat,
        activity: Activity = ACTIVITY,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.rank, self.limit, self.log, self.heartbeat = rank, 60 * minutes, log, heartbeat
        self.activity, self.end = activity, end
        self.pause = min(PAUSE, self.limit / 4)
        self._seen, self._held, self._looked = activity.now, 0.0, activity.clock()

    def start(self) -> None:
        if self.limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        while not self.hangs():
            time.sleep(self.pause)
        self.tell(self._seen, self._held)
        self.end(HUNG)

    def hangs(self) -> bool:
        """Look once.  A time in which the whole process was suspended, and so was this thread, does not count."""
        now, clock = self.activity.now, self.activity.clock()
        self._held = self._held + min(clock - self._looked, 2 * self.pause) if now is self._seen else 0.0
        self._seen, self._looked = now, clock
        return now.phase in SHORT and self._held >= self.limit

    def tell(self, doing: Doing, seconds: float) -> None:
        """Who hangs where since when, with the stacks of all threads: on the screen, in the log, in the heartbeat."""
        line = (
            f"rank {self.rank} on {socket.gethostname()} hangs: {doing} for {seconds / 60:.1f} min, more than"
            f" train.hang_minutes {self.limit / 60:g}; it ends with status {HUNG}"
        )

        def show() -> None:
            if sys.__stderr__ is not None:  # the real one: ranks but the first redirect sys.stderr
                write_stacks(line, sys.__stderr__)

        def keep() -> None:
            with open(self.log, "a") as file:
                write_stacks(line, file)
            self.heartbeat.close("failed", line)

        # on threads of their own: it may be the disk or the screen that hangs or fails
        threads = [threading.Thread(target=say, name="watchdog-says", daemon=True) for say in (show, keep)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GRACE)
        time.sleep(min(GRACE, self.limit))


def write_stacks(line: str, file: IO[str]) -> None:
    """A line and the stacks of all threads, past a logger's lock, which the thread that hangs may hold."""
    file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
