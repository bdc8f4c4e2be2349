"""Command: whether a run is alive, and how far it is.  `python -m pipeline.status --run DIR`

With `--stop true` it asks the run to save and stop, from any machine that sees the folder.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from json import dumps
from pathlib import Path

from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline.keeping.lease import has_ended
from pipeline.watching.activity import SHORT
from pipeline.watching.heartbeat import Beat, newest_checkpoint, path_of, read_beat, stop_path

STALE = 120.0
"""Seconds without a beat until a run counts as dead: twelve beats, for slow disks."""
STALLED = 600.0
"""Seconds in one part of a step until a run that still beats counts as hanging."""


def main(*, run: Path, json: bool = False, stop: bool = False) -> None:
    """Print what a run is doing; reads files only, on any machine that sees the folder.

    --json: the heartbeat (pipeline/watching/heartbeat.py), its age in seconds and a verdict (alive, hangs, dead, done,
    stopped or failed), for scripts; --stop: ask it to end with a checkpoint after its present step.
    Exit status: 0 alive or done, 1 dead, hanging, failed or stopped, 2 a mistake in the command.
    """
    if not run.is_dir():
        raise UserError(f"--run {run}: no such folder")
    beat = read_beat(run)
    if beat is None:
        raise UserError(f"{run} has no {path_of(run).name}: no training has begun there")
    now = time.time()
    said = verdict(beat, now)
    if stop and said != "alive":
        raise UserError(f"{run} cannot be asked to stop: {lines(run, beat, now)[0].removeprefix(f'{run}: ')}")
    if json:
        print(dumps({"verdict": said, "age": now - beat.time, **asdict(beat)}, indent=1))
    else:
        print("\n".join(lines(run, beat, now)))
    if stop:
        ask_to_stop(run)
    if said not in ("alive", "done"):
        raise SystemExit(1)


def ask_to_stop(run: Path) -> None:
    """Have the run save after its step and end with status 75; rank 0 looks for this every second."""
    try:
        write_atomic(stop_path(run), "")
    except OSError as error:
        raise UserError(f"{stop_path(run)} cannot be written: {error}") from None
    print("asked to stop: it saves after its present step, and then says `stopped on request` here", file=sys.stderr)


def verdict(beat: Beat, now: float) -> str:
    """alive, hangs, dead, done, stopped or failed; now: seconds since 1970.

    At once where the process was one of this machine; from elsewhere a run is dead after `STALE` seconds in silence.
    """
    if beat.phase in ("done", "stopped", "failed"):
        return beat.phase
    if ended_here(beat) or now - beat.time > STALE:
        return "dead"
    return "hangs" if hangs(beat) else "alive"


def ended_here(beat: Beat) -> bool | None:
    """Whether rank 0's process is no more; None where this machine cannot tell."""
    return has_ended(beat.process) if {"host", "pid"} <= beat.process.keys() else None


def hangs(beat: Beat) -> bool:
    """Whether the process lived, but a step did not get on."""
    return beat.phase in SHORT and beat.seconds > STALLED


def lines(run: Path, beat: Beat, now: float) -> list[str]:
    """What a user wants to know, a line each."""
    age, where = now - beat.time, beat.where
    doing = f"{beat.phase} ({beat.part})" if beat.part else beat.phase
    said = verdict(beat, now)
    head = {
        "done": f"done, {span(age)} ago",
        "stopped": f"stopped on request {span(age)} ago; the same command goes on",
        "failed": f"failed {span(age)} ago: {beat.reason}",
        "alive": f"alive {span(age)} ago: {doing} for {span(beat.seconds)}",
        "hangs": f"HANGS, told {span(age)} ago: {doing} for {span(beat.seconds)}",
        "dead": f"DEAD: {'the process has ended' if ended_here(beat) else 'no sign of life'} for {span(age)};"
        f" its last was {doing}",
    }[said]
    job = f", job {beat.job}" if beat.job else ""
    restarts = f", restart {beat.restarts}" if beat.restarts else ""
    out = [
        f"{run}: {head}",
        f"process {beat.pid} on {beat.host}{job}, {beat.ranks} ranks, started {span(now - beat.started)} ago{restarts}",
    ]
    if where.stage >= 0:
        out.append(f"stage {where.stage}: step {where.step} of {where.steps}, global step {where.global_step}")
        left = "" if where.left is None or said != "alive" else f", {span(where.left)} left in the stage"
        loss = "none" if where.loss is None else f"{where.loss:.4f}"
        counts = {"skipped steps": where.skipped, "rollbacks": where.rollbacks}
        guarded = "".join(f", {count} {name}" for name, count in counts.items() if count)
        out.append(f"loss {loss}, {where.rate:.2f} steps/s{left}, {where.bad_samples} bad samples{guarded}")
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
