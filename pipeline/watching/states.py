"""What ranks say of themselves when one of them hangs: RUN/logs/rankN.doing.json, there only while it lasts.

A rank that waits for another in a collective stands still as much as the one that hangs; its stacks tell them apart.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from data_prep.files import write_atomic


@dataclass(frozen=True)
class State:
    """Where a rank stands."""

    rank: int
    host: str
    doing: str
    """Phase and part, as `activity.Doing` is told"""
    part: str
    since: float
    """Seconds since 1970"""
    waiting: bool
    """For other ranks, or for its GPU, which waits for theirs"""
    over: bool
    """Longer than the part may take"""
    ends: bool = False
    """It gives up, and so must all"""

    def __str__(self) -> str:
        verb = "waits" if self.waiting else "hangs"
        minutes = (time.time() - self.since) / 60
        began = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"rank {self.rank} on {self.host} {verb}: {self.doing} for {minutes:.1f} min, since {began}"


_STATE = TypeAdapter(State)


def path_of(logs: Path, rank: int) -> Path:
    return logs / f"rank{rank}.doing.json"


def write(logs: Path, state: State) -> None:
    """A disk that fails is left alone."""
    with contextlib.suppress(OSError):
        write_atomic(path_of(logs, state.rank), json.dumps(asdict(state)) + "\n")


def read(logs: Path) -> dict[int, State]:
    """What ranks say now, by rank."""
    found = {}
    with contextlib.suppress(OSError):
        for path in logs.glob("rank*.doing.json"):
            with contextlib.suppress(OSError, ValueError):
                state = _STATE.validate_json(path.read_bytes())
                found[state.rank] = state
    return found


def forget(logs: Path, rank: int | None = None) -> None:
    """Remove what a rank said, or all of them."""
    with contextlib.suppress(OSError):
        for path in logs.glob("rank*.doing.json") if rank is None else [path_of(logs, rank)]:
            path.unlink(missing_ok=True)


def headline(states: Iterable[State], ranks: int) -> str:
    """Which of `ranks` ranks the others wait for."""
    said = {state.rank: state for state in states}
    culprits = [str(state) for state in said.values() if not state.waiting]
    silent = [str(rank) for rank in range(ranks) if rank not in said]
    waiting = sum(state.waiting for state in said.values())
    if silent:
        culprits.append(f"rank {', '.join(silent)} says nothing: its process or machine stands still or is gone")
    for_it = f"; {waiting} of {ranks} ranks wait for that" if waiting else ""
    if culprits:
        return "; ".join(culprits) + for_it
    return f"every rank waits, for the network or its GPU: {next(iter(said.values()), 'none says where')}"


def waits_for_others(part: str) -> bool:
    """Whether some thread of this process is inside a collective, or waits for a GPU that may be."""
    if part == "collective":
        return True
    for frame in sys._current_frames().values():
        while frame is not None:
            if _is_waiting(frame.f_code.co_filename, frame.f_code.co_name):
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_waiting(file: str, function: str) -> bool:
    collectives = "/torch/distributed/" in file or "/deepspeed/comm/" in file
    handles = function in ("wait", "synchronize") and ("/deepspeed/" in file or "/torch/" in file)
    return collectives or handles
