"""What counts as hanging, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.watching import watchdog as module
from pipeline.watching.activity import Activity
from pipeline.watching.heartbeat import Heartbeat, read_beat
from pipeline.watching.watchdog import HUNG, Watchdog


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def watchdog(clock: Clock, log: Path = Path("unused"), minutes: float = 1.0) -> Any:
    activity = Activity(clock)
    activity.enter("training", "forward")
    return Watchdog(3, minutes, log, Heartbeat(log.parent, SimpleNamespace(lost=""), 3, 4, activity), activity)  # type: ignore[arg-type]


def looks(dog: Watchdog, clock: Clock, seconds: float) -> bool:
    """Whether it found a hang when it looked at its pace for so long."""
    found = False
    end = clock.now + seconds
    while clock.now < end and not found:
        clock.now += dog.pause
        found = dog.hangs()
    return found


def test_a_part_that_lasts(clock: Clock) -> None:
    dog = watchdog(clock)
    assert not looks(dog, clock, 50) and looks(dog, clock, 30)


def test_new_parts_are_no_hang(clock: Clock) -> None:
    """However alike: each begins anew."""
    dog = watchdog(clock)
    for _ in range(5):
        dog.activity.enter("training", "forward")
        assert not looks(dog, clock, 50)


@pytest.mark.parametrize("phase", ["starting", "saving", "exporting"])
def test_what_may_take_long(clock: Clock, phase: str) -> None:
    dog = watchdog(clock)
    with dog.activity(phase), dog.activity.part("collective"):
        assert not looks(dog, clock, 10_000)
    with dog.activity("validating", "answer"):
        assert looks(dog, clock, 100)


def test_a_suspended_process(clock: Clock) -> None:
    """Hours in which the watchdog did not run either are no hang."""
    dog = watchdog(clock)
    assert not looks(dog, clock, 30)
    clock.now += 10_000
    assert not dog.hangs() and looks(dog, clock, 60)


def test_off(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    dog = watchdog(clock, minutes=0.0)
    monkeypatch.setattr(module.threading, "Thread", None)
    dog.start()


def test_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the screen and in the log, with stacks; the heartbeat says why; the status is its own."""
    ended: list[int] = []
    activity = Activity()
    with pytest.raises(SystemExit), Heartbeat(tmp_path, SimpleNamespace(lost=""), 0, 2, activity) as heartbeat:  # type: ignore[arg-type]
        activity.enter("training", "backward")
        dog = Watchdog(0, 0.001, tmp_path / "rank0.log", heartbeat, activity, ended.append)
        with open(tmp_path / "screen", "w") as screen, monkeypatch.context() as patch:
            patch.setattr(module.sys, "__stderr__", screen)
            dog._watch()
        beat = read_beat(tmp_path)
        raise SystemExit(HUNG)
    assert ended == [HUNG] and beat
    assert (beat.phase, beat.part) == ("failed", "") and "hangs: training (backward)" in beat.reason
    for file in ("rank0.log", "screen"):
        text = (tmp_path / file).read_text()
        assert "rank 0 on " in text and " hangs: training (backward) for 0.0 min, more than train.hang_minutes" in text
        assert "test_what_is_said" in text and "most recent call first" in text
