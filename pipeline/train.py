"""Command: train all stages, or some.  `deepspeed pipeline/train.py --ds ds_configs/zero3.json`

Also under `srun` with one task a GPU (slurm/), and as a single process: `python pipeline/train.py ...`.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if not __package__:  # started by path: the modules' root is the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import deepspeed
import torch

from data_prep import cli
from data_prep.errors import UserError
from data_prep.files import write_atomic
from data_prep.index import ShardIndex
from pipeline import distributed, prepare
from pipeline.backbones import BACKBONES
from pipeline.batch import Batch
from pipeline.checkpoint import Checkpoints, RunState
from pipeline.config import DEMO_RECIPE, RunConfig, load_config
from pipeline.distributed import World, total
from pipeline.engine import (
    build_engine,
    gathered_weights,
    learning_rate,
    loss_scale,
    reset_optimizer,
    set_hyperparameters,
)
from pipeline.export import write_export
from pipeline.lease import Lease
from pipeline.loader import Share, StageSteps, steps_from
from pipeline.monitor import Monitor, Progress, Stopwatch, configure_logging, memory_gb
from pipeline.plan import Plan, config_hash, make_plan, write_config
from pipeline.prompt import RowBuilder
from pipeline.validate import ValidationSet, validate
from pipeline.watch import exit_with_launcher


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
    what the run folder holds, never refuses a used one; --local_rank comes from the launcher.
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
    finally:
        if world.main:
            lease.release()


@dataclass
class StepResult:
    """A step's numbers, summed over ranks."""

    loss: float
    grad_norm: float
    labels: int
    columns: int
    bad: int
    dropped_steps: int
    statistics: dict[str, float]


class Run:
    """One start of training: set up once, then stage after stage."""

    def __init__(self, plan: Plan, world: World, lease: Lease) -> None:
        self.config, self.world, self.lease, self.out = plan.config, world, lease, plan.out
        self.log = configure_logging(self.out / "logs", world.rank)
        self.checkpoints = Checkpoints(self.out)
        self.bad_samples = 0
        self.device = distributed.start(world)
        stages, start = distributed.from_main((plan.stages, plan.start))  # type: ignore[misc]
        self.plan = replace(plan, stages=stages, start=start)
        if not stages:
            self.log.info("nothing to do: all stages asked for are done in %s", self.out)
            return
        self._prepare()
        self._build()

    def _prepare(self) -> None:
        """Data and base model: made by rank 0 if need be, checked by all."""
        config = self.config
        problem: UserError | None = None
        base: Path | str = ""
        if self.world.main:
            try:
                prepare.make_data(config, self.log.info)
                base = prepare.make_base(config, self.out, self.log.info)
                write_config(config, self.out)
            except UserError as error:
                problem = error
        problem, self.base = distributed.from_main((problem, base))  # type: ignore[misc]
        if problem is not None:
            raise problem
        splits = ["train"] + (["val"] if config.train.val_samples else [])
        self.indexes = prepare.check_data(prepare.data_folder(config), splits)
        self.processor = BACKBONES[config.model.backbone].processor(self.base, config.prompt, config.model.revision)
        needs_patches = config.latent.selection != "none" and any(s.latents for s in config.curriculum.stages)
        if needs_patches:
            for index in self.indexes.values():
                prepare.check_patches(index, self.processor, config.latent.num_patches)
        self.builder = RowBuilder(self.processor, config.prompt, config.latent.num_patches if needs_patches else 0)
        self.base_hash = ""
        if config.model.lora or config.model.freeze_vision:
            found = prepare.base_hash(self.base) if self.world.main else None
            self.base_hash = str(distributed.from_main(found))

    def _build(self) -> None:
        plan, config = self.plan, self.config
        tokenizer = self.processor.tokenizer
        self.engine = build_engine(config, plan.ds, self.base, plan.triangle, tokenizer, self.device)
        if plan.start is not None:
            self._load()
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters() if p.requires_grad)
        every = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        stage = plan.ds["zero_optimization"]["stage"]
        self.log.info("ZeRO-%d on %d ranks (%s)", stage, self.world.size, self.device.type)
        self.log.info("batch: %s; loss norm %s", plan.triangle, config.optim.loss_norm)
        self.log.info("parameters: %s trained of %s", f"{trained:,}", f"{every:,}")

    def _load(self) -> None:
        start = self.plan.start
        assert start is not None
        for name, ours, theirs in (
            ("the training split", self.indexes["train"].index_hash, start.state.index_hash),
            ("the base model", self.base_hash, start.state.base_hash),
        ):
            if ours != theirs:
                raise UserError(f"{name} is not the one that {start.path} was trained with; choose another --out")
        self.checkpoints.load(self.engine, start, self.world, self.without_frozen)
        self.log.info("resumed from %s", start.path)

    @property
    def without_frozen(self) -> bool:
        """Whether checkpoints leave out frozen weights, which the base still has."""
        return bool(self.config.model.lora or self.config.model.freeze_vision)

    def steps_of(self, stage: int) -> StageSteps:
        """The data of a stage."""
        config, triangle = self.config, self.plan.triangle
        share = Share(self.world.rank, self.world.size, triangle.global_batch, triangle.micro_batch)
        return StageSteps(
            self.indexes["train"], self.builder, config.curriculum, stage, share, config.train.seed,
            config.data.last_batch,
        )  # fmt: skip

    def train(self) -> None:
        """Every stage of the plan, in order."""
        if not self.plan.stages:
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
        self.log.info("stage %d: %d latent steps, %d steps of the rationale skipped, steps %d to %d, %d samples an epoch",
                      stage, shown.latents, shown.skip, start, len(steps), steps.steps_per_epoch * train.global_batch)  # fmt: skip
        progress, best = Progress(start, len(steps)), self._best(stage)
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
                best = self._validate(stage, done, global_step, best, steps)
            if last or (train.checkpoint_every and done % train.checkpoint_every == 0):
                self._save(stage, done, len(steps), before, steps)
        self._end_stage(stage, global_step=before + len(steps))

    # ---- the update -------------------------------------------------------------------------------------------
    def train_step(self, micro_batches: list[Batch], lr: float, global_step: int, watch: Stopwatch) -> StepResult:
        """One optimizer step: forward, backward, step for each micro-batch; DeepSpeed updates at the last."""
        engine, triangle, norm = self.engine, self.plan.triangle, self.config.optim.loss_norm
        # dropout depends on (seed, step, rank) alone, so that a resumed run draws what the first would have
        torch.manual_seed(((self.config.train.seed << 32) + global_step) * 65536 + self.world.rank)
        set_hyperparameters(engine, self.config.optim, lr)
        labels = [int(batch.target_mask.sum()) for batch in micro_batches]
        mine = [sum(labels), sum(b.columns for b in micro_batches), sum(len(b.bad) for b in micro_batches),
                sum(b.dropped_steps for b in micro_batches)]  # fmt: skip
        everywhere, columns, bad, dropped = (int(n) for n in total(mine, self.device))
        losses, statistics = torch.zeros((), device=self.device), {}
        for batch, labels_here in zip(micro_batches, labels, strict=True):
            with watch("forward"):
                nll, sums = engine(batch.to(self.device))
            with watch("backward"):
                loss = nll * loss_scale(norm, labels_here, everywhere, triangle)
                engine.backward(loss)
            with watch("step"):
                engine.step()
            losses += loss.detach().float() / (triangle.world * triangle.accumulation)
            statistics = {name: statistics.get(name, 0.0) + value for name, value in sums.items()}
        names = sorted(statistics)
        loss, *sums = total([float(losses), *(float(statistics[name]) for name in names)], self.device)
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        self._note_bad(micro_batches, bad)
        return StepResult(loss, grad_norm, everywhere, columns, bad, dropped, dict(zip(names, sums, strict=True)))

    def _note_bad(self, micro_batches: list[Batch], bad: int) -> None:
        """Log samples that could not be used; stop past `data.max_bad`."""
        for batch in micro_batches:
            for line in batch.bad:
                self.log.warning("skipped %s", line)
        self.bad_samples += bad
        if self.bad_samples > self.config.data.max_bad:
            raise UserError(
                f"{self.bad_samples} samples could not be used, more than data.max_bad {self.config.data.max_bad};"
                f" their keys and reasons are in {self.out / 'logs'}"
            )

    # ---- what happens around it -------------------------------------------------------------------------------
    def _report(
        self, stage: int, done: int, global_step: int, lr: float, r: StepResult, watch: Stopwatch, progress: Progress
    ) -> None:
        seconds = sum(watch.seconds.values())
        s, latent_steps = r.statistics, max(1.0, r.statistics["latent_steps"])
        self.monitor.scalars(
            global_step,
            {
                "train/loss": r.loss,
                "train/lr": lr,
                "train/grad_norm": r.grad_norm,
                "speed/tokens_per_s": r.columns / seconds,
                "speed/samples_per_s": self.plan.triangle.global_batch / seconds,
                **{f"time/{phase}": value for phase, value in watch.seconds.items()},
                **memory_gb(self.device),
                "curriculum/stage": stage,
                "curriculum/latents": self.config.curriculum.stages[stage].latents,
                "latent/norm": s["latent_norm"] / latent_steps,
                "latent/selection_entropy": s["selection_entropy"] / latent_steps,
                "latent/coverage": s["coverage"] / max(1.0, s["rows_with_latents"]),
                "data/bad_samples": self.bad_samples,
                "data/dropped_steps": r.dropped_steps,
            },
        )
        self.log.info(
            "stage %d step %s, loss %.4f, gradient norm %.2f, lr %.1e, %.0f tokens/s",
            stage, progress.line(done), r.loss, r.grad_norm, lr, r.columns / seconds,
        )  # fmt: skip

    def val_due(self, done: int, last: bool) -> bool:
        """Whether to validate after step `done` of a stage."""
        train = self.config.train
        return train.val_samples > 0 and (last or bool(train.validate_every and done % train.validate_every == 0))

    def _validate(self, stage: int, done: int, global_step: int, best: float, steps: StageSteps) -> float:
        config, share = self.config, steps.share
        decode = Share(share.rank, share.world, share.global_batch, config.train.val_batch)
        shown = config.curriculum.stages[stage]
        data = ValidationSet.of(
            self.indexes["val"], self.builder, shown, config.curriculum.groups, config.train.val_samples, decode
        )
        found = validate(self.engine, data, self.builder, config.eval.max_new_tokens, self.device)
        self.monitor.scalars(global_step, found)
        self.log.info("stage %d step %d: validation loss %.4f, accuracy %.3f, %.1f autoregressive steps",
                      stage, done, found["val/loss"], found["val/accuracy"], found["val/autoregressive_steps"])  # fmt: skip
        if found["val/accuracy"] <= best:
            return best
        checkpoint = self._save(stage, done, len(steps), sum(len(self.steps_of(s)) for s in range(stage)), steps)
        if self.world.main:
            best_file = {"checkpoint": checkpoint, "step": done, **found}
            write_atomic(self.out / f"best-stage{stage}.json", json.dumps(best_file, indent=1) + "\n")
        return found["val/accuracy"]

    def _best(self, stage: int) -> float:
        path = self.out / f"best-stage{stage}.json"
        return json.loads(path.read_text())["val/accuracy"] if path.exists() else -1.0

    def _save(self, stage: int, done: int, length: int, before: int, steps: StageSteps) -> str:
        """Checkpoint after step `done`; once however often it is asked for."""
        self.lease.check()
        state = RunState(
            stage=stage,
            step=done,
            stage_steps=length,
            global_step=before + done,
            samples=done * self.plan.triangle.global_batch,
            world=self.world.size,
            zero_stage=self.plan.ds["zero_optimization"]["stage"],
            index_hash=self.indexes["train"].index_hash,
            base_hash=self.base_hash,
            config_hash=config_hash(self.config),
        )
        newest = self.checkpoints.newest(stage)
        if newest is not None and newest.state == state:
            return newest.path.name
        began = time.monotonic()
        checkpoint = self.checkpoints.save(self.engine, state, self.world, self.without_frozen)
        self.log.info("checkpoint %s (%.1f s)", checkpoint.path, time.monotonic() - began)
        return checkpoint.path.name

    def _end_stage(self, stage: int, global_step: int) -> None:
        """Export and the marker that says a stage is complete."""
        config = self.config
        export = config.train.export == "stages" or (
            config.train.export == "last" and stage == len(config.curriculum.stages) - 1
        )
        folder = self.out / "export" / f"stage{stage}"
        if export:
            model = self.engine.module
            weights = gathered_weights(model.backbone.vlm, self.world.main)
        if self.world.main:
            if export:
                write_export(model, weights, self.processor, config, stage, folder, self.base)
            done = {"stage": stage, "global_step": global_step, "export": str(folder) if export else None}
            write_atomic(self.out / f"stage{stage}.done", json.dumps(done) + "\n")
        distributed.barrier()
        self.log.info("stage %d is done%s", stage, f"; exported to {folder}" if export else "")


def entry() -> None:
    """Run the command so that of all ranks only the first tells a user's mistake."""
    if World.from_environment().main:
        return cli.run(main)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            cli.run(main)
    except SystemExit as end:
        if end.code == 2:
            time.sleep(30)  # a launcher stops all ranks at the first exit: rank 0 must have spoken by then
        raise


if __name__ == "__main__":
    entry()
