"""What the end of a stage leaves in the run folder: an export, and then the marker that says it is complete."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import atomic_folder, write_atomic
from pipeline import distributed
from pipeline.build import Parts
from pipeline.distributed import World
from pipeline.engine import gathered_weights
from pipeline.export import write_export
from pipeline.keeping.lease import Lease
from pipeline.keeping.writing import full_disk_told
from pipeline.plan import Plan, done_marker


def end_stage(
    plan: Plan, parts: Parts, world: World, lease: Lease, log: logging.Logger, stage: int, global_step: int
) -> None:
    """Export a stage, where `train.export` asks for it, and mark it done; all ranks call it together.

    global_step: steps of all stages that are done.
    Raises UserError, on every rank, where they cannot be written or another start has taken the run folder.
    """
    out, form = plan.out, plan.config.train.export
    last = stage == len(plan.config.curriculum.stages) - 1
    export = form == "stages" or (form == "last" and last)
    folder = out / "export" / f"stage{stage}"
    if export:
        model = parts.engine.module
        weights = gathered_weights(model.backbone.vlm, world.main)
        parts_weights = gathered_weights(model.method, world.main)
    problem: UserError | None = None
    if world.main:
        try:
            with full_disk_told(out):
                if export:
                    _export(plan, parts, lease, stage, folder, weights, parts_weights)
                done = {"stage": stage, "global_step": global_step, "export": str(folder) if export else None}
                lease.check()
                write_atomic(done_marker(out, stage), json.dumps(done) + "\n")
        except UserError as error:
            problem = error
    problem = distributed.from_main(problem)
    if problem is not None:
        raise problem
    log.info("stage %d is done%s", stage, f"; exported to {folder}" if export else "")


def _export(
    plan: Plan,
    parts: Parts,
    lease: Lease,
    stage: int,
    folder: Path,
    weights: dict[str, Tensor],
    parts_weights: dict[str, Tensor],
) -> None:
    """Rank 0's part: written aside, and then in the place of an earlier one."""
    with atomic_folder(folder, f"writing-{lease.token}") as writing:
        write_export(
            parts.engine.module, weights, parts_weights, parts.processor, plan.config, stage, writing, parts.base,
            parts.base_hash,
        )  # fmt: skip
        lease.check()
        shutil.rmtree(folder, ignore_errors=True)
