"""Command: train all stages, or some.  `deepspeed pipeline/train.py --ds ds_configs/zero3.json`

Also under `srun` with one task a GPU (slurm/), and as a single process: `python pipeline/train.py ...`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

if not __package__:  # started by path: the modules' root is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from data_prep import cli
from data_prep.errors import UserError
from pipeline import distributed
from pipeline.batch import Batch
from pipeline.build import build_parts
from pipeline.config import DEMO_RECIPE, load_config
from pipeline.distributed import World, total
from pipeline.engine import learning_rate, loss_scale, reset_optimizer, set_hyperparameters
from pipeline.keep import Keeper
from pipeline.lease import Lease
from pipeline.loader import Share, StageSteps, steps_from
from pipeline.monitor import Monitor, Progress, StepResult, Stopwatch, configure_logging, memory_gb, step_scalars
from pipeline.plan import Plan, make_plan
from pipeline.validate import ValidationSet, validate
from pipeline.watch import STOPPED, StopRequest, exit_with_launcher


def main(
    *,
    ds: Path,
    recipe: Path | None = None,
    data: str | None = None,
    out: Path | None = None,
    stages: str | None = None,
    resume: Literal["auto", "never"] = "auto",
    local_rank: int | None = None,
    **options: str,
) -> None:
    """Train the stages of a recipe: defaults <- --recipe <- --SECTION.FIELD VALUE.

    --ds: DeepSpeed file (ds_configs/); --recipe: recipes/*.yaml, the demo without it; --data: shard folder;
    --out: run folder, runs/NAME without it; --stages: such as 2 or 0-3, all without it; --resume auto goes on from
    what the run folder holds, --resume never stops if it holds anything; --local_rank comes from the launcher.
    SECTION.FIELD: every setting is in pipeline/config.py with its meaning.
    """
    world = World.from_environment()
    overrides = options | ({"data.path": data} if data else {})
    config = load_config(recipe or DEMO_RECIPE, overrides, also=inspect.signature(main).parameters)
    plan = make_plan(config, ds, out, stages, resume, world.size)
    lease = Lease(plan.out)
    exit_with_launcher()
    try:
        if world.main:
            lease.acquire()
            # whoever had the folder until now may have got further
            plan = make_plan(config, ds, out, stages, resume, world.size)
        Run(plan, world, lease).train()
        distributed.stop()
    finally:
        if world.main:
            lease.release()


def step_seed(seed: int, global_step: int, rank: int) -> int:
    """Seed of a rank's draws in a step, 63 bits."""
    low, high = np.random.SeedSequence([seed, global_step, rank]).generate_state(2)
    return (int(high) << 32 | int(low)) >> 1


class Run:
    """One start of training: set up once, then stage after stage."""

    def __init__(self, plan: Plan, world: World, lease: Lease) -> None:
        self.config, self.world, self.lease, self.out = plan.config, world, lease, plan.out
        self.log = configure_logging(self.out / "logs", world.rank)
        self.bad_keys: set[str] = set()
        self.dropped_steps = self.overlong = 0  # reasoning steps and rows that did not fit, since this start
        self.device = distributed.start(world)
        self.stop = StopRequest()
        stages, start = distributed.from_main((plan.stages, plan.start))
        self.plan = replace(plan, stages=stages, start=start)
        if self.plan.stages:
            self.parts = build_parts(self.plan, world, self.device, self.log)
            self.engine = self.parts.engine
            self.keeper = Keeper(self.plan, self.parts, world, lease, self.log)

    def steps_of(self, stage: int) -> StageSteps:
        """The data of a stage."""
        config, triangle = self.config, self.plan.triangle
        share = Share(self.world.rank, self.world.size, triangle.global_batch, triangle.micro_batch)
        return StageSteps(
            self.parts.indexes["train"], self.parts.builder, config.curriculum, stage, share, config.train.seed,
            config.data.last_batch,
        )  # fmt: skip

    def train(self) -> None:
        """Every stage of the plan, in order."""
        if not self.plan.stages:
            self.log.info("nothing to do: all stages asked for are done in %s", self.out)
            return
        lengths = [len(self.steps_of(stage)) for stage in range(len(self.config.curriculum.stages))]
        first = self.plan.stages[0]
        global_step = sum(lengths[:first]) + self.plan.start_step
        self.monitor = Monitor(self.out, self.world.main, global_step, self.config.dump())
        for stage in self.plan.stages:
            start = self.plan.start_step if stage == first else 0
            if start == 0 and stage > 0 and self.config.curriculum.reset_optimizer:
                reset_optimizer(self.engine)
            self.run_stage(stage, start, lengths)
        self.monitor.close()
        self.log.info("TensorBoard: tensorboard --logdir %s", self.out / "tensorboard")

    def run_stage(self, stage: int, start: int, lengths: list[int]) -> None:
        """Steps `start`.. of a stage, with logs, validation and checkpoints at their cadences."""
        config, train = self.config, self.config.train
        steps, before = self.steps_of(stage), sum(lengths[:stage])
        shown = config.curriculum.stages[stage]
        self.log.info(
            "stage %d: %d latent steps, %d reasoning steps skipped; steps %d to %d, %d samples an epoch",
            stage, shown.latents, shown.skip, start, len(steps), steps.steps_per_epoch * train.global_batch,
        )  # fmt: skip
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
            self.monitor.step(global_step, {"stage": stage, "step": done, "loss": result.loss, "lr": lr})
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
        self.keeper.end_stage(stage, global_step=before + len(steps))
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
        labels = [int(batch.target_mask.sum()) for batch in micro_batches]
        columns, bad = sum(b.columns for b in micro_batches), sum(len(b.bad) for b in micro_batches)
        dropped, overlong = sum(b.dropped_steps for b in micro_batches), sum(b.overlong for b in micro_batches)
        mine = [sum(labels), columns, bad, dropped, overlong, self.stop.requested]
        everywhere, columns, bad, dropped, overlong, stopping = (int(n) for n in total(mine, self.device))
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
        loss, *sums = total([float(losses), *(float(statistics[name]) for name in names)], self.device)
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        self._note_bad(micro_batches, bad)
        self.dropped_steps, self.overlong = self.dropped_steps + dropped, self.overlong + overlong
        return StepResult(loss, grad_norm, columns, stopping > 0, dict(zip(names, sums, strict=True)))

    def _note_bad(self, micro_batches: list[Batch], bad: int) -> None:
        """Name samples that could not be used, each once; stop past `data.max_bad` of them.  `bad`: on all ranks."""
        if not bad:
            return
        lines = {line for part in distributed.gather([line for b in micro_batches for line in b.bad]) for line in part}
        for line in sorted(lines - self.bad_keys):
            self.log.warning("skipped %s", line)
        self.bad_keys |= lines
        if len(self.bad_keys) > self.config.data.max_bad:
            raise UserError(
                f"{len(self.bad_keys)} samples could not be used, more than data.max_bad {self.config.data.max_bad};"
                f" their keys and reasons are in {self.out / 'logs'}"
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

    def _validate(self, stage: int, done: int, global_step: int, steps: StageSteps) -> None:
        config, share = self.config, steps.share
        decode = Share(share.rank, share.world, share.global_batch, config.train.val_batch)
        data = ValidationSet.of(
            self.parts.indexes["val"], self.parts.builder, config.curriculum.stages[stage], config.curriculum.groups,
            config.train.val_samples, decode,
        )  # fmt: skip
        found = validate(self.engine, data, self.parts.builder, config.eval.max_new_tokens, self.device)
        self.monitor.scalars(global_step, found)
        self.log.info(
            "stage %d step %d: validation loss %.4f, accuracy %.3f of %d, %.1f autoregressive steps", stage, done,
            found["val/loss"], found["val/accuracy"], config.train.val_samples, found["val/autoregressive_steps"],
        )  # fmt: skip
        if found["val/accuracy"] > self.keeper.best(stage):
            self.keeper.save(stage, done, len(steps), global_step + 1, found)


def entry() -> None:
    """Run the command so that of all ranks only the first tells a user's mistake."""
    if World.from_environment().main:
        return cli.run(main)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            cli.run(main)
    except SystemExit as end:
        if end.code == 2:
            # a launcher stops all ranks at the first exit: rank 0 must have spoken by then
            signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
            time.sleep(30)
        raise


if __name__ == "__main__":
    entry()
