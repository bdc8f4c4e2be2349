"""What counts as hanging, and what is said about it."""

from __future__ import annotations

import re
from pathlib import Path
from socket import gethostname
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.watching import states
from pipeline.watching import watchdog as module
from pipeline.watching.activity import Activity
from pipeline.watching.heartbeat import Heartbeat, read_beat
from pipeline.watching.watchdog import HUNG, Watchdog

OURS: Any = SimpleNamespace(check=lambda: None)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines of `warn`."""
    lines = list[str]()
    monkeypatch.setattr(Watchdog, "warn", lambda dog: lines.append(dog.line()))
    return lines


def watchdog(clock: Clock, log: Path = Path("unused/rank3.log"), minutes: float = 1.0, rank: int = 3) -> Any:
    activity = Activity(clock)
    activity.enter("training", "forward")
    activity.longest.clear()
    return Watchdog(rank, minutes, log, Heartbeat(log.parent, OURS, rank, 4, activity), activity)


def looks(dog: Watchdog, clock: Clock, seconds: float) -> bool:
    """Whether it found a hang when it looked at its pace for so long."""
    found = False
    end = clock.now + seconds
    while clock.now < end and not found:
        clock.now += dog.pause
        found = dog.hangs()
    return found


def test_a_part_that_lasts(clock: Clock) -> None:
    """Two looks after its time: until then the others can say where they stand."""
    dog = watchdog(clock)
    assert not looks(dog, clock, 70) and looks(dog, clock, 30)


@pytest.mark.parametrize(("longest", "minutes"), [(1.0, 2), (12.0, 4), (1000.0, 30), (None, 30)])
def test_what_a_part_may_take(clock: Clock, longest: float | None, minutes: float) -> None:
    """20 times as long as ever before, within limits; the first time, and for reading, what the settings say."""
    dog = watchdog(clock, minutes=30.0)
    if longest is not None:
        for part in ("forward", "data_wait", ""):
            dog.activity.enter("training", part)
            clock.now += longest
        dog.activity.enter("training", "forward")
    assert dog.allowed(dog.activity.now) == 60 * minutes
    for part in ("data_wait", ""):
        dog.activity.enter("training", part)
        assert dog.allowed(dog.activity.now) == 60 * 30
    dog.activity.enter("validating", "forward")
    assert dog.allowed(dog.activity.now) == 60 * 30


def test_new_parts_are_no_hang(clock: Clock) -> None:
    """However alike: each begins anew."""
    dog = watchdog(clock)
    for _ in range(5):
        dog.activity.enter("training", "forward")
        assert not looks(dog, clock, 50)


@pytest.mark.parametrize("phase", ["starting", "saving", "exporting"])
def test_what_may_take_long(clock: Clock, phase: str, said: list[str]) -> None:
    """Said, again and again, and not ended."""
    dog = watchdog(clock)
    with dog.activity(phase), dog.activity.part("collective"):
        assert not looks(dog, clock, 200)
    assert len(said) == 3 and all(f"rank 3 on {gethostname()} waits: {phase} (collective) for" in line for line in said)
    with dog.activity("validating", "answer"):
        assert looks(dog, clock, 100)


@pytest.mark.parametrize("part", ["forward", "backward", "step"])
def test_the_first_step_of_a_start(clock: Clock, part: str) -> None:
    """Data and model are made by then: a network that does not come up is a hang."""
    dog = watchdog(clock)
    with dog.activity("starting", part):
        assert not looks(dog, clock, 70) and looks(dog, clock, 30)


# ---- ranks together ---------------------------------------------------------------------------
def ranks(clock: Clock, folder: Path, parts: list[str], known: dict[str, float]) -> list[Any]:
    """Watchdogs of four ranks in a part each, of which some have ended before."""
    dogs = [watchdog(clock, folder / f"rank{rank}.log", 4.0, rank) for rank in range(4)]
    for dog, part in zip(dogs, parts, strict=True):
        dog.activity.enter("training", part)
        dog.activity.longest = {("training", name): seconds for name, seconds in known.items()}
    return dogs


def ended(clock: Clock, dogs: list[Any], seconds: float) -> set[int]:
    """Ranks that end when all look at their pace for so long; rank 2 of them is looked at last."""
    found = set[int]()
    end = clock.now + seconds
    while clock.now < end:
        clock.now += dogs[0].pause
        found |= {dog.rank for dog in dogs if dog.rank not in found and dog.hangs()}
    return found


KNOWN = {"forward": 1.0, "collective": 1.0, "data_wait": 1.0}


def test_the_one_that_the_others_wait_for_is_named(clock: Clock, tmp_path: Path) -> None:
    dogs = ranks(clock, tmp_path, ["collective", "collective", "forward", "collective"], KNOWN)
    assert not ended(clock, dogs, 120) and ended(clock, dogs, 60) == {0, 1, 2, 3}
    name = re.escape(gethostname())
    line = rf"rank 2 on {name} hangs: training \(forward\) for \d\.\d min, since [\d:]+; 3 of 4 ranks wait for that"
    assert re.fullmatch(line, dogs[0].line())
    assert dogs[1].line().startswith(f"rank 1 on {gethostname()} waits: training (collective) for ")


def test_a_rank_that_is_gone_is_named(clock: Clock, tmp_path: Path) -> None:
    dogs = ranks(clock, tmp_path, ["collective"] * 4, KNOWN)
    assert ended(clock, dogs[:3], 180) == {0, 1, 2}
    gone = "rank 3 says nothing: its process or machine stands still or is gone; 3 of 4 ranks wait for that"
    assert dogs[0].line() == gone


def test_all_wait(clock: Clock, tmp_path: Path) -> None:
    """Where the network is down, no rank is to be blamed."""
    dogs = ranks(clock, tmp_path, ["collective"] * 4, KNOWN)
    assert ended(clock, dogs, 180) == {0, 1, 2, 3}
    assert dogs[0].line().startswith("every rank waits, for the network or its GPU: rank 0 on ")


@pytest.mark.parametrize("part", ["data_wait", "answer"])
def test_a_rank_that_may_work_is_waited_for(clock: Clock, tmp_path: Path, part: str) -> None:
    """Reading has a patience of its own, and so has what has never ended before."""
    dogs = ranks(clock, tmp_path, ["collective", part, "collective", "collective"], KNOWN)
    assert not ended(clock, dogs, 4 * 60) and ended(clock, dogs, 60) == {0, 1, 2, 3}
    assert "rank 1 on " in dogs[0].line() and f"hangs: training ({part})" in dogs[0].line()


def test_what_was_said_is_taken_back(clock: Clock, tmp_path: Path) -> None:
    dogs = ranks(clock, tmp_path, ["forward", "collective", "collective", "collective"], {"collective": 1.0})
    assert not ended(clock, dogs, 200) and sorted(states.read(tmp_path)) == [0, 1, 2, 3]
    for dog in dogs:
        dog.activity.enter("training", "backward")
    assert not ended(clock, dogs, 100) and not states.read(tmp_path)
    states.path_of(tmp_path, 7).write_text("{}")
    watchdog(clock, tmp_path / "rank0.log", rank=0)
    assert not states.path_of(tmp_path, 7).exists(), "of a start with more ranks"


def test_a_collective_is_seen_in_the_stacks(tmp_path: Path) -> None:
    """Whatever the part is called in which ZeRO-3 gathers."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    found = list[bool]()
    try:
        tensor = torch.zeros(2, requires_grad=True)
        tensor.register_hook(lambda _: found.append(states.waits_for_others("backward")))
        tensor.sum().backward()
        torch.distributed.all_gather_object([None], Looked(found))
    finally:
        torch.distributed.destroy_process_group()
    assert found[:2] == [False, True]


class Looked:
    """Something to send that says where it is taken apart."""

    def __init__(self, found: list[bool]) -> None:
        self.found = found

    def __reduce__(self) -> tuple[type, tuple[list[bool]]]:
        self.found.append(states.waits_for_others("forward"))
        return Looked, ([],)


# ---- what is said -----------------------------------------------------------------------------
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
    with pytest.raises(SystemExit), Heartbeat(tmp_path, OURS, 0, 1, activity) as heartbeat:
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
        assert "rank 0 on " in text and " hangs: training (backward) for 0.0 min, since " in text
        assert f"(train.hang_minutes 0.001); all end with status {HUNG}, stacks in {tmp_path}" in text
        assert "test_what_is_said" in text and "most recent call first" in text
