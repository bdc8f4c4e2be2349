"""What one rank writes of a checkpoint: at once, or from a copy in memory on a thread while training goes on.

DeepSpeed gathers what it wants to save and hands it, file by file, to the engine's `checkpoint_engine`.  Ours passes it
on to `Files`, which writes and hashes each, and then says in `manifest.rankN.json`, its last file, what it wrote.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from data_prep.errors import PassingFault, UserError, kind_of
from data_prep.files import sha256, write_atomic


def part_of(folder: Path, rank: int) -> Path:
    """The file of a rank's part of the manifest."""
    return folder / f"manifest.rank{rank}.json"


def entry_of(file: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


class Files:
    """A rank's files of one checkpoint, in the order in which they are added; `close` is the last call.

    The first error ends it: nothing more is written, `error` holds it, and the part of the manifest stays absent.
    """

    def __init__(self, folder: Path, rank: int, background: bool, fence: Callable[[], None]) -> None:
        """background: write on a thread, from `close` on; fence: raises where the run folder is another trainer's."""
        self.folder, self.rank, self.background, self._fence = folder, rank, background, fence
        self.error: Exception | None = None
        self.done = threading.Event()
        """All is written, or has failed"""
        self._jobs: list[tuple[Callable[[], object], Path | None]] = []
        self._manifest: dict[str, dict[str, Any]] = {}
        self._dropped = False
        # no daemon: at the interpreter's end those are stopped in the middle of torch's C++, which may abort
        self._thread = threading.Thread(target=self._work, name="checkpoint")

    def add(self, write: Callable[[], object], path: Path | None = None) -> None:
        """Have `write` called, which makes the file `path` of the checkpoint, or one that is not a part of it."""
        self._jobs.append((write, path))
        if not self.background:
            self._work()

    def close(self) -> None:
        """No more files come."""
        self.add(self._write_part)
        self.add(self.done.set)
        if self.background:
            self._thread.start()

    def wait(self) -> None:
        """Until `done`."""
        if self._thread.ident is not None:
            self._thread.join()

    def drop(self) -> None:
        """Write no further file; returns when the present one has ended."""
        self._dropped = True
        self.wait()

    def _work(self) -> None:
        while self._jobs:
            write, path = self._jobs.pop(0)
            try:
                # the main thread has ended: the process only waits for this one
                if self.error is None and not self._dropped and threading.main_thread().is_alive():
                    self._fence()
                    write()
                    if path is not None:
                        self._flush(path)
            except Exception as error:  # torch's writer, the system and others raise what they like
                self.error = error
            del write  # and with it the copy
        if self.error is not None:
            self.done.set()

    def _flush(self, path: Path) -> None:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        self._manifest[str(path.relative_to(self.folder))] = entry_of(path)

    def _write_part(self) -> None:
        write_atomic(part_of(self.folder, self.rank), json.dumps(self._manifest))


class Handing(CheckpointEngine):
    """DeepSpeed's own checkpoint engine, but what it is to save goes to `Files`."""

    def __init__(self, inner: CheckpointEngine, files: Files) -> None:
        super().__init__()
        self.inner, self.files = inner, files

    def create(self, info: CheckpointCommitInfo) -> None:
        self.inner.create(info)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            self.inner.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.files.error = error

    def save(self, state_dict: Any, path: str) -> None:
        if self.files.background:
            try:
                state_dict = snapshot(state_dict)
            except (RuntimeError, MemoryError) as error:
                self.files.error = error
                return
        self.files.add(partial(self.inner.save, state_dict, path), Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        return self.inner.load(path, map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return bool(self.inner.commit(info))


@contextmanager
def handed_to(files: Files, engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Inside, `engine.save_checkpoint` writes nothing itself, so that no rank fails while others wait for it."""
    inner, scripts = engine.checkpoint_engine, engine._copy_recovery_script
    engine.checkpoint_engine = Handing(inner, files)
    engine._copy_recovery_script = lambda folder: files.add(partial(scripts, folder))
    try:
        yield
    finally:
        engine.checkpoint_engine = inner
        del engine._copy_recovery_script


def snapshot(state: Any) -> Any:
    """A copy in CPU memory, of everything; tensors that share memory share it in the copy.

    So the file that is written from it is, byte for byte, the one that would be written from `state`.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Any] = {}
    for tensor in _tensors(state):
        source = tensor.untyped_storage()
        if source._cdata not in storages:
            storages[source._cdata] = torch.UntypedStorage(source.nbytes(), device="cpu").copy_(source)
        view = torch.empty(0, dtype=tensor.dtype).set_(
            storages[source._cdata], tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        copied = torch.Tensor._make_subclass(type(tensor), view, tensor.requires_grad)
        copied.__dict__.update(tensor.__dict__)
        copies[id(tensor)] = copied
    return copy.deepcopy(state, copies)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def kind_of_failure(error: Exception, folder: Path) -> type[UserError]:
    """What to tell as that a write to `folder` failed: `PassingFault` where its file system cannot be reached.

    torch's writer says why in no way that a program could read; so the folder is tried.
    """
    if not isinstance(error, OSError):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        except OSError as own:
            error = own
    return kind_of(error)


@contextmanager
def full_disk_told(out: Path) -> Iterator[None]:
    """Turn what a full disk makes of a write, in any library, into one line.

    Raises UserError; PassingFault where the disk is away rather than full.
    """
    try:
        yield
    except Exception as error:
        # torch's writer raises a RuntimeError of its own, safetensors another kind
        words = ("No space left", "Disk quota exceeded", "PytorchStreamWriter", "unexpected pos", "iostream error")
        if not any(word in str(error) for word in words):
            raise
        kind = kind_of_failure(error, out)
        advice = "look after the file system" if kind is PassingFault else "free some disk space"
        raise kind(f"{out} could not be written ({str(error).splitlines()[0]}); {advice} and go on") from None
