"""Checkpoints of a run: DeepSpeed's own files, our state beside them, complete or absent.

    checkpoints/stage1-step000200/     DeepSpeed's files of all ranks
        state.json                     where the run stood: stage, step, world, hashes
        manifest.json                  size and hash of every file, written last
    checkpoints/latest                 name of the newest one, for DeepSpeed's own tools (zero_to_fp32.py)

A checkpoint is written under another name, hashed, renamed, and only then named in `latest`.  DeepSpeed unpickles its
own files, so nothing is loaded whose hash is not the one that was written.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed

from data_prep.errors import UserError
from data_prep.files import parse_json, sha256, write_atomic
from pipeline import distributed
from pipeline.config import load_json
from pipeline.distributed import World

WRITING = "writing"
"""Folder of a checkpoint that is not complete."""


@dataclass(frozen=True)
class RunState:
    """Where a run stands: enough, with the config, to go on at the next sample on any number of workers."""

    stage: int
    step: int
    """Steps of the stage that are done"""
    stage_steps: int
    """Length of the stage"""
    global_step: int
    """Steps of all stages that are done"""
    samples: int
    """Rows of this stage that were consumed"""
    world: int
    zero_stage: int
    index_hash: str
    """Training split's index"""
    base_hash: str
    """Weights that are not in the checkpoint: the base model's files (LoRA), else empty"""

    @property
    def stage_done(self) -> bool:
        return self.step >= self.stage_steps


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: RunState

    def damaged(self, rank: int = 0, world: int = 1) -> str:
        """Name of a file that is not as written, or nothing; ranks look at every world-th file."""
        for name, expected in sorted(_read_manifest(self.path).items())[rank::world]:
            file = self.path / name
            if not file.is_file() or file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
                return name
        return ""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "checkpoints"

    def all(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        found = []
        for path in self.folder.glob("stage*-step*"):
            if not (path / "manifest.json").is_file():
                continue
            try:
                found.append(Checkpoint(path, RunState(**parse_json((path / "state.json").read_bytes()))))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"checkpoint {path}: state.json cannot be read ({error}); remove the folder") from None
        return sorted(found, key=lambda c: (c.state.stage, c.state.step))

    def path_of(self, state: RunState) -> Path:
        return self.folder / f"stage{state.stage}-step{state.step:06d}"

    def stage_end(self, stage: int) -> Checkpoint | None:
        """The checkpoint that ends `stage`."""
        ends = [c for c in self.all() if c.state.stage == stage and c.state.stage_done]
        return ends[-1] if ends else None

    def newest(self, stage: int) -> Checkpoint | None:
        """The newest checkpoint within `stage`."""
        inside = [c for c in self.all() if c.state.stage == stage]
        return inside[-1] if inside else None

    def save(
        self, engine: deepspeed.DeepSpeedEngine, state: RunState, world: World, without_frozen: bool
    ) -> Checkpoint:
        """Write a checkpoint; all ranks call it together."""
        writing = self.folder / WRITING
        if world.main:
            shutil.rmtree(writing, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        distributed.barrier()
        engine.save_checkpoint(
            str(self.folder), tag=WRITING, save_latest=False, exclude_frozen_parameters=without_frozen
        )
        distributed.barrier()
        if world.main:
            (writing / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n")
        distributed.barrier()
        files = sorted(p for p in writing.rglob("*") if p.is_file())[world.rank :: world.size]
        mine = {str(p.relative_to(writing)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
        path = self.path_of(state)
        manifests = distributed.gather(mine)
        if world.main:
            manifest = {name: entry for part in manifests for name, entry in part.items()}  # type: ignore[attr-defined]
            write_atomic(writing / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            shutil.rmtree(path, ignore_errors=True)
            os.rename(writing, path)
            write_atomic(self.folder / "latest", path.name + "\n")
        distributed.barrier()
        return Checkpoint(path, state)

    def load(
        self, engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, world: World, without_frozen: bool
    ) -> None:
        """Put a checkpoint's parameters and optimizer into the engine; all ranks call it together.

        Raises UserError, on every rank, where a file is not as it was written.
        """
        damaged = [name for name in distributed.gather(checkpoint.damaged(world.rank, world.size)) if name]
        if damaged:
            raise UserError(f"checkpoint {checkpoint.path}: {damaged[0]} is damaged; remove it to use the one before")
        loaded, _ = engine.load_checkpoint(
            str(self.folder),
            tag=checkpoint.path.name,
            load_module_strict=not without_frozen,
            load_lr_scheduler_states=False,
        )
        assert loaded is not None, f"DeepSpeed found nothing in {checkpoint.path}"

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep`, stage ends and those that validation found best."""
        protected = {read_best(best)["checkpoint"] for best in self.run.glob("best-stage*.json")}
        inside = [c for c in self.all() if not c.state.stage_done and c.path.name not in protected]
        for checkpoint in inside[:-keep]:
            # without its manifest it is no checkpoint any more, should the removal be cut short
            (checkpoint.path / "manifest.json").unlink()
            shutil.rmtree(checkpoint.path)


def read_best(path: Path) -> dict[str, Any]:
    """What a best-stageS.json says.  Raises UserError for a damaged one."""
    best = load_json(path, "best checkpoint")
    if not isinstance(best.get("checkpoint"), str) or not isinstance(best.get("val/accuracy"), float | int):
        raise UserError(f"{path} is damaged: it names no checkpoint and accuracy; remove it")
    return best


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Raises UserError for a damaged one."""
    manifest = load_json(path / "manifest.json", "checkpoint")
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in manifest.values()):
        raise UserError(f"{path / 'manifest.json'} is damaged; remove the folder to use the checkpoint before")
    return manifest
