"""A rank that hangs says so and ends, so that its launcher ends the others: no node waits for hours on a dead step.

A part of a step (forward, a collective, ...) may last 20 times as long as it ever did in this start, 2 minutes at least
and `train.hang_minutes` at most.  The first of its kind, and what waits for disks and servers, may always last
`train.hang_minutes`: reading, and what is between the parts, where rank 0 writes its numbers.  What may take longer is
only told: data and model being made, checkpoints, exports.
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

from pipeline.watching import states
from pipeline.watching.activity import ACTIVITY, Activity, Doing
from pipeline.watching.heartbeat import Heartbeat
from pipeline.watching.states import State

HUNG = 70
"""Exit status of a rank that hung (EX_SOFTWARE)."""
LEAST, TIMES = 120.0, 20.0
"""Seconds that any part may last, and how much longer than ever before."""
PAUSE, GRACE = 10.0, 10.0
"""Seconds between looks, and from speaking to ending: every rank speaks, and rank 0 names the one that hangs."""


class Watchdog:
    """Ends this process when one part of a step lasts too long; 0 minutes: never."""

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
        self._spoken, self._warnings = False, 0
        if rank == 0:
            states.forget(log.parent)  # of the start before: none of this one speaks before its first step

    def start(self) -> None:
        if self.limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def _watch(self) -> None:
        while not self.hangs():
            time.sleep(self.pause)
        self.tell()
        time.sleep(self.pause + min(GRACE, self.limit))  # until the others have looked, and spoken
        self.end(HUNG)

    def allowed(self, doing: Doing) -> float:
        """Seconds that a part may last."""
        longest = self.activity.longest.get((doing.phase, doing.part))
        if longest is None or doing.part in ("", "data_wait") or not doing.short:
            return self.limit
        return min(self.limit, max(LEAST, TIMES * longest))

    def hangs(self) -> bool:
        """Look once: whether this rank, or another that has said so, hangs, and all must end."""
        self._hold()
        others = {}
        if self._held >= 2 * self.pause:
            others = {rank: state for rank, state in states.read(self.log.parent).items() if rank != self.rank}
        allowed = self.allowed(self._seen)
        over = self._held >= allowed
        if not over and not others:
            return False
        state = self._speak(over)
        told = over and self._held >= allowed + 2 * self.pause  # the others had the time to say where they stand
        if not self._seen.short:
            if told and self._held >= (self._warnings + 1) * self.limit:
                self._warnings += 1
                self.warn()
            return False
        # one that waits is patient with one that works, as long as that one may
        ends = told and not (state.waiting and any(not (o.waiting or o.over) for o in others.values()))
        if ends:
            self._speak(over, ends)
        return ends or any(other.ends for other in others.values())

    def _hold(self) -> None:
        """How long the part has lasted, but for a time in which the whole process was suspended, and this thread."""
        now, clock = self.activity.now, self.activity.clock()
        if now is self._seen:
            self._held += min(clock - self._looked, 2 * self.pause)
        else:
            self._held, self._warnings = 0.0, 0
            if self._spoken:
                states.forget(self.log.parent, self.rank)
                self._spoken = False
        self._seen, self._looked = now, clock

    def _speak(self, over: bool, ends: bool = False) -> State:
        """Tell the other ranks where this one stands."""
        state = self._state(over, ends)
        states.write(self.log.parent, state)
        self._spoken = True
        return state

    def _state(self, over: bool, ends: bool = False) -> State:
        part = self._seen.part
        began = time.time() - self._held
        waits = states.waits_for_others(part)
        return State(self.rank, socket.gethostname(), str(self._seen), part, began, waits, over, ends)

    def line(self) -> str:
        """Who hangs where since when: on rank 0 the one that the others wait for, on others themselves."""
        if self.rank:
            return str(self._state(True))
        known = {**states.read(self.log.parent), self.rank: self._state(True)}
        return states.headline((known[rank] for rank in sorted(known)), self.heartbeat.ranks)

    def tell(self) -> None:
        """The line, with the stacks of all threads: on the screen, in the log, in the heartbeat."""
        allowed = self.allowed(self._seen) / 60
        line = f"{self.line()}; a part may take {allowed:.1f} min here (train.hang_minutes {self.limit / 60:g});"
        line += f" all end with status {HUNG}, stacks in {self.log.parent}"

        def keep() -> None:
            with open(self.log, "a") as file:
                write_stacks(line, file)
            self.heartbeat.close("failed", line)

        self._on_threads(lambda: _on_screen(lambda screen: write_stacks(line, screen)), keep)

    def warn(self) -> None:
        """Say that something lasts long that may: the log has the stacks."""
        line = f"warning: {self.line()}; it goes on, and this is said every train.hang_minutes {self.limit / 60:g}"

        def keep() -> None:
            with open(self.log, "a") as file:
                write_stacks(line, file)

        show = [lambda: _on_screen(lambda screen: write_line(line, screen))] if self.rank == 0 else []
        self._on_threads(keep, *show)

    def _on_threads(self, *says: Callable[[], None]) -> None:
        """On threads of their own: it may be the disk or the screen that hangs or fails."""
        threads = [threading.Thread(target=say, name="watchdog-says", daemon=True) for say in says]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GRACE)


def _on_screen(show: Callable[[IO[str]], None]) -> None:
    if sys.__stderr__ is not None:  # the real one: ranks but the first redirect sys.stderr
        show(sys.__stderr__)


def write_line(line: str, file: IO[str]) -> None:
    """Past a logger's lock, which the thread that hangs may hold."""
    file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    file.flush()


def write_stacks(line: str, file: IO[str]) -> None:
    """A line and the stacks of all threads."""
    write_line(line, file)
    faulthandler.dump_traceback(file, all_threads=True)
