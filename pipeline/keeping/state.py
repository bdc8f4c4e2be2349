"""Where a run stood at a checkpoint, and whether the files of one are as they were written."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from data_prep.errors import UserError
from data_prep.files import sha256
from pipeline import distributed
from pipeline.distributed import World
from pipeline.keeping.fingerprint import Fingerprints
from pipeline.watching.guard import GuardState


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
    epoch: int
    """Epochs of this stage that are complete"""
    seed: int
    """Seed of the order: with stage, samples and index the place in the data, for any number of ranks"""
    world: int
    zero_stage: int
    index_hash: str
    """Training split's index"""
    base_hash: str
    """Base model: tokenizer and processor, and the weights where frozen ones are not in the checkpoint"""
    settings_hash: str
    """Settings that the numbers depend on (pipeline.plan.fixed_settings)"""
    weights: Fingerprints
    """Compared with what was loaded, on whatever ranks"""

    guard: GuardState = GuardState()
    """Steps that went wrong, and what the next are judged by"""

    @property
    def stage_done(self) -> bool:
        return self.step >= self.stage_steps


_STATE = TypeAdapter(RunState)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    state: RunState
    checked: bool = False
    """Whether all files were found to be as written"""

    def damaged(self, rank: int = 0, world: int = 1) -> str:
        """Name of a file that is not as written, or nothing; ranks look at every world-th file."""
        try:
            manifest = json.loads((self.path / "manifest.json").read_text())
            expected = sorted((name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return "manifest.json"
        for name, size, digest in expected[rank::world]:
            if not as_written(self.path / name, size, digest):
                return name
        return ""


def as_written(file: Path, size: int, digest: str) -> bool:
    """Whether a file has the size and SHA-256 that it was written with; one that cannot be read has not."""
    try:
        return file.stat().st_size == size and sha256(file) == digest
    except OSError:
        return False


def damaged_file(checkpoint: Checkpoint, world: World) -> str:
    """Name of a file that is not as it was written, or nothing; all ranks call it together and get the same."""
    if checkpoint.checked:
        return ""
    return next(filter(None, distributed.gather(checkpoint.damaged(world.rank, world.size))), "")


def refuse_damaged(checkpoint: Checkpoint, world: World) -> None:
    """Raise UserError, on every rank, where a file is not as it was written; all ranks call it together."""
    if name := damaged_file(checkpoint, world):
        raise UserError(f"checkpoint {checkpoint.path}: {name} is damaged; remove this folder to use the one before")


def write_state(folder: Path, state: RunState) -> None:
    """Write state.json to a folder, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps(asdict(state), indent=1) + "\n")


def read_state(folder: Path) -> RunState | None:
    """The state.json of a complete checkpoint's folder; nothing where it is damaged.

    Raises UserError for one that says, as it was written, what this version does not understand.
    """
    try:
        return _STATE.validate_json((folder / "state.json").read_bytes())
    except (OSError, ValueError):
        if not _state_as_written(folder):
            return None
    raise UserError(
        f"checkpoint {folder} is of another version of this program, and only that can go on with it; do so, or choose"
        f" another --out"
    )


def _state_as_written(path: Path) -> bool:
    """Whether the state.json of a checkpoint's folder is the one that its manifest names."""
    try:
        entry = json.loads((path / "manifest.json").read_bytes())["state.json"]
        return as_written(path / "state.json", entry["bytes"], entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
