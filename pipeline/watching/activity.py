"""What this process is doing, and since when: set by the thread that trains, read by those that watch it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SHORT = ("training", "validating")
"""Phases whose parts are short; others may take long: data and model being made, checkpoints, exports."""


@dataclass(frozen=True)
class Doing:
    """What is going on since a moment."""

    phase: str
    """starting (until the first step is done), training, validating, saving, exporting"""
    part: str
    """Inside it: data_wait, forward, backward, step, collective, answer; or nothing"""
    since: float
    """In seconds of the activity's clock"""

    def __str__(self) -> str:
        return f"{self.phase} ({self.part})" if self.part else self.phase

    @property
    def short(self) -> bool:
        """Whether it takes no longer than a part of a step; also of a start's first step, when all is made."""
        return self.phase in SHORT or self.part in ("forward", "backward", "step")


class Activity:
    """The present `Doing`.  Setting it costs a microsecond: no file, no GPU, no other rank."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.longest: dict[tuple[str, str], float] = {}
        """(phase, part) -> seconds that it has lasted at most, of those that have ended"""
        self.now = Doing("starting", "", clock())

    def enter(self, phase: str, part: str = "") -> None:
        before, now = self.now, self.clock()
        key = (before.phase, before.part)
        self.longest[key] = max(self.longest.get(key, 0.0), now - before.since)
        # one assignment: a reader never sees half of it
        self.now = Doing(phase, part, now)

    @contextmanager
    def __call__(self, phase: str, part: str = "") -> Iterator[None]:
        """`phase` inside a block or decorated function, then again what was before."""
        before = self.now
        self.enter(phase, part)
        try:
            yield
        finally:
            self.enter(before.phase, before.part)

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """`part` of the present phase inside a block."""
        with self(self.now.phase, part):
            yield


ACTIVITY = Activity()
"""This process's."""
