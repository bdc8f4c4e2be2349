"""Command: whether a run is alive, and how far it is.  `python -m pipeline.status --run DIR`"""

from __future__ import annotations

import time
from pathlib import Path

from data_prep import cli
from data_prep.errors import UserError
from pipeline.watching.activity import SHORT
from pipeline.watching.heartbeat import Beat, newest_checkpoint, path_of, read_beat

STALE = 120.0
"""Seconds without a beat until a run counts as dead: twelve beats, for slow disks."""
STALLED = 600.0
"""Seconds in one part of a step until a run that still beats counts as hanging."""


def main(*, run: Path) -> None:
    """Print what a run is doing; reads files only, on any machine that sees the folder.

    Exit status: 0 alive or done, 1 dead, hanging, failed or stopped, 2 a mistake in the command.
    """
    if not run.is_dir():
        raise UserError(f"--run {run}: no such folder")
    beat = read_beat(run)
    if beat is None:
        raise UserError(f"{run} has no {path_of(run).name}: no training has begun there")
    now = time.time()
    print("\n".join(lines(run, beat, now)))
    if not alive(beat, now) and beat.phase != "done":
        raise SystemExit(1)


def alive(beat: Beat, now: float) -> bool:
    """Whether somebody is training, and gets on; now: seconds since 1970."""
    return beat.phase not in ("done", "stopped", "failed") and now - beat.time <= STALE and not hangs(beat)


def hangs(beat: Beat) -> bool:
    """Whether the process lived, but a step did not get on."""
    return beat.phase in SHORT and beat.seconds > STALLED


def lines(run: Path, beat: Beat, now: float) -> list[str]:
    """What a user wants to know, a line each."""
    age, where = now - beat.time, beat.where
    doing = f"{beat.phase} ({beat.part})" if beat.part else beat.phase
    head = {
        "done": f"done, {span(age)} ago",
        "stopped": f"stopped on request {span(age)} ago; the same command goes on",
        "failed": f"failed {span(age)} ago: {beat.reason}",
    }.get(beat.phase)
    if head is None and alive(beat, now):
        head = f"alive: {doing} for {span(beat.seconds + age)}; heartbeat {span(age)} ago"
    elif head is None and now - beat.time <= STALE:
        head = f"HANGS: {doing} for {span(beat.seconds + age)}; heartbeat {span(age)} ago"
    elif head is None:
        head = f"DEAD: no sign of life for {span(age)}; its last was {doing}"
    job = f", job {beat.job}" if beat.job else ""
    restarts = f", restart {beat.restarts}" if beat.restarts else ""
    out = [
        f"{run}: {head}",
        f"process {beat.pid} on {beat.host}{job}, {beat.ranks} ranks, started {span(now - beat.started)} ago{restarts}",
    ]
    if where.stage >= 0:
        out.append(f"stage {where.stage}: step {where.step} of {where.steps}, global step {where.global_step}")
        left = "" if where.left is None or not alive(beat, now) else f", {span(where.left)} left in the stage"
        loss = "none" if where.loss is None else f"{where.loss:.4f}"
        out.append(f"loss {loss}, {where.rate:.2f} steps/s{left}, {where.bad_samples} bad samples")
    done = sorted(int(p.stem[5:]) for p in run.glob("stage*.done") if p.stem[5:].isdigit())
    out.append("stages done: " + (", ".join(map(str, done)) or "none"))
    newest = newest_checkpoint(run)
    when = "" if newest["checkpoint_time"] is None else f", {span(now - newest['checkpoint_time'])} ago"
    out.append(f"newest checkpoint: {newest['checkpoint'] or 'none'}{when}")
    return out


def span(seconds: float) -> str:
    """A length of time in its two largest units: "5 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


if __name__ == "__main__":
    cli.run(main)
