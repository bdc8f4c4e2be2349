"""Checkpoints of a run: DeepSpeed's own files, our state beside them, complete or absent.

    checkpoints/stage1-step000200/     DeepSpeed's files of all ranks
        state.json                     where the run stood: stage, step, world, hashes
        manifest.json                  size and hash of every file, written last
    checkpoints/latest                 name of the newest one, for DeepSpeed's own tools (zero_to_fp32.py)
    checkpoints/damaged-stage1-...     one that was not as written: kept, and never used again
    checkpoints/writing-TOKEN/         one that is being written, by the holder of that lease
    checkpoints/writing-stage0-.../    one that is being removed

A checkpoint is written under another name, each rank's files by itself (writing.py), hashed, renamed, and only then
named in `latest`.  DeepSpeed unpickles its own files, so nothing is loaded whose hash is not the one that was written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed

from data_prep.errors import UserError
from data_prep.files import write_atomic
from pipeline.distributed import World
from pipeline.keeping.state import Checkpoint, RunState, read_state, refuse_damaged, write_state
from pipeline.keeping.writing import Files, entry_of, handed_to, part_of

WRITING = "writing"
"""Begins the name of a folder of a checkpoint that is not complete."""
ASIDE = "damaged-"
"""Begins the name of a checkpoint that was set aside."""


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, fence: Callable[[], None] = lambda: None) -> None:
        """fence: called before every change; raises where the run folder is another trainer's (`Lease.check`)."""
        self.run, self.folder, self._fence = run, run / "checkpoints", fence

    def all(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first, but for those of `unreadable`.

        Raises UserError for one that says, as it was written, what this version does not understand.
        """
        found = [Checkpoint(path, state) for path, state in self._states() if state is not None]
        return sorted(found, key=lambda c: (c.state.stage, c.state.step))

    def to_go_back_to(self) -> list[Checkpoint]:
        """Those that were not written amid steps that went wrong, oldest first."""
        return [checkpoint for checkpoint in self.all() if not checkpoint.state.guard.in_a_row]

    def unreadable(self) -> list[Path]:
        """Complete checkpoints whose state.json is damaged: nothing tells where they belong."""
        return sorted(path for path, state in self._states() if state is None)

    def _states(self) -> Iterator[tuple[Path, RunState | None]]:
        for path in self.folder.glob("stage*-step*"):
            if (path / "manifest.json").is_file():
                yield path, read_state(path)

    def set_aside(self, path: Path) -> Path:
        """Give a damaged checkpoint a name under which nothing finds it; returns its new path."""
        aside = path.with_name(ASIDE + path.name)
        while aside.exists():
            aside = aside.with_name(aside.name + "+")
        self._fence()
        os.rename(path, aside)
        latest = self.folder / "latest"
        if latest.is_file() and latest.read_text().strip() == path.name:
            left = self.all()
            write_atomic(latest, left[-1].path.name + "\n") if left else latest.unlink()
        return aside

    def refuse_none_left(self) -> None:
        """Raise UserError where only damaged checkpoints are left: a run must not begin anew by itself."""
        aside = sorted(self.folder.glob(f"{ASIDE}*"))
        if (aside or self.unreadable()) and not self.all():
            named = ", ".join(path.name for path in [*aside, *self.unreadable()])
            raise UserError(
                f"{self.run} has no sound checkpoint, only damaged ones ({named}); to begin anew, choose another --out"
                f" or remove these from {self.folder}"
            )

    def path_of(self, state: RunState) -> Path:
        return self.folder / f"stage{state.stage}-step{state.step:06d}"

    def newest(self) -> dict[int, Checkpoint]:
        """The newest checkpoint of each stage that has any."""
        return {checkpoint.state.stage: checkpoint for checkpoint in self.all()}

    def best(self, stage: int) -> tuple[str, float] | None:
        """(checkpoint, accuracy) of best-stageN.json; nothing where it is damaged or its checkpoint is gone."""
        try:
            named = json.loads((self.run / f"best-stage{stage}.json").read_text())
            name, accuracy = str(named["checkpoint"]), float(named["val/accuracy"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (name, accuracy) if (self.folder / name / "manifest.json").is_file() else None

    def name_best(self, state: RunState, found: dict[str, float]) -> None:
        """Say in best-stageN.json that the checkpoint of `state` did best in its stage, and what validation found."""
        named = {"checkpoint": self.path_of(state).name, "step": state.step, **found}
        self._fence()
        write_atomic(self.run / f"best-stage{state.stage}.json", json.dumps(named, indent=1) + "\n")

    def write(
        self,
        engine: deepspeed.DeepSpeedEngine,
        state: RunState,
        world: World,
        without_frozen: bool,
        token: str,
        background: bool,
    ) -> Files:
        """Write this rank's files of a checkpoint, or begin to (`background`); all ranks call it together.

        token: of the lease.  What goes wrong with the files is in `Files.error`; when all ranks' are done without,
        rank 0 makes them a checkpoint by `commit`.
        """
        folder = self.folder / f"{WRITING}-{token}"
        files = Files(folder, world.rank, background, self._fence if world.main else lambda: None)
        if world.main:
            shutil.rmtree(folder, ignore_errors=True)
            files.add(lambda: write_state(folder, state), folder / "state.json")
        with handed_to(files, engine):  # which begins with a barrier
            engine.save_checkpoint(
                str(self.folder), tag=folder.name, save_latest=False, exclude_frozen_parameters=without_frozen
            )
        files.close()
        return files

    def commit(self, folder: Path, state: RunState, world: World, best: dict[str, float] | None = None) -> Checkpoint:
        """Make what all ranks have written to `folder` a checkpoint: one manifest, its own name, `latest`.

        Called by rank 0 alone.  best: what validation found, where it was the stage's best.
        """
        parts = [part_of(folder, rank) for rank in range(world.size)]
        manifest = {name: entry for part in parts for name, entry in json.loads(part.read_bytes()).items()}
        for file in set(folder.rglob("*")) - {folder / name for name in manifest} - set(parts):
            if file.is_file():  # written by DeepSpeed itself: what it keeps on NVMe
                manifest[str(file.relative_to(folder))] = entry_of(file)
        self._fence()
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for part in parts:
            part.unlink()
        if best is not None:
            # before the checkpoint: killed in between, the next start ignores the name of one that is not there, and
            # validates this step again
            self.name_best(state, best)
        path = self.path_of(state)
        self._fence()
        shutil.rmtree(path, ignore_errors=True)
        os.rename(folder, path)
        self._fence()
        write_atomic(self.folder / "latest", path.name + "\n")
        return Checkpoint(path, state)

    def remove_unfinished(self) -> None:
        """Remove what starts left that were killed while writing or removing; called by the holder of the lease."""
        for folder in self.folder.glob(f"{WRITING}*"):
            self._fence()
            shutil.rmtree(folder, ignore_errors=True)

    def load(
        self, engine: deepspeed.DeepSpeedEngine, checkpoint: Checkpoint, world: World, without_frozen: bool
    ) -> None:
        """Put a checkpoint's parameters and optimizer into the engine; all ranks call it together.

        Raises UserError, on every rank, where a file is not as it was written.
        """
        refuse_damaged(checkpoint, world)
        loaded, _ = engine.load_checkpoint(
            str(self.folder),
            tag=checkpoint.path.name,
            load_module_strict=not without_frozen,
            load_lr_scheduler_states=False,
        )
        assert loaded is not None, f"DeepSpeed found nothing in {checkpoint.path}"

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep`, stage ends, those that validation found best, and what to roll back to."""
        found = self.all()
        protected = {best[0] for stage in {c.state.stage for c in found} if (best := self.best(stage))}
        inside = [c for c in found if not c.state.stage_done and c.path.name not in protected]
        kept = [*inside[-keep:], *self.to_go_back_to()[-1:]]
        for checkpoint in (c for c in inside if c not in kept):
            self._fence()
            # under that name it is no checkpoint any more, should the removal be cut short
            going = checkpoint.path.with_name(f"{WRITING}-{checkpoint.path.name}")
            with contextlib.suppress(OSError):  # somebody reads it on NFS, say: the next start removes what is left
                os.rename(checkpoint.path, going)
                shutil.rmtree(going)
