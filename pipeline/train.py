"""Command: train all stages, or some.  `deepspeed pipeline/train.py --ds ds_configs/zero3.json`

Also under `srun` with one task a GPU (slurm/), and as a single process: `python pipeline/train.py ...`.
"""

from __future__ import annotations

import inspect
import math
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

if not __package__:  # started by path: the modules' root is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.watching.watch import STOP, STOPPED, exit_with_launcher, run_rank

if __name__ == "__main__":  # before the imports below, which take seconds: a signal in them is remembered too
    STOP.begin()


from data_prep.errors import UserError
from pipeline import distributed
from pipeline.agreement import agreed, facts_of_start, mistakes_shared
from pipeline.build import build_parts, make_missing
from pipeline.config import DEMO_RECIPE
from pipeline.data.loader import Share, StageSteps, steps_from
from pipeline.data.unusable import Unusable
from pipeline.data.workers import lost_workers_told
from pipeline.distributed import World, total
from pipeline.engine import learning_rate, reset_optimizer
from pipeline.keeping.keep import Keeper
from pipeline.keeping.lease import Lease
from pipeline.keeping.resume import from_sound
from pipeline.keeping.state import Checkpoint
from pipeline.keeping.writing import full_disk_told
from pipeline.memory_advice import lack_of_memory_told
from pipeline.plan import Plan, make_plan
from pipeline.prompt import PROMPTS
from pipeline.recipe import load_config, recipe_paths
from pipeline.update import Update, rows_of_step
from pipeline.validate import ValidationSet, validate
from pipeline.watching.activity import ACTIVITY
from pipeline.watching.guard import Guard
from pipeline.watching.heartbeat import Heartbeat, Where
from pipeline.watching.monitor import (
    Monitor,
    Progress,
    StepResult,
    Stopwatch,
    configure_logging,
    memory_gb,
    step_line,
    step_scalars,
)
from pipeline.watching.watchdog import Watchdog


def main(
    *,
    ds: Path,
    recipe: str | None = None,
    data: str | None = None,
    max_bad: int | None = None,
    out: Path | None = None,
    stages: str | None = None,
    resume: Literal["auto", "elastic", "never"] = "auto",
    prompt: Literal["default", "released", "context"] | None = None,
    local_rank: int | None = None,
    **options: str,
) -> None:
    """Train the stages of a recipe: defaults <- --recipe <- --SECTION.FIELD VALUE.

    --ds: DeepSpeed file (ds_configs/); --recipe: recipes/*.yaml, the demo without it; several, with commas between
    them, are read from left to right; --plugin: a file that adds parts of the method (docs/new_method.md); --data:
    shard folder; --max_bad: stop when more samples than this could not be used; --out: run folder, runs/NAME without
    it; --stages: such as 2 or 0-3, all without it; --resume auto goes on from what the run folder holds, --resume
    elastic also with another number of ranks or ZeRO stage, --resume never stops if it holds anything; --prompt:
    default, released (how answers are asked for) or context (with the context or hint); --local_rank comes from the
    launcher.
    SECTION.FIELD: every setting is in pipeline/config.py with its meaning.
    """
    world = World.from_environment()
    overrides = options | ({"data.path": data} if data else {})
    overrides |= {"data.max_bad": str(max_bad)} if max_bad is not None else {}
    overrides |= {f"prompt.{name}": str(value) for name, value in PROMPTS[prompt].items()} if prompt else {}
    recipes = recipe_paths(recipe) if recipe else [DEMO_RECIPE]
    exit_with_launcher()
    with mistakes_shared(world):
        config = load_config(recipes, overrides, also=inspect.signature(main).parameters)
        plan = make_plan(config, ds, out, stages, resume, world.size)
    lease = Lease(plan.out, end=os._exit)
    try:
        with mistakes_shared(world):
            if world.main:
                lease.acquire()
                # whoever had the folder until now may have got further
                plan = make_plan(config, ds, out, stages, resume, world.size)
        heartbeat = Heartbeat(plan.out, lease, world.rank, world.size)
        short_of_memory = lack_of_memory_told(trained=lambda: heartbeat.where.stage >= 0)
        with full_disk_told(plan.out), lost_workers_told(), short_of_memory, heartbeat:
            Run(plan, world, lease, heartbeat).train()
        distributed.stop()
    finally:
        if world.main:
            lease.release()


class Run:
    """One start of training: set up once, then stage after stage."""

    def __init__(self, plan: Plan, world: World, lease: Lease, heartbeat: Heartbeat) -> None:
        self.config, self.world, self.lease, self.out = plan.config, world, lease, plan.out
        self.heartbeat = heartbeat
        self.log = configure_logging(self.out / "logs", world.rank)
        log_file = self.out / "logs" / f"rank{world.rank}.log"
        Watchdog(world.rank, self.config.train.hang_minutes, log_file, heartbeat).start()
        train = self.config.train
        self.unusable = Unusable(self.config.data.max_bad, self.log, self.out / "logs")
        self.guard = Guard(train.rollback_after, train.spike)
        self.device = distributed.start(world)
        with agreed() as facts:
            facts |= facts_of_start(plan, self.device)
        self.stop = STOP
        # not before: a launcher ends ranks that have nothing to save by SIGTERM
        self.stop.agree()
        stages, starts = distributed.from_main((plan.stages, plan.starts))
        self.plan = from_sound(replace(plan, stages=stages, starts=starts), world, self.log, lease.check)
        if self.plan.stages:
            base = self._make_missing()
            self.parts = build_parts(self.plan, base, world, self.device, self.log)
            self.engine = self.parts.engine
            self.keeper = Keeper(self.plan, self.parts, world, lease, self.log)
            self.update = Update(self.plan, self.parts, world, self.keeper, self.unusable, self.stop)
            self._leave_if_asked()

    def _make_missing(self) -> Path | str:
        try:
            base = make_missing(self.plan, self.world, self.log, self.lease.check)
        except UserError:
            self._leave_if_asked()  # the signal has ended the program that was making the data, too
            raise
        self._leave_if_asked()
        return base

    def _leave_if_asked(self, when: str = "before the first step") -> None:
        """End here, where no step has been trained that would have to be saved; ranks call it together."""
        if total([self.stop.requested], self.device)[0]:
            self.log.info("stopped on request %s; start again to go on", when)
            raise SystemExit(STOPPED)

    def train(self) -> None:
        """Every stage of the plan, in order."""
        if not self.plan.stages:
            self.log.info("nothing to do: all stages asked for are done in %s", self.out)
            return
        lengths = [len(steps) for steps in self.parts.stages]
        starts = {stage: self.plan.start_step(stage) for stage in self.plan.stages}
        # a stage that only lacks its export comes before those that are trained, and forgets nothing
        trained = [sum(lengths[:stage]) + start for stage, start in starts.items() if start < lengths[stage]]
        first = min(trained, default=None)
        self.monitor = Monitor(self.out, self.world.main, first, self.config.dump(), self.lease.check)
        if self.world.main and first is not None and self.heartbeat.restarts:
            self.monitor.mark("restarts", first, self.heartbeat.restarts, self._start_told())
        for stage, start in starts.items():
            if stage in self.plan.starts:
                self._load(self.plan.starts[stage])
                self.guard.state = self.plan.starts[stage].state.guard
            if start == 0:
                self._begin_stage(stage)
            self.run_stage(stage, start, lengths)
        self.monitor.close()
        self.log.info("TensorBoard: tensorboard --logdir %s", self.out / "tensorboard")

    def _load(self, start: Checkpoint, when: str = "before the first step") -> None:
        try:
            self.keeper.load(start)
        except UserError:
            self._leave_if_asked(when)  # the signal has ended the program that converted the checkpoint, too
            raise

    def _begin_stage(self, stage: int) -> None:
        if stage > 0 and self.config.curriculum.reset_optimizer:
            reset_optimizer(self.engine)
        self.guard.begin_stage()

    def _start_told(self) -> str:
        start = next(iter(self.plan.starts.values()), None)
        return (
            f"from {start.path.name if start else 'the base model'}, {self.world.size} ranks, on {socket.gethostname()}"
        )

    def run_stage(self, stage: int, start: int, lengths: list[int]) -> None:
        """Steps `start`.. of a stage, with logs, validation and checkpoints at their cadences."""
        config, train = self.config, self.config.train
        steps, before = self.parts.stages[stage], sum(lengths[:stage])
        shown = config.curriculum.stages[stage]
        self.log.info(
            "stage %d: %d latent steps, %d reasoning steps skipped; steps %d to %d, %s",
            stage, shown.latents, shown.skip, start, len(steps), steps.describe_epoch(),
        )  # fmt: skip
        if last_batch := steps.describe_last_batch():
            self.log.info(last_batch)
        if start < len(steps):
            self.keeper.begin_stage(stage)
        progress = Progress(start, len(steps))
        self.engine.train()
        batches = steps_from(steps, start, config.data.workers)
        for step in range(start, len(steps)):
            done, global_step = step + 1, before + step
            watch = Stopwatch(self.device, exact=done % train.log_every == 0)
            with watch("data_wait"):
                micro_batches = next(batches)
            lr = learning_rate(config.optim, global_step, sum(lengths))
            result = self.update(micro_batches, lr, global_step, watch, self.device)
            wrong = self.guard.judge(result)
            keys = rows_of_step(micro_batches) if wrong or train.trace else None
            self.monitor.step(global_step, step_line(stage, done, lr, result, wrong, keys))
            if wrong:
                self._tell_wrong(stage, done, global_step, lr, wrong, keys or [])
            ACTIVITY.enter("training")  # until here, the first step of a start is a part of starting
            self.heartbeat.where = Where(
                stage, done, len(steps), global_step + 1, result.loss if math.isfinite(result.loss) else None,
                progress.rate(done), progress.left(done), len(self.unusable.bad_keys), self.guard.state.skipped,
                self.guard.state.rollbacks,
            )  # fmt: skip
            if done % train.log_every == 0 and not wrong:
                self._report(stage, done, global_step, lr, result, watch, progress)
            last = done == len(steps)
            if self.val_due(done, last):
                self._validate(stage, done, global_step, steps)
            # what steps that go wrong have made of the model is not what to go back to
            due = bool(train.checkpoint_every) and done % train.checkpoint_every == 0 and not wrong
            if last or due or result.stopping:
                self._save(stage, done, global_step)
            if result.stopping and not last:
                self.keeper.finish()
                self.log.info("stopped on request at stage %d step %d; start again to go on", stage, done)
                raise SystemExit(STOPPED)
        if start == len(steps) and self.val_due(start, last=True) and self.keeper.best(stage) < 0:
            self._validate(stage, start, before + start - 1, steps)
        self.keeper.end_stage(stage, global_step=before + len(steps))
        self.unusable.tell()

    def _save(self, stage: int, done: int, global_step: int, best: dict[str, float] | None = None) -> None:
        length = len(self.parts.stages[stage])
        self.monitor.flush()
        self.keeper.save(stage, done, length, global_step + 1, best, self.guard.state)

    def _tell_wrong(self, stage: int, done: int, global_step: int, lr: float, wrong: str, keys: list[str]) -> None:
        """A step went wrong: say so, and after train.rollback_after in a row take back what they did.

        Raises UserError where training cannot go on from before them.
        """
        state, limit = self.guard.state, self.config.train.rollback_after
        rows = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        self.log.warning("stage %d step %d went wrong: %s; rows %s", stage, done, wrong, rows)
        self.monitor.mark("wrong steps", global_step, None, wrong)
        self.monitor.scalars(global_step, self.guard.scalars())
        if not self.guard.due:
            return
        told = (
            f"stage {stage} step {done}: {wrong}, at a learning rate of {lr:.1e}; {state.in_a_row} in a row went"
            f" wrong. Lower optim.lr, or look at their rows, which {self.out / 'metrics.jsonl'} names"
        )
        start = self.keeper.roll_back(told, self.guard.recovered) if limit else self.keeper.give_up(told)
        self._load(start, f"while going back to {start.path.name}")
        if start.state.stage < stage:
            self._begin_stage(stage)
        self.guard.rolled_back()
        line = f"went back to {start.path.name}; training goes on behind step {done}"
        self.log.warning("rolled back: %s", line)
        self.monitor.mark("rollbacks", global_step, self.guard.state.rollbacks, line)

    # ---- what happens around it -------------------------------------------------------------------------------
    def _report(
        self, stage: int, done: int, global_step: int, lr: float, r: StepResult, watch: Stopwatch, progress: Progress
    ) -> None:
        tokens_per_s = r.columns / sum(watch.seconds.values())
        self.monitor.scalars(
            global_step,
            {
                **step_scalars(r, watch, self.plan.triangle.global_batch),
                **memory_gb(self.device),
                "train/lr": lr,
                "curriculum/stage": stage,
                "curriculum/latents": self.config.curriculum.stages[stage].latents,
                **self.unusable.scalars(),
                **self.guard.scalars(),
            },
        )
        self.log.info(
            "stage %d step %s, loss %.4f, gradient norm %.2f, lr %.1e, %.0f tokens/s",
            stage, progress.line(done), r.loss, r.grad_norm, lr, tokens_per_s,
        )  # fmt: skip

    def val_due(self, done: int, last: bool) -> bool:
        """Whether to validate after step `done` of a stage."""
        train = self.config.train
        return train.val_samples > 0 and (last or bool(train.validate_every and done % train.validate_every == 0))

    @ACTIVITY("validating")
    def _validate(self, stage: int, done: int, global_step: int, steps: StageSteps) -> None:
        config, share = self.config, steps.share
        decode = Share(share.rank, share.world, share.global_batch, config.train.val_batch)
        data = ValidationSet.of(
            self.parts.indexes["val"], self.parts.builder, config.curriculum.stages[stage], config.curriculum,
            config.train.val_samples, decode,
        )  # fmt: skip
        found = validate(self.engine, data, self.parts.builder, config.eval.max_new_tokens, self.device)
        self.monitor.scalars(global_step, found)
        self.log.info(
            "stage %d step %d: validation loss %.4f, accuracy %.3f of %d rows, %.1f autoregressive steps; %d rows"
            " could not be used", stage, done, found["val/loss"], found["val/accuracy"], found["val/rows"],
            found["val/autoregressive_steps"], found["val/unusable_rows"],
        )  # fmt: skip
        if not math.isfinite(found["val/loss"]):
            told = f"stage {stage} step {done}: the validation loss is {found['val/loss']}; lower optim.lr"
            self.keeper.give_up(told)
        if found["val/accuracy"] > self.keeper.best(stage):
            self._save(stage, done, global_step, found)


if __name__ == "__main__":
    run_rank(main, World.from_environment().main)
