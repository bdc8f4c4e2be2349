"""What a run leaves behind: checkpoints on the way; an export and a marker at the end of a stage."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from data_prep.errors import UserError, kind_of_all
from pipeline import distributed
from pipeline.build import Parts, without_frozen
from pipeline.distributed import World
from pipeline.keeping import elastic
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.fingerprint import check_loaded, weights_of
from pipeline.keeping.lease import Lease
from pipeline.keeping.stage_end import end_stage
from pipeline.keeping.state import Checkpoint, RunState, damaged_file
from pipeline.keeping.writing import Files, kind_of_failure
from pipeline.plan import Plan, done_marker, settings_hash
from pipeline.watching.activity import ACTIVITY
from pipeline.watching.guard import GuardState

GO_BACK = 3
"""How often a start rolls back to the same checkpoint, where each time is another fault."""


@dataclass
class Pending:
    """A checkpoint that is being written."""

    files: Files
    """This rank's"""
    state: RunState
    best: dict[str, float] | None
    began: float
    blocked: float = 0.0
    """Seconds that training waited"""


class Keeper:
    """Writes a run's checkpoints and exports; every rank calls each method together.

    A checkpoint is saved in three parts: each rank hands over or copies its state (`save`), writes its files, and when
    all have, rank 0 makes them a checkpoint.  With train.async_checkpoints the files are written while training goes
    on, and the ranks learn from the sum that begins each step (`report`, `agree`) that all are written, or one failed.
    """

    def __init__(self, plan: Plan, parts: Parts, world: World, lease: Lease, log: logging.Logger) -> None:
        self.plan, self.parts, self.world, self.lease, self.log = plan, parts, world, lease, log
        self.config, self.out = plan.config, plan.out
        self.checkpoints = Checkpoints(plan.out, lease.check)
        self.pending: Pending | None = None
        self.gone_back: Counter[Path] = Counter()
        """How often this start has rolled back to a checkpoint"""
        self.failure: UserError | None = None
        """Why rank 0 could not make a checkpoint of what all had written"""
        if world.main:
            self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        self.checkpoints.remove_unfinished()
        for folder in self.out.glob("export/*.writing*"):
            self.lease.check()
            shutil.rmtree(folder, ignore_errors=True)

    # ---- checkpoints --------------------------------------------------------------------------------------------
    @ACTIVITY("saving")
    def save(
        self,
        stage: int,
        done: int,
        length: int,
        global_steps: int,
        best: dict[str, float] | None = None,
        guard: GuardState | None = None,
    ) -> None:
        """Checkpoint after step `done` of a stage; once however often it is asked for.

        global_steps: steps of all stages that are done; guard: what is known of steps that went wrong; best: what
        validation found, where it was the stage's best.
        With train.async_checkpoints it is complete after a later `agree` or `finish`; the next save waits for it.
        Raises UserError, on every rank, where it cannot be written or another start has taken the run folder.
        """
        data = self.parts.stages[stage].state(done)
        state = RunState(
            stage=stage,
            step=done,
            stage_steps=length,
            global_step=global_steps,
            samples=data.samples,
            epoch=data.epoch,
            seed=data.seed,
            world=self.world.size,
            zero_stage=self.plan.zero_stage,
            index_hash=data.index_hash,
            base_hash=self.parts.base_hash,
            settings_hash=settings_hash(self.config),
            weights=weights_of(self.parts.engine).found,
            guard=guard or GuardState(),
        )
        if self.pending is not None and self.pending.state == state and best is None:
            return
        self.finish("another is due")
        # rank 0 decides for all: only it holds the lease, and ranks may see a shared disk differently
        newest = self.checkpoints.newest().get(stage) if self.world.main else None
        there = newest is not None and newest.state == state
        lost, there, token = distributed.from_main((self._lost(), there, self.lease.token))
        if lost:
            raise UserError(lost)
        if there:
            if best is not None and self.world.main:
                self.checkpoints.name_best(state, best)
            return
        began, background = time.monotonic(), self.config.train.async_checkpoints
        files = self.checkpoints.write(
            self.parts.engine, state, self.world, without_frozen(self.config), token, background
        )
        self.pending = Pending(files, state, best, began, time.monotonic() - began)
        if not background:
            self.finish()

    @ACTIVITY("saving")
    def finish(self, why: str = "") -> None:
        """Wait for a checkpoint that is being written until it is complete; `why` is said in the log.

        Raises UserError, on every rank, where it cannot be.
        """
        if self.pending is None:
            return
        began = time.monotonic()
        self.pending.files.wait()
        reports = distributed.gather(self.report())
        waited = time.monotonic() - began
        self.pending.blocked += waited
        if why:
            self.log.info("waited %.1f s for the checkpoint that was being written: %s", waited, why)
        self.agree(sum(reports))
        if distributed.from_main(self.failure):
            self._give_up(None)

    def report(self) -> int:
        """This rank's number for `agree`: 1 where its files are written, more than all ranks' ones for a failure."""
        written = self.pending is not None and self.pending.files.done.is_set()
        # an error is there before that is set
        return self.world.size + 1 if self._problem(self.pending) else int(written)

    def agree(self, reports: int) -> None:
        """What the sum of all ranks' reports asks for: to go on, to complete the checkpoint, or to give up.

        Raises UserError, on every rank, for a checkpoint that could not be written, or a run folder that was taken.
        """
        failed, written = divmod(reports, self.world.size + 1)
        if not failed and written < self.world.size:
            return
        pending, self.pending = self.pending, None
        if failed:
            self._give_up(pending)
        elif self.world.main and pending is not None:
            try:
                self._complete(pending)
            except Exception as error:  # told by all at the next step
                self.failure = self._told(error)

    @ACTIVITY("saving")
    def _complete(self, pending: Pending) -> None:
        """Rank 0's part, when all have written theirs."""
        began = time.monotonic()
        checkpoint = self.checkpoints.commit(pending.files.folder, pending.state, self.world, pending.best)
        self.checkpoints.prune(self.config.train.keep_checkpoints)
        now = time.monotonic()
        blocked, whole = pending.blocked + now - began, now - pending.began
        self.log.info("checkpoint %s: %.1f s blocked, %.1f s in all", checkpoint.path, blocked, whole)

    @ACTIVITY("saving")
    def _give_up(self, pending: Pending | None) -> NoReturn:
        """End here, on all ranks, each with what went wrong on any; what was written so far goes."""
        if pending is not None:
            pending.files.drop()
        problems = distributed.gather(self._problem(pending))
        if self.world.main and not self.lease.lost:
            with contextlib.suppress(UserError, OSError):  # what was gathered is told, by all alike
                self.checkpoints.remove_unfinished()
        found = [problem for problem in problems if problem is not None]
        raise kind_of_all(found)(*dict.fromkeys(map(str, found)))

    def _problem(self, pending: Pending | None) -> UserError | None:
        """What went wrong on this rank."""
        if self.world.main and self.lease.lost:
            return UserError(self.lease.lost)
        error = pending.files.error if pending is not None else None
        return self.failure or (self._told(error) if error is not None else None)

    def _told(self, error: Exception) -> UserError:
        """An error of writing a checkpoint in a line."""
        if isinstance(error, UserError):
            return error
        kind = kind_of_failure(error, self.out)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return kind(
            f"{self.checkpoints.folder}: rank {self.world.rank} could not write a checkpoint ({reason}); the ones"
            f" before are as they were. Put the disk right (free some space) and start again to go on"
        )

    def _lost(self) -> str:
        """Who has taken the run folder over, if somebody has; rank 0 looks."""
        if self.world.main:
            with contextlib.suppress(UserError):
                self.lease.check()
        return self.lease.lost

    @ACTIVITY("starting")
    def load(self, start: Checkpoint) -> None:
        """Put a checkpoint into the engine, converted first if other ranks or another ZeRO stage wrote it.

        Raises UserError, on every rank, where that cannot be, or what was loaded is not what was saved.
        """
        if self.plan.fits(start):
            self.checkpoints.load(self.parts.engine, start, self.world, without_frozen(self.config))
        else:
            elastic.load(self.parts.engine, start, self.world, without_frozen(self.config), self.log)
        if self.world.main:
            with contextlib.suppress(UserError):  # a lease that was lost is told by all, when the next step begins
                self.lease.check()
                elastic.remove_converted(self.out)
        check_loaded(self.parts.engine, start.state.weights, start.path)
        self.log.info("resumed from %s", start.path)

    @ACTIVITY("starting")
    def roll_back(self, told: str, recovered: bool) -> Checkpoint:
        """The newest sound checkpoint before the steps that went wrong, to be loaded.

        A start goes back to the same one `GO_BACK` times at most, and a second time only if training had `recovered`.
        Raises UserError, on every rank, with `told` where there is none.
        """
        self.finish("training goes back to the one before")
        found = self.checkpoints.to_go_back_to() if self.world.main else []
        while (start := distributed.from_main(found.pop() if found else None)) is not None:
            file = damaged_file(start, self.world)
            if not file:
                break
            self.log.warning("checkpoint %s: %s is damaged", start.path, file)
        if start is None:
            self.give_up(f"{told}; there is no checkpoint to go back to")
        before = self.gone_back[start.path]
        if before and not recovered:
            self.give_up(f"{told}; going back to {start.path.name} did not help")
        if before >= GO_BACK:
            self.give_up(f"{told}; training went back to {start.path.name} {before} times already")
        self.gone_back[start.path] += 1
        return replace(start, checked=True)

    def give_up(self, *told: str) -> NoReturn:
        """End with `told` on every rank, when the checkpoint that is being written is complete.  Raises UserError."""
        self.finish("the run stops")
        raise UserError(*told)

    def best(self, stage: int) -> float:
        """The best accuracy that validation found in a stage; -1 before the first.  Rank 0's answer on all."""
        self.finish("it may be the best")
        found = self.checkpoints.best(stage) if self.world.main else None
        return distributed.from_main(found[1] if found else -1.0)

    # ---- stages -------------------------------------------------------------------------------------------------
    def begin_stage(self, stage: int) -> None:
        """Withdraw the marker of a stage that is trained again, because its end was removed."""
        if self.world.main:
            self.lease.check()
            done_marker(self.out, stage).unlink(missing_ok=True)

    @ACTIVITY("exporting")
    def end_stage(self, stage: int, global_step: int) -> None:
        """Export, where `train.export` asks for it, and the marker that says the stage is complete.

        Raises UserError, on every rank, where they cannot be written or another start has taken the run folder.
        """
        self.finish("the stage ends")
        end_stage(self.plan, self.parts, self.world, self.lease, self.log, stage, global_step)
