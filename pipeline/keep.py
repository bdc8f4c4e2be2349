"""What a run leaves behind: checkpoints on the way; an export and a marker at the end of a stage."""

from __future__ import annotations

import json
import logging
import time

from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline import distributed
from pipeline.build import Parts, without_frozen
from pipeline.checkpoint import Checkpoints, RunState, read_best
from pipeline.distributed import World
from pipeline.engine import gathered_weights
from pipeline.export import write_export
from pipeline.lease import Lease
from pipeline.plan import Plan, done_marker


class Keeper:
    """Writes a run's checkpoints and exports; every rank calls each method together."""

    def __init__(self, plan: Plan, parts: Parts, world: World, lease: Lease, log: logging.Logger) -> None:
        self.plan, self.parts, self.world, self.lease, self.log = plan, parts, world, lease, log
        self.config, self.out = plan.config, plan.out
        self.checkpoints = Checkpoints(plan.out)

    def save(self, stage: int, done: int, length: int, global_steps: int, best: dict[str, float] | None = None) -> None:
        """Checkpoint after step `done` of a stage; once however often it is asked for.

        global_steps: steps of all stages that are done; best: what validation found, where it was the stage's best.
        Raises UserError where another start has taken the run folder.
        """
        state = RunState(
            stage=stage,
            step=done,
            stage_steps=length,
            global_step=global_steps,
            samples=done * self.plan.triangle.global_batch,
            world=self.world.size,
            zero_stage=self.plan.ds["zero_optimization"]["stage"],
            index_hash=self.parts.indexes["train"].index_hash,
            base_hash=self.parts.base_hash,
        )
        # rank 0 decides for all: only it holds the lease, and ranks may see a shared disk differently
        newest = self.checkpoints.newest(stage) if self.world.main else None
        lost, there = distributed.from_main((self.lease.lost, newest is not None and newest.state == state))
        if lost:
            raise UserError(lost)
        if not there:
            began = time.monotonic()
            checkpoint = self.checkpoints.save(self.parts.engine, state, self.world, without_frozen(self.config))
            self.log.info("checkpoint %s (%.1f s)", checkpoint.path, time.monotonic() - began)
        if not self.world.main:
            return
        if best is not None:
            named = {"checkpoint": self.checkpoints.path_of(state).name, "step": done, **best}
            write_atomic(self.out / f"best-stage{stage}.json", json.dumps(named, indent=1) + "\n")
        self.checkpoints.prune(self.config.train.keep_checkpoints)

    def best(self, stage: int) -> float:
        """The best accuracy that validation found in a stage; -1 before the first.  Rank 0's answer on all."""
        path = self.out / f"best-stage{stage}.json"
        found = read_best(path)["val/accuracy"] if self.world.main and path.exists() else -1.0
        return distributed.from_main(found)

    def end_stage(self, stage: int, global_step: int) -> None:
        """Export, where `train.export` asks for it, and the marker that says the stage is complete."""
        config = self.config
        last = stage == len(config.curriculum.stages) - 1
        export = config.train.export == "stages" or (config.train.export == "last" and last)
        folder = self.out / "export" / f"stage{stage}"
        if export:
            model = self.parts.engine.module
            weights = gathered_weights(model.backbone.vlm, self.world.main)
            if self.world.main:
                parts = self.parts
                write_export(model, weights, parts.processor, config, stage, folder, parts.base, parts.base_hash)
        if self.world.main:
            done = {"stage": stage, "global_step": global_step, "export": str(folder) if export else None}
            write_atomic(done_marker(self.out, stage), json.dumps(done) + "\n")
        distributed.barrier()
        self.log.info("stage %d is done%s", stage, f"; exported to {folder}" if export else "")
