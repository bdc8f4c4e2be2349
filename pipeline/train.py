"""Command: train all stages, or some.  `deepspeed pipeline/train.py --ds ds_configs/zero3.json`

Also under `srun` with one task a GPU (slurm/), and as a single process: `python pipeline/train.py ...`.
"""

from __future__ import annotations

import inspect
import math
import os
import signal
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NoReturn

if not __package__:  # started by path: the modules' root is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from pipeline.watching.watch import STOP, STOPPED, exit_with_launcher, run_rank

if __name__ == "__main__":  # before the imports below, which take seconds: a signal in them is remembered too
    STOP.note(signal.SIGUSR1)

import numpy as np
import torch

from data_prep.errors import UserError
from pipeline import distributed
from pipeline.build import build_parts, make_missing
from pipeline.config import DEMO_RECIPE, load_config, recipe_paths
from pipeline.data.batch import Batch
from pipeline.data.loader import Share, StageSteps, steps_from
from pipeline.data.workers import lost_workers_told
from pipeline.distributed import World, total
from pipeline.engine import learning_rate, loss_scale, reset_optimizer, set_hyperparameters
from pipeline.keeping.keep import Keeper, full_disk_told
from pipeline.keeping.lease import Lease
from pipeline.keeping.resume import from_sound
from pipeline.plan import Plan, make_plan
from pipeline.prompt import PROMPTS
from pipeline.validate import ValidationSet, validate
from pipeline.watching.activity import ACTIVITY
from pipeline.watching.heartbeat import Heartbeat, Where
from pipeline.watching.monitor import (
    Monitor,
    Progress,
    Sparing,
    StepResult,
    Stopwatch,
    configure_logging,
    memory_gb,
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
    config = load_config(recipes, overrides, also=inspect.signature(main).parameters)
    plan = make_plan(config, ds, out, stages, resume, world.size)
    lease = Lease(plan.out, end=os._exit)
    exit_with_launcher()
    try:
        if world.main:
            lease.acquire()
            # whoever had the folder until now may have got further
            plan = make_plan(config, ds, out, stages, resume, world.size)
        heartbeat = Heartbeat(plan.out, lease, world.rank, world.size)
        with full_disk_told(plan.out), lost_workers_told(), heartbeat:
            Run(plan, world, lease, heartbeat).train()
        distributed.stop()
    finally:
        if world.main:
            lease.release()


def step_seed(seed: int, global_step: int, rank: int) -> int:
    """Seed of a rank's draws in a step, 63 bits."""
    low, high = np.random.SeedSequence([seed, global_step, rank]).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


def rows_of_step(micro_batches: list[Batch]) -> list[str]:
    """Keys of a step's rows in the order of the global batch, of which a rank has every world-th; ranks together."""
    parts = distributed.gather([key for batch in micro_batches for key in batch.keys])
    return [key for rows in zip_longest(*parts, fillvalue="") for key in rows if key]


class Run:
    """One start of training: set up once, then stage after stage."""

    def __init__(self, plan: Plan, world: World, lease: Lease, heartbeat: Heartbeat) -> None:
        self.config, self.world, self.lease, self.out = plan.config, world, lease, plan.out
        self.heartbeat = heartbeat
        self.log = configure_logging(self.out / "logs", world.rank)
        log_file = self.out / "logs" / f"rank{world.rank}.log"
        Watchdog(world.rank, self.config.train.hang_minutes, log_file, heartbeat).start()
        self.bad_keys: set[str] = set()
        self.sparing = Sparing(self.log.warning)
        self.dropped_steps = self.overlong = 0  # reasoning steps and rows that did not fit, since this start
        self.device = distributed.start(world)
        self.stop = STOP
        # not before: a launcher ends ranks that have nothing to save by SIGTERM
        self.stop.note(signal.SIGUSR1, signal.SIGTERM)
        stages, starts = distributed.from_main((plan.stages, plan.starts))
        self.plan = from_sound(replace(plan, stages=stages, starts=starts), world, self.log)
        if self.plan.stages:
            base = self._make_missing()
            self.parts = build_parts(self.plan, base, world, self.device, self.log)
            self.engine = self.parts.engine
            self.keeper = Keeper(self.plan, self.parts, world, lease, self.log)
            self._leave_if_asked()

    def _make_missing(self) -> Path | str:
        try:
            base = make_missing(self.plan, self.world, self.log)
        except UserError:
            self._leave_if_asked()  # the signal has ended the program that was making the data, too
            raise
        self._leave_if_asked()
        return base

    def _leave_if_asked(self) -> None:
        """End here, where no step has been trained that would have to be saved; ranks call it together."""
        if total([self.stop.requested], self.device)[0]:
            self.log.info("stopped on request before the first step; start again to go on")
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
        self.monitor = Monitor(self.out, self.world.main, min(trained, default=None), self.config.dump())
        for stage, start in starts.items():
            if stage in self.plan.starts:
                self._load(stage)
            if start == 0 and stage > 0 and self.config.curriculum.reset_optimizer:
                reset_optimizer(self.engine)
            self.run_stage(stage, start, lengths)
        self.monitor.close()
        self.log.info("TensorBoard: tensorboard --logdir %s", self.out / "tensorboard")

    def _load(self, stage: int) -> None:
        try:
            self.keeper.load(self.plan.starts[stage])
        except UserError:
            self._leave_if_asked()  # the signal has ended the program that converted the checkpoint, too
            raise

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
            result = self.train_step(micro_batches, lr, global_step, watch)
            keys = {"keys": rows_of_step(micro_batches)} if train.trace else {}
            self.monitor.step(global_step, {"stage": stage, "step": done, "loss": result.loss, "lr": lr, **keys})
            ACTIVITY.enter("training")  # until here, the first step of a start is a part of starting
            self.heartbeat.where = Where(
                stage, done, len(steps), global_step + 1, result.loss, progress.rate(done), progress.left(done),
                len(self.bad_keys),
            )  # fmt: skip
            if done % train.log_every == 0:
                self._report(stage, done, global_step, lr, result, watch, progress)
            last = done == len(steps)
            if self.val_due(done, last):
                self._validate(stage, done, global_step, steps)
            due = bool(train.checkpoint_every) and done % train.checkpoint_every == 0
            if last or due or result.stopping:
                self.keeper.save(stage, done, len(steps), global_step + 1)
            if result.stopping and not last:
                self.log.info("stopped on request at stage %d step %d; start again to go on", stage, done)
                raise SystemExit(STOPPED)
        if start == len(steps) and self.val_due(start, last=True) and self.keeper.best(stage) < 0:
            self._validate(stage, start, before + start - 1, steps)
        self.keeper.end_stage(stage, global_step=before + len(steps))
        self.sparing.tell_rest()
        if self.bad_keys or self.dropped_steps or self.overlong:
            self.log.info("so far %d bad samples, %d rows too long, %d reasoning steps cut to fit",
                          len(self.bad_keys), self.overlong, self.dropped_steps)  # fmt: skip

    # ---- the update -------------------------------------------------------------------------------------------
    def train_step(self, micro_batches: list[Batch], lr: float, global_step: int, watch: Stopwatch) -> StepResult:
        """One optimizer step: forward, backward, step for each micro-batch; DeepSpeed updates at the last."""
        engine, triangle, norm = self.engine, self.plan.triangle, self.config.optim.loss_norm
        # dropout depends on (seed, step, rank) alone, so that a resumed run draws what the first would have
        torch.manual_seed(step_seed(self.config.train.seed, global_step, self.world.rank))
        set_hyperparameters(engine, self.config.optim, lr)
        labels = [int(batch.label_mask.sum()) for batch in micro_batches]
        columns, bad = sum(b.columns for b in micro_batches), sum(len(b.bad) for b in micro_batches)
        dropped, overlong = sum(b.dropped_steps for b in micro_batches), sum(b.overlong for b in micro_batches)
        mine = [sum(labels), columns, bad, dropped, overlong, self.stop.requested]
        everywhere, columns, bad, dropped, overlong, stopping = (int(n) for n in total(mine, self.device))
        self._note_bad(micro_batches, bad)
        if not everywhere and not bad:  # bad rows have a limit of their own
            raise UserError(
                f"no row of step {global_step + 1} can be trained on: {overlong} are longer than prompt.max_tokens"
                f" {self.config.prompt.max_tokens}; raise it"
            )
        losses = torch.zeros((), device=self.device)
        statistics: dict[str, torch.Tensor] = {}
        for batch, labels_here in zip(micro_batches, labels, strict=True):
            with watch("forward"):
                nll, sums = engine(batch.to(self.device))
            with watch("backward"):
                loss = nll * loss_scale(norm, labels_here, everywhere, triangle)
                engine.backward(loss)
            with watch("step"):
                engine.step()
            losses += loss.detach().float() / (triangle.world * triangle.accumulation)
            statistics = {name: value + statistics.get(name, 0.0) for name, value in sums.items()}
        names = sorted(statistics)
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        diverged = not math.isfinite(grad_norm) or grad_norm < 0  # -1 is DeepSpeed's word for such a norm
        loss, anywhere, *sums = total(
            [float(losses), diverged, *(float(statistics[name]) for name in names)], self.device
        )
        if anywhere or not math.isfinite(loss):
            self._stop_diverged(loss, grad_norm, lr, global_step, micro_batches)
        self.dropped_steps, self.overlong = self.dropped_steps + dropped, self.overlong + overlong
        return StepResult(loss, grad_norm, columns, stopping > 0, dict(zip(names, sums, strict=True)))

    def _stop_diverged(
        self, loss: float, grad_norm: float, lr: float, global_step: int, micro_batches: list[Batch]
    ) -> NoReturn:
        """Stop before a checkpoint or metrics.jsonl can hold what is no number."""
        keys = [key for batch in micro_batches for key in batch.keys if key]
        self.log.error("rows of step %d on this rank: %s", global_step + 1, ", ".join(keys))
        raise UserError(
            f"step {global_step + 1}: the loss is {loss}, the gradient norm {grad_norm}, at a learning rate of"
            f" {lr:.1e}; nothing of this step is saved. Lower optim.lr, or look at the step's rows, which"
            f" {self.out / 'logs'} names"
        )

    def _note_bad(self, micro_batches: list[Batch], bad: int) -> None:
        """Name samples that could not be used, each once; stop past `data.max_bad` of them.  `bad`: on all ranks."""
        if not bad:
            return
        found = dict(row for part in distributed.gather([row for b in micro_batches for row in b.bad]) for row in part)
        for key in sorted(found.keys() - self.bad_keys):
            self.sparing("skipped %s: %s", key, found[key])
        self.bad_keys |= found.keys()
        if len(self.bad_keys) > self.config.data.max_bad:
            self.sparing.tell_rest()
            raise UserError(
                f"{len(self.bad_keys)} samples could not be used, more than data.max_bad {self.config.data.max_bad};"
                f" keys and reasons are in {self.out / 'logs'}"
            )

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
                "data/bad_samples": len(self.bad_keys),
                "data/dropped_steps": self.dropped_steps,
                "data/overlong_rows": self.overlong,
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
            raise UserError(f"stage {stage} step {done}: the validation loss is {found['val/loss']}; lower optim.lr")
        if found["val/accuracy"] > self.keeper.best(stage):
            self.keeper.save(stage, done, len(steps), global_step + 1, found)


if __name__ == "__main__":
    run_rank(main, World.from_environment().main)
