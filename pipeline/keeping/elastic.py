"""Going on from a checkpoint of another number of ranks or another ZeRO stage (`--resume elastic`).

A checkpoint's files are its ranks' shares.  DeepSpeed's Universal Checkpoint has a file for each parameter and moment
instead, which any number of ranks reads.  Rank 0 makes one in the run folder, where it stays until it has been read:

    checkpoints/universal/stage1-step000200-HASH/    HASH: of the checkpoint's manifest
        zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt
        rest.safetensors                             frozen weights and buffers, which DeepSpeed leaves out
        state.json, manifest.json                    as in every checkpoint
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_set_full_fp32_param
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep.errors import UserError, kind_of
from data_prep.files import sha256, write_atomic
from pipeline import distributed
from pipeline.distributed import World
from pipeline.engine import reset_optimizer
from pipeline.keeping.state import Checkpoint, RunState, refuse_damaged, write_state
from pipeline.keeping.writing import entry_of
from pipeline.prepare import in_a_line
from pipeline.watching.watch import run_to_end

REST = "rest.safetensors"


def load(
    engine: deepspeed.DeepSpeedEngine,
    checkpoint: Checkpoint,
    world: World,
    without_frozen: bool,
    log: logging.Logger,
) -> None:
    """Put a checkpoint's parameters and optimizer into the engine; all ranks call it together.

    The optimizer begins anew, and the log says so, where the two ZeRO stages name its state differently (3 and below).
    without_frozen: frozen weights are not in the checkpoint; the engine has them from the base, whose hash is the same.
    Raises UserError, on every rank, where a file is not as it was written or the checkpoint cannot be converted.
    """
    state, stage = checkpoint.state, engine.zero_optimization_stage()
    refuse_damaged(checkpoint, world)
    converted = convert(checkpoint, world, log)
    refuse_damaged(converted, world)
    alike = (state.zero_stage == 3) == (stage == 3)
    read(engine, converted.path, optimizer=alike)
    put_back(engine.module, converted.path / REST, without_frozen)
    log.info("%d ranks under ZeRO-%d go on from %d under ZeRO-%d", world.size, stage, state.world, state.zero_stage)
    if not alike:
        log.info("the optimizer begins anew: ZeRO-%d cannot read its state from ZeRO-%d", stage, state.zero_stage)
    distributed.barrier()  # all have read it before it can go


def remove_converted(run: Path) -> None:
    """Remove what `load` made; also what one that was killed left behind."""
    shutil.rmtree(run / "checkpoints" / "universal", ignore_errors=True)


# ---- making a universal checkpoint ----------------------------------------------------------------------------
def convert(checkpoint: Checkpoint, world: World, log: logging.Logger) -> Checkpoint:
    """The universal form of a sound checkpoint, made where it is not there; all ranks call it together."""
    source = checkpoint.path
    folder = source.parent / "universal"
    path = folder / f"{source.name}-{sha256(source / 'manifest.json')[:12]}"
    problem: UserError | None = None
    writing, there = folder, False
    if world.main:
        there = (path / "manifest.json").is_file()
        if not there:
            shutil.rmtree(folder, ignore_errors=True)
            # of its own name: the converter of a start that was killed may still be writing
            writing = folder / f"writing-{os.urandom(4).hex()}"
            began = time.monotonic()
            try:
                write_universal(checkpoint, writing)
                write_state(writing, checkpoint.state)
                log.info("converted %s for any number of ranks (%.1f s)", source, time.monotonic() - began)
            except Exception as error:  # torch, safetensors and a full disk raise what they like; the others wait
                problem = error if isinstance(error, UserError) else kind_of(error)(_told(source, in_a_line(error)))
                shutil.rmtree(folder, ignore_errors=True)
    problem, writing, there = distributed.from_main((problem, writing, there))
    if problem is not None:
        raise problem
    return Checkpoint(path, checkpoint.state) if there else complete(writing, path, checkpoint.state, world)


def _told(source: Path, reason: str) -> str:
    return f"{source} cannot be converted for another number of ranks: {reason}"


def complete(writing: Path, path: Path, state: RunState, world: World) -> Checkpoint:
    """Make what rank 0 wrote to `writing` a checkpoint: hashes, its own name; all ranks call it together."""
    files = sorted(p for p in writing.rglob("*") if p.is_file())[world.rank :: world.size]
    mine = {str(p.relative_to(writing)): entry_of(p) for p in files}
    manifests = distributed.gather(mine)
    if world.main:
        manifest = {name: entry for part in manifests for name, entry in part.items()}  # type: ignore[attr-defined]
        write_atomic(writing / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        os.rename(writing, path)
    distributed.barrier()
    return Checkpoint(path, state)


def write_universal(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the universal form of a checkpoint to `folder`.  Raises UserError with the converter's reason."""
    source, state = checkpoint.path, checkpoint.state
    folder.mkdir(parents=True)
    workers = str(min(4, state.world, os.cpu_count() or 1))
    # a process of its own, started in the folder above: it takes paths for patterns
    status, said = run_to_end(
        [
            sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
            "--input_folder", source.name, "--output_folder", str(folder.relative_to(source.parent)),
            "--num_extract_workers", workers, "--num_merge_workers", workers,
        ],
        cwd=source.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    if status:
        lines = [line for line in said.splitlines() if line.strip()] or [f"status {status}"]
        raise UserError(_told(source, lines[-1]))
    for copy in folder.glob("*_model_states.pt"):
        copy.unlink()
    keep_little(folder / "zero" / "optimizer_state.pt")
    save_file(rest_of(source, state.zero_stage, state.world), folder / REST)


def keep_little(path: Path) -> None:
    """Take rank 0's share of the moments out of the optimizer's common state, which every rank is going to read."""
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    saved.pop("fp32_flat_groups", None)
    inner = saved.get("optimizer_state_dict")  # ZeRO-3 only
    if inner:
        inner["state"] = {group: {"step": state["step"]} for group, state in inner["state"].items()}
    slim = path.with_name("slim.pt")
    torch.save(saved, slim)
    os.replace(slim, path)


def rest_of(checkpoint: Path, zero_stage: int, world: int) -> dict[str, torch.Tensor]:
    """Frozen weights and saved buffers of a checkpoint's folder, whole: what DeepSpeed does not convert or load.

    zero_stage, world: of its writers.
    """
    if zero_stage < 3:
        saved = _model_states(checkpoint / "mp_rank_00_model_states.pt")
        elsewhere = {name for group in saved["param_shapes"] for name in group} | set(saved["shared_params"])
        found = {name: value for name, value in saved["module"].items() if name not in elsewhere}
    else:
        ranks = [_model_states(checkpoint / f"zero_pp_rank_{r}_mp_rank_00_model_states.pt") for r in range(world)]
        found = {name: ranks[0]["module"][name] for name in ranks[0]["buffer_names"]}
        for name, shape in (ranks[0]["frozen_param_shapes"] or {}).items():
            flat = torch.cat([rank["frozen_param_fragments"][name] for rank in ranks])
            found[name] = flat[: shape.numel()].view(shape)
    return {name: value.clone().contiguous() for name, value in found.items()}


def _model_states(path: Path) -> dict[str, Any]:
    """DeepSpeed's own file, unpickled: to be called only where its hash was compared."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


# ---- reading it -----------------------------------------------------------------------------------------------
def read(engine: deepspeed.DeepSpeedEngine, folder: Path, optimizer: bool) -> None:
    """Put trained parameters, and moments and step count if `optimizer`, into the engine; all ranks together."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        zero.checkpoint_event_prologue()
    if not optimizer:
        reset_optimizer(engine)
    if optimizer or stage == 3:
        zero.load_state_dict(
            state_dict_list=None,
            load_optimizer_states=optimizer,
            load_from_fp32_weights=True,
            checkpoint_folder=str(folder),
        )
    else:
        for name, parameter in trained(engine.module):
            value = torch.load(folder / "zero" / name / "fp32.pt", map_location="cpu", weights_only=True)
            safe_set_full_fp32_param(parameter, value)
    if stage == 3:
        zero.checkpoint_event_epilogue()
        # DeepSpeed gives all groups one and the same count, which each of them would raise at every step
        for state in zero.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
    else:
        zero.update_lp_params()


def trained(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that the optimizer has."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def put_back(module: torch.nn.Module, file: Path, without_frozen: bool) -> None:
    """Frozen weights and buffers from `rest_of`'s file into the module; all ranks call it together."""
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    with safe_open(file, "pt") as rest, torch.no_grad():
        names = set(rest.keys())
        assert without_frozen or frozen.keys() <= names, f"{file} lacks {sorted(frozen.keys() - names)[:3]}"
        for name, parameter in frozen.items():
            if name in names:
                with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(rest.get_tensor(name))
        for name, buffer in module.named_buffers():
            if name in names:
                buffer.copy_(rest.get_tensor(name))
