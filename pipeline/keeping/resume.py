"""Going on from a sound checkpoint: a damaged one is set aside, and the plan made again from what is left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data_prep.errors import UserError, kind_of
from pipeline import distributed
from pipeline.distributed import World
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.state import Checkpoint, damaged_file
from pipeline.plan import Plan


def from_sound(plan: Plan, world: World, log: logging.Logger, fence: Callable[[], None]) -> Plan:
    """The plan, its starts checked: every file is as it was written.  All ranks call it together, with one plan.

    Ranks share the hashing.  fence: as `Checkpoints` takes it.  Raises UserError, on every rank, where a stage cannot
    begin without what is damaged.
    """
    told: list[str] = []
    problem: UserError | None = None
    if world.main:
        unreadable = Checkpoints(plan.out).unreadable()
        plan, problem = _without(dict.fromkeys(unreadable, "state.json"), plan, told, log, fence)
    sound: list[Checkpoint] = []
    while True:
        problem, stages, starts = distributed.from_main((problem, plan.stages, plan.starts))
        if problem is not None:
            raise problem
        plan = replace(plan, stages=stages, starts=starts)
        start = next((start for start in plan.starts.values() if start not in sound), None)
        if start is None:
            break
        file = damaged_file(start, world)
        if not file:
            sound.append(start)
        elif world.main:
            plan, problem = _without({start.path: file}, plan, told, log, fence)
    if told and plan.starts:
        log.warning("going on from %s", next(iter(plan.starts.values())).path)
    return replace(plan, starts={stage: replace(start, checked=True) for stage, start in plan.starts.items()})


def _without(
    damaged: dict[Path, str], plan: Plan, told: list[str], log: logging.Logger, fence: Callable[[], None]
) -> tuple[Plan, UserError | None]:
    """Set checkpoints aside, each with its damaged file, and plan again; what stands against it is returned."""
    try:
        for path, file in damaged.items():
            aside = Checkpoints(plan.out, fence).set_aside(path)
            told.append(f"checkpoint {path}: {file} is damaged; set aside as {aside.name}, and not used any more")
            log.warning(told[-1])
        return (plan.again() if damaged else plan), None
    except UserError as error:
        return plan, type(error)(*told, *error.lines)
    except OSError as error:
        return plan, kind_of(error)(*told, f"a damaged checkpoint cannot be renamed: {error}")
