"""Set up what training runs on: data and base model found or made, checks that need them, the engine, its state."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from pipeline import distributed, prepare
from pipeline.agreement import agreed, facts_of_inputs
from pipeline.backbones import BACKBONES
from pipeline.config import LoraConfig, RunConfig
from pipeline.data.fitting import all_stages
from pipeline.data.loader import Share, StageSteps
from pipeline.data.mixture import Index, Mixture
from pipeline.distributed import World
from pipeline.engine import Built, build_engine, expected_size, use_of
from pipeline.keeping.fingerprint import check_ranks
from pipeline.keeping.state import Checkpoint
from pipeline.memory import Forecast, ModelSize, forecast, smallest_room, snapshot_bytes
from pipeline.memory_advice import problem_of_states, warning_of_activations
from pipeline.model import resolve_dtype
from pipeline.plan import Plan, write_config
from pipeline.prompt import RowBuilder
from pipeline.registry import load_plugin


@dataclass(frozen=True)
class Parts:
    """What a run trains with."""

    engine: Any
    """DeepSpeed's, around a LatentModel"""
    processor: Any
    builder: RowBuilder
    indexes: dict[str, Index]
    """train, and val where validation is on"""
    stages: list[StageSteps]
    """This rank's data of every stage of the curriculum"""
    base: Path | str
    """Folder or hub id of the base model"""
    base_hash: str
    """Identity of what checkpoints need of the base model"""


def without_frozen(config: RunConfig) -> bool:
    """Whether checkpoints leave out frozen weights, which the base still has."""
    return bool(config.model.lora or config.model.freeze_vision)


def build_parts(plan: Plan, base: Path | str, world: World, device: torch.device, log: logging.Logger) -> Parts:
    """All of it, from `make_missing`'s base model; ranks call it together.

    Raises UserError, on every rank, where something does not fit.
    """
    config = plan.config
    with agreed() as facts:
        indexes = prepare.check_data(config)
        processor = BACKBONES[config.model.backbone].processor(base, config.prompt, config.model.revision)
        taken = config.latent.patches_taken
        if taken and any(stage.latents for stage in config.curriculum.stages):
            for index in indexes.values():
                prepare.check_patches(index, processor, taken)
        facts |= facts_of_inputs(indexes, base, config.model.revision)
    size, memory = check_memory(plan, base, processor.tokenizer, device, log)
    builder = RowBuilder(processor, config.prompt, taken)
    share = Share(world.rank, world.size, plan.triangle.global_batch, plan.triangle.micro_batch)
    stages = all_stages(
        indexes["train"], builder, config.curriculum, share, config.train.seed, config.data, log, plan.out / "where"
    )
    base_hash = prepare.base_hash(base, without_frozen(config), config.model.revision) if world.main else ""
    base_hash = distributed.from_main(base_hash)
    for start in plan.starts.values():
        check_inputs(start, indexes["train"], base_hash)
    built = build_engine(config, plan.ds, base, plan.triangle, processor.tokenizer, device, size, memory)
    log_decisions(plan, built, device, log)
    log.info("fingerprints of the model as it was built: %s", check_ranks(built.engine))
    return Parts(built.engine, processor, builder, indexes, stages, base, base_hash)


def check_memory(
    plan: Plan, base: Path | str, tokenizer: Any, device: torch.device, log: logging.Logger
) -> tuple[ModelSize, Forecast]:
    """The model's size and what it will take, before it is loaded; ranks call it together.

    Raises UserError, on every rank, where not even the first step can be trained, unless train.memory_check is warn.
    """
    config = plan.config
    dtype = resolve_dtype(config.model.dtype, device)
    size, use = expected_size(config, base, dtype, tokenizer), use_of(config, plan.ds, plan.triangle)
    room = smallest_room(device)
    log.info("parameters: %s trained of %s", f"{size.trained:,}", f"{size.parameters:,}")
    memory = forecast(size, use, room)
    if not memory.states_fit:
        lora = config.model_copy(update={"model": config.model.model_copy(update={"lora": LoraConfig()})})
        smaller = None if config.model.lora else expected_size(lora, base, dtype, tokenizer)
        problem = problem_of_states(size, use, room, smaller)
        if config.train.memory_check == "error":
            raise UserError(problem)
        log.warning(problem)
    if warning := warning_of_activations(size, use, room):
        log.warning(warning)
    return size, memory


def make_missing(plan: Plan, world: World, log: logging.Logger, fence: Callable[[], None]) -> Path | str:
    """Rank 0 makes data and base model where they are missing; a mistake it finds is raised on every rank.

    fence: raises where the run folder is another trainer's (`Lease.check`).
    """
    problem: UserError | None = None
    base: Path | str = ""
    if world.main:
        try:
            prepare.make_data(plan.config, log.info)
            base = prepare.make_base(plan.config, plan.out, log.info)
            fence()
            write_config(plan.config, plan.out)
        except UserError as error:
            problem = error
    problem, base = distributed.from_main((problem, base))
    if problem is not None:
        raise problem
    return base


def check_inputs(start: Checkpoint, index: Index, base_hash: str) -> None:
    """Raise UserError where data or base model are not those that a checkpoint was trained with."""
    data = "data.mix (its folders, their order and weights)" if isinstance(index, Mixture) else "the training split"
    for name, ours, theirs in (
        (data, index.index_hash, start.state.index_hash),
        ("the base model", base_hash, start.state.base_hash),
    ):
        if ours != theirs:
            raise UserError(f"{name} is not the one that {start.path} was trained with; choose another --out")


def log_decisions(plan: Plan, built: Built, device: torch.device, log: logging.Logger) -> None:
    """What was decided for this start."""
    stage, memory = plan.ds["zero_optimization"]["stage"], built.forecast
    log.info("ZeRO-%d on %d ranks (%s)", stage, plan.triangle.world, device.type)
    log.info("batch: %s; loss norm %s", plan.triangle, plan.config.optim.loss_norm)
    log.info("memory a rank, of %.1f GB: about %.2f GB for parameters and optimizer, at most %.2f GB for activations",
             memory.room.device / 1e9, memory.states / 1e9, memory.activations / 1e9)  # fmt: skip
    if memory.offloaded:
        log.info("offloaded: %.2f GB a rank, of %.1f GB", memory.offloaded / 1e9, memory.room.host / 1e9)
    if memory.gathered:
        how = "stay gathered between passes" if built.resident else "are gathered anew by every pass"
        log.info("parameters %s; a whole copy takes %.2f GB", how, memory.gathered / 1e9)
    if plan.config.train.async_checkpoints:
        copied = snapshot_bytes(built.size, stage, plan.triangle.world, without_frozen(plan.config))
        log.info("while a checkpoint is written, its copy takes %.2f GB of the CPU memory of a rank", copied / 1e9)
    log.info("method: %s", method_line(plan.config))
    log.info("schedule: %s", built.schedule)


def method_line(config: RunConfig) -> str:
    """The parts of a latent step and what else changes its mathematics."""
    latent, taken = config.latent, config.latent.patches_taken
    weight = "" if latent.auxiliary == "none" else f" times {latent.auxiliary_weight:g}"
    patches = "all" if taken is None else taken
    line = (
        f"feedback {latent.feedback}, selection {latent.selection} ({patches} patches a step, by {latent.patch_order}),"
        f" weighting {latent.weighting}, auxiliary loss {latent.auxiliary}{weight}, count {config.curriculum.count};"
        f" gradient {latent.latent_grad}, positions {latent.positions}"
    )
    if config.plugin:
        plugin = load_plugin(Path(config.plugin))
        line += f"; plugin {plugin.path} (SHA-256 {plugin.sha256[:12]})"
    return line
