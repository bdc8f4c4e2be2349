"""What a run leaves behind: checkpoints on the way; an export and a marker at the end of a stage."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline import distributed
from pipeline.build import Parts, without_frozen
from pipeline.distributed import World
from pipeline.engine import gathered_weights
from pipeline.export import write_export
from pipeline.keeping import elastic
from pipeline.keeping.checkpoint import Checkpoint, Checkpoints, RunState
from pipeline.keeping.lease import Lease
from pipeline.plan import Plan, done_marker, settings_hash
from pipeline.watching.activity import ACTIVITY


class Keeper:
    """Writes a run's checkpoints and exports; every rank calls each method together."""

    def __init__(self, plan: Plan, parts: Parts, world: World, lease: Lease, log: logging.Logger) -> None:
        self.plan, self.parts, self.world, self.lease, self.log = plan, parts, world, lease, log
        self.config, self.out = plan.config, plan.out
        self.checkpoints = Checkpoints(plan.out)

    @ACTIVITY("saving")
    def save(self, stage: int, done: int, length: int, global_steps: int, best: dict[str, float] | None = None) -> None:
        """Checkpoint after step `done` of a stage; once however often it is asked for.

        global_steps: steps of all stages that are done; best: what validation found, where it was the stage's best.
        Raises UserError where another start has taken the run folder.
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
        )
        # rank 0 decides for all: only it holds the lease, and ranks may see a shared disk differently
        newest = self.checkpoints.newest().get(stage) if self.world.main else None
        lost, there = distributed.from_main((self.lease.lost, newest is not None and newest.state == state))
        if lost:
            raise UserError(lost)
        if best is not None and self.world.main:
            # before the checkpoint: killed in between, the next start ignores the name of one that is not there, and
            # validates this step again
            named = {"checkpoint": self.checkpoints.path_of(state).name, "step": done, **best}
            write_atomic(self.out / f"best-stage{stage}.json", json.dumps(named, indent=1) + "\n")
        if not there:
            began = time.monotonic()
            checkpoint = self.checkpoints.save(self.parts.engine, state, self.world, without_frozen(self.config))
            self.log.info("checkpoint %s (%.1f s)", checkpoint.path, time.monotonic() - began)
        if self.world.main:
            self.checkpoints.prune(self.config.train.keep_checkpoints)

    @ACTIVITY("starting")
    def load(self, start: Checkpoint) -> None:
        """Put a checkpoint into the engine, converted first if other ranks or another ZeRO stage wrote it.

        Raises UserError, on every rank, where that cannot be.
        """
        if self.plan.fits(start):
            self.checkpoints.load(self.parts.engine, start, self.world, without_frozen(self.config))
        else:
            elastic.load(self.parts.engine, start, self.world, without_frozen(self.config), self.log)
        if self.world.main:
            elastic.remove_converted(self.out)
        self.log.info("resumed from %s", start.path)

    def best(self, stage: int) -> float:
        """The best accuracy that validation found in a stage; -1 before the first.  Rank 0's answer on all."""
        found = self.checkpoints.best(stage) if self.world.main else None
        return distributed.from_main(found[1] if found else -1.0)

    def begin_stage(self, stage: int) -> None:
        """Withdraw the marker of a stage that is trained again, because its end was removed."""
        if self.world.main:
            done_marker(self.out, stage).unlink(missing_ok=True)

    @ACTIVITY("exporting")
    def end_stage(self, stage: int, global_step: int) -> None:
        """Export, where `train.export` asks for it, and the marker that says the stage is complete."""
        config = self.config
        last = stage == len(config.curriculum.stages) - 1
        export = config.train.export == "stages" or (config.train.export == "last" and last)
        folder = self.out / "export" / f"stage{stage}"
        if export:
            model = self.parts.engine.module
            weights = gathered_weights(model.backbone.vlm, self.world.main)
            parts_weights = gathered_weights(model.method, self.world.main)
            if self.world.main:
                parts = self.parts
                write_export(
                    model, weights, parts_weights, parts.processor, config, stage, folder, parts.base, parts.base_hash
                )
        if self.world.main:
            done = {"stage": stage, "global_step": global_step, "export": str(folder) if export else None}
            write_atomic(done_marker(self.out, stage), json.dumps(done) + "\n")
        distributed.barrier()
        self.log.info("stage %d is done%s", stage, f"; exported to {folder}" if export else "")


@contextlib.contextmanager
def full_disk_told(out: Path) -> Iterator[None]:
    """Turn what a full disk makes of a write, in any library, into one line.  Raises UserError."""
    try:
        yield
    except Exception as error:
        # torch's writer raises a RuntimeError of its own, safetensors another kind
        words = ("No space left", "Disk quota exceeded", "PytorchStreamWriter", "unexpected pos", "iostream error")
        if not any(word in str(error) for word in words):
            raise
        raise UserError(
            f"{out} could not be written ({str(error).splitlines()[0]}); free some disk space and go on"
        ) from None
