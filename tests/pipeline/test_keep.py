"""Saving while training goes on: complete or absent, whichever rank fails, and nothing by one that lost its lease."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_prep.errors import PassingFault, UserError
from pipeline import distributed
from pipeline.data.order import DataState
from pipeline.distributed import World
from pipeline.keeping import keep as module
from pipeline.keeping import stage_end
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.keep import Keeper
from pipeline.keeping.lease import Lease
from pipeline.keeping.writing import full_disk_told, kind_of_failure
from pipeline.watching.activity import Activity
from pipeline.watching.guard import GuardState
from pipeline.watching.heartbeat import Heartbeat
from pipeline.watching.monitor import Monitor
from tests.pipeline.test_plan import STATE, settings, write_checkpoint


class Engine:
    """Saves as DeepSpeed does: a file a rank, through the checkpoint engine, and the scripts beside the folder."""

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.weights = rank, torch.zeros(1000)
        self.writes: Callable[[], object] = lambda: None
        """Called before a file is written"""
        self.checkpoint_engine: Any = SimpleNamespace(
            create=lambda info: None, makedirs=os.makedirs, save=self._save, load=torch.load, commit=lambda info: True
        )

    def _save(self, state: Any, path: str) -> None:
        self.writes()
        torch.save(state, path)

    def _copy_recovery_script(self, folder: str) -> None:
        Path(folder, "zero_to_fp32.py").write_text("script")

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not save_latest
        self.checkpoint_engine.makedirs(f"{folder}/{tag}", exist_ok=True)
        self.checkpoint_engine.save({"weights": self.weights}, f"{folder}/{tag}/rank{self.rank}_states.pt")
        if self.rank == 0:
            self._copy_recovery_script(folder)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    monkeypatch.setattr(distributed, "from_main", lambda value: value)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(module, "weights_of", lambda engine: SimpleNamespace(found=STATE.weights))


@pytest.fixture
def lease(tmp_path: Path):
    lease = Lease(tmp_path)
    lease.acquire()
    yield lease
    lease.release()


def keeper_of(lease: Lease, background: bool = True, world: World | None = None, **more: str) -> Any:
    world = world or World()
    stages: Any = [SimpleNamespace(state=lambda step: DataState(0, step // 3, 8 * step, 0, "i"))] * 2
    parts: Any = SimpleNamespace(base_hash="b", engine=Engine(world.rank), stages=stages)
    config = settings(**{"train.async_checkpoints": str(background).lower(), "train.export": "none", **more})
    plan: Any = SimpleNamespace(config=config, out=lease.path.parent, zero_stage=2)
    keeper: Any = Keeper(plan, parts, world, lease, SimpleNamespace(info=lambda *a: keeper.said.append(a[0] % a[1:])))  # type: ignore[arg-type]
    keeper.said = []
    return keeper


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def held_back(keeper: Any) -> threading.Event:
    """From now on writing waits for this."""
    go_on = threading.Event()
    keeper.parts.engine.writes = lambda: go_on.wait(10)
    return go_on


def boundary(*keepers: Any) -> None:
    """What the start of a step does."""
    reports = sum(keeper.report() for keeper in keepers)
    for keeper in keepers:
        keeper.agree(reports)


def full() -> None:
    raise OSError(28, "No space left on device")


def away() -> None:
    raise OSError(116, "Stale file handle")


@pytest.mark.parametrize("background", [False, True])
def test_saved(tmp_path: Path, lease: Lease, background: bool) -> None:
    """Complete at once, or at the first step that begins after all is written; the weights are those of the save."""
    keeper = keeper_of(lease, background)
    go_on = held_back(keeper)
    if not background:
        go_on.set()
    keeper.save(0, 3, 8, 3)
    keeper.parts.engine.weights += 1
    boundary(keeper)
    if background:
        assert names(tmp_path) == [f"writing-{lease.token}"] and keeper.checkpoints.all() == []
        go_on.set()
        keeper.pending.files.wait()
        boundary(keeper)
    (saved,) = keeper.checkpoints.all()
    assert names(tmp_path) == ["latest", "stage0-step000003", "zero_to_fp32.py"] and not saved.damaged()
    assert sorted(p.name for p in saved.path.iterdir()) == ["manifest.json", "rank0_states.pt", "state.json"]
    assert torch.load(saved.path / "rank0_states.pt")["weights"].sum() == 0
    assert keeper.said[-1].startswith(f"checkpoint {saved.path}: ") and "s blocked, " in keeper.said[-1]
    boundary(keeper)
    keeper.finish()
    assert len(keeper.said) == 1


def test_completing_at_a_step_is_saving(tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming and removing may take long on a shared disk: no step hangs meanwhile."""
    keeper = keeper_of(lease)
    keeper.save(0, 3, 8, 3)
    keeper.pending.files.wait()
    phases = list[str]()
    monkeypatch.setattr(Checkpoints, "prune", lambda *_: phases.append(module.ACTIVITY.now.phase))
    with module.ACTIVITY("training"):
        boundary(keeper)
        assert phases == ["saving"] and module.ACTIVITY.now.phase == "training"


def test_files_that_deepspeed_writes_itself(tmp_path: Path, lease: Lease) -> None:
    """As under NVMe offload: they are hashed too."""
    keeper = keeper_of(lease)
    keeper.save(0, 3, 8, 3)
    keeper.pending.files.wait()
    own = keeper.pending.files.folder / "offloaded_tensors" / "rank0" / "moments.swp"
    own.parent.mkdir(parents=True)
    own.write_text("moments")
    keeper.finish()
    (saved,) = keeper.checkpoints.all()
    (saved.path / own.relative_to(tmp_path / "checkpoints" / f"writing-{lease.token}")).write_text("Moments")
    assert saved.damaged() == "offloaded_tensors/rank0/moments.swp"


def test_the_next_waits_for_the_one_before(tmp_path: Path, lease: Lease) -> None:
    """Two are never written at once; the same asked for twice is written once; a stage's end and a best wait too."""
    keeper = keeper_of(lease)
    go_on = held_back(keeper)
    keeper.save(0, 3, 8, 3, {"val/accuracy": 0.5})
    keeper.save(0, 3, 8, 3)
    assert keeper.said == [] and not (tmp_path / "best-stage0.json").exists()
    threading.Timer(0.05, go_on.set).start()
    keeper.save(0, 6, 8, 6)
    assert [c.state.step for c in keeper.checkpoints.all()] == [3] and keeper.pending.state.step == 6
    assert "waited" in keeper.said[0] and "another is due" in keeper.said[0]
    assert keeper.best(0) == 0.5 and keeper.pending is None
    keeper.save(0, 8, 8, 8)
    keeper.end_stage(0, 8)
    assert (tmp_path / "stage0.done").exists() and "the stage ends" in " ".join(keeper.said)
    assert [c.state.step for c in keeper.checkpoints.all()] == [3, 6, 8] and keeper.pending is None


def test_ranks_agree(tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is complete when all ranks' files are, and holds what each of them wrote and hashed."""
    keepers = [keeper_of(lease, world=World(rank, rank, 2)) for rank in (0, 1)]
    go_on = held_back(keepers[1])
    for keeper in keepers:
        keeper.save(0, 3, 8, 3)
    keepers[0].pending.files.wait()
    boundary(*keepers)
    assert keepers[0].checkpoints.all() == []
    go_on.set()
    keepers[1].pending.files.wait()
    boundary(*keepers)
    (saved,) = keepers[0].checkpoints.all()
    manifest = json.loads((saved.path / "manifest.json").read_text())
    assert sorted(manifest) == ["rank0_states.pt", "rank1_states.pt", "state.json"] and not saved.damaged()
    assert [keeper.pending for keeper in keepers] == [None, None] and keepers[1].said == []


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_cannot_write(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch, victim: int, background: bool
) -> None:
    """All ranks end with its reason, the older checkpoint is as it was, and what was begun is gone."""
    write_checkpoint(tmp_path, replace(STATE, step=3))
    before = listing(tmp_path / "checkpoints")
    keepers = [keeper_of(lease, background, World(rank, rank, 2)) for rank in (0, 1)]
    keepers[victim].parts.engine.writes = full

    def all_problems(_: Any) -> list[Any]:
        return [keeper._problem(pending) for keeper, pending in zip(keepers, pendings, strict=True)]

    monkeypatch.setattr(Keeper, "finish", lambda *_: None)  # by hand: one process plays both ranks
    for keeper in keepers:
        keeper.save(0, 6, 8, 6)
    pendings = [keeper.pending for keeper in keepers]
    for pending in pendings:
        pending.files.wait()
    monkeypatch.setattr(distributed, "gather", all_problems)
    reports = sum(keeper.report() for keeper in keepers)
    for keeper in keepers:
        with pytest.raises(UserError) as caught:
            keeper.agree(reports)
        (line,) = caught.value.lines
        assert f"rank {victim} could not write a checkpoint ([Errno 28] No space left on device)" in line
        assert "the ones before are as they were" in line
    after = listing(tmp_path / "checkpoints")
    assert {name: text for name, text in after.items() if name != "zero_to_fp32.py"} == before


def nothing() -> None:
    """Goes wrong."""


def torn() -> None:
    raise RuntimeError("unexpected pos 704 vs 598")  # torch, of whatever error


LEASE = PassingFault("lease.json cannot be read")


@pytest.mark.parametrize(
    ("writes", "completing", "kind"),
    [
        ((nothing, away), nothing, PassingFault),
        ((nothing, full), nothing, UserError),
        ((away, away), nothing, PassingFault),
        ((away, full), nothing, UserError),
        ((nothing, torn), nothing, UserError),
        ((nothing, nothing), away, PassingFault),
        ((nothing, nothing), full, UserError),
        ((nothing, nothing), LEASE, PassingFault),
        ((nothing, nothing), UserError("taken over"), UserError),
    ],
)
def test_a_fault_that_passes_is_one_for_all_ranks(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch, writes: Any, completing: Any, kind: type[UserError]
) -> None:
    """A file system that is away is another thing than a full one, whatever it kept from being written."""
    keepers = [keeper_of(lease, True, World(rank, rank, 2)) for rank in (0, 1)]

    def commit(*_: Any) -> None:
        if isinstance(completing, Exception):
            raise completing
        completing()

    keepers[0].checkpoints.commit = commit
    for keeper, write in zip(keepers, writes, strict=True):
        keeper.parts.engine.writes = write
        keeper.save(0, 6, 8, 6)
    pendings = [keeper.pending for keeper in keepers]
    for pending in pendings:
        pending.files.wait()

    def all_problems(_: Any) -> list[Any]:
        return [keeper._problem(pending) for keeper, pending in zip(keepers, pendings, strict=True)]

    def not_there(_: Any) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(distributed, "gather", all_problems)
    monkeypatch.setattr(type(keepers[0].checkpoints), "remove_unfinished", not_there)  # tells nothing of its own
    for _ in range(2 if writes == (nothing, nothing) else 1):
        reports = sum(keeper.report() for keeper in keepers)
        told = []
        for keeper in keepers:
            try:
                keeper.agree(reports)
            except UserError as error:
                told.append(error)
    assert [type(error) for error in told] == [kind, kind]
    assert told[0].lines == told[1].lines


def test_a_writer_that_does_not_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's, for one; the folder is tried."""
    lost = tmp_path / "lost"
    assert kind_of_failure(RuntimeError("unexpected pos"), tmp_path) is UserError
    assert kind_of_failure(RuntimeError("unexpected pos"), lost) is UserError
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: away())
    assert kind_of_failure(RuntimeError("unexpected pos"), tmp_path) is PassingFault
    assert kind_of_failure(OSError(28, "full"), tmp_path) is UserError
    with pytest.raises(PassingFault, match="look after the file system"), full_disk_told(tmp_path):
        torn()


@pytest.mark.parametrize("background", [False, True])
def test_no_folder_can_be_made(tmp_path: Path, lease: Lease, background: bool) -> None:
    """Rank 0 begins, and must not end alone in the middle of what all do together."""
    (tmp_path / "checkpoints").write_text("a file")
    keeper = keeper_of(lease, background)
    with pytest.raises(UserError, match=r"rank 0 could not write a checkpoint"):
        keeper.save(0, 3, 8, 3)
        keeper.finish()


@pytest.mark.parametrize("file", ["manifest.json", "best-stage0.json", "latest"])
def test_rank_0_cannot_complete_it(tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Told by all ranks when the next step begins, not by rank 0 alone while others wait for it."""
    keeper = keeper_of(lease)
    keeper.save(0, 3, 8, 3, {"val/accuracy": 0.5})
    keeper.pending.files.wait()
    whole = module.Checkpoints.commit.__globals__["write_atomic"]

    def write(path: Path, text: str) -> None:
        full() if path.name == file else whole(path, text)

    monkeypatch.setitem(module.Checkpoints.commit.__globals__, "write_atomic", write)
    boundary(keeper)
    with pytest.raises(UserError, match="could not write a checkpoint .*No space left on device"):
        boundary(keeper)
    assert not list((tmp_path / "checkpoints").glob("writing*"))


def test_killed_while_writing(tmp_path: Path, lease: Lease) -> None:
    """What was begun is never a checkpoint, and goes at the next start."""
    keeper = keeper_of(lease)
    go_on = held_back(keeper)
    keeper.save(0, 3, 8, 3)
    (tmp_path / "export" / "stage0.writing-x").mkdir(parents=True)
    killed = tmp_path / "checkpoints" / "writing-of-another"
    os.rename(tmp_path / "checkpoints" / f"writing-{lease.token}", killed)
    go_on.set()
    keeper.pending.files.drop()
    assert Checkpoints(tmp_path).all() == [] == Checkpoints(tmp_path).unreadable()
    keeper_of(lease)
    assert not killed.exists() and not list((tmp_path / "export").iterdir())


def test_best_is_named_before_its_checkpoint(tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in between, the next start finds no best, and so validates the step again."""
    keeper = keeper_of(lease, background=False)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", killed)
        keeper.save(0, 8, 8, 8, {"val/accuracy": 0.25})
    keeper.pending = None
    assert (tmp_path / "best-stage0.json").exists() and keeper.best(0) == -1
    write_checkpoint(tmp_path, STATE)
    assert keeper.best(0) == 0.25


def test_what_to_roll_back_to(tmp_path: Path, lease: Lease) -> None:
    """The newest that is as it was written, and not from amid the steps that went wrong; thrice if that helped."""
    keeper = keeper_of(lease, False, **{"train.keep_checkpoints": "3"})
    keeper.log.warning = keeper.log.info
    with pytest.raises(UserError, match="^why; there is no checkpoint to go back to"):
        keeper.roll_back("why", True)
    for step in (3, 6):
        keeper.save(0, step, 8, step)
    keeper.save(0, 7, 8, 7, guard=GuardState(in_a_row=2))
    (tmp_path / "checkpoints" / "stage0-step000006" / "rank0_states.pt").write_text("")
    start = keeper.roll_back("why", False)
    assert start.path.name == "stage0-step000003" and start.checked
    assert keeper.said[-1].endswith("stage0-step000006: rank0_states.pt is damaged")
    with pytest.raises(UserError, match="^why; going back to stage0-step000003 did not help"):
        keeper.roll_back("why", False)
    for _ in range(2):
        assert keeper.roll_back("another time", True).path == start.path
    with pytest.raises(UserError, match="^why; training went back to stage0-step000003 3 times already"):
        keeper.roll_back("why", True)


# ---- the folder is taken over -----------------------------------------------------------------
def take_over(lease: Lease) -> None:
    content = {
        **json.loads(lease.path.read_text()),
        "token": "other",
        "pid": 7,
        "host": "node9",
        "renewed": time.time(),
    }
    lease.path.write_text(json.dumps(content))


def test_taken_over_while_a_checkpoint_is_written(tmp_path: Path, lease: Lease) -> None:
    """No file is begun any more, nothing is renamed or removed, and the run ends with one line."""
    write_checkpoint(tmp_path, replace(STATE, step=3))
    keeper = keeper_of(lease, **{"train.keep_checkpoints": "1"})
    writing, go_on = threading.Event(), threading.Event()
    engine = keeper.parts.engine
    engine.writes = lambda: (writing.set(), go_on.wait(10))
    keeper.save(0, 6, 8, 6)
    writing.wait(10)
    take_over(lease)
    own = f"checkpoints/writing-{lease.token}/"
    before = {name: text for name, text in listing(tmp_path).items() if not name.startswith(own)}
    go_on.set()
    keeper.pending.files.wait()
    with pytest.raises(UserError) as caught:
        boundary(keeper)
    assert caught.value.lines == (f"{tmp_path} was taken over by process 7 on node9",)
    assert type(caught.value) is UserError
    assert {name: text for name, text in listing(tmp_path).items() if not name.startswith(own)} == before


def test_taken_over_when_all_is_written(tmp_path: Path, lease: Lease) -> None:
    """Between the last file and the step that would complete the checkpoint."""
    write_checkpoint(tmp_path, replace(STATE, step=3))
    keeper = keeper_of(lease, **{"train.keep_checkpoints": "1"})
    keeper.save(0, 6, 8, 6, {"val/accuracy": 0.5})
    keeper.pending.files.wait()
    take_over(lease)
    before = listing(tmp_path)
    boundary(keeper)
    with pytest.raises(UserError, match="was taken over by process 7 on node9"):
        boundary(keeper)
    assert listing(tmp_path) == before


def test_taken_over_between_steps(tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers, signs of life, checkpoints, marks and damaged checkpoints: nothing is written."""
    (path,) = [write_checkpoint(tmp_path, replace(STATE, step=3))]
    (tmp_path / "checkpoints" / "latest").write_text(path.name)
    keeper, monitor = keeper_of(lease), Monitor(tmp_path, True, 0, "", lease.check)
    monitor.step(0, {"loss": 1.0})
    monitor.scalars(0, {"train/loss": 1.0})
    heartbeat = Heartbeat(tmp_path, lease, 0, 1, Activity())
    heartbeat.started, heartbeat.restarts = 0.0, 0
    heartbeat.write(heartbeat.activity.now)
    take_over(lease)
    before = listing(tmp_path)
    monitor.step(1, {"loss": 1.0})
    monitor.scalars(1, {"train/loss": 1.0})
    heartbeat.write(heartbeat.activity.now)
    for write in (
        lambda: boundary(keeper),
        lambda: keeper.save(0, 6, 8, 6),
        lambda: keeper.end_stage(0, 8),
        lambda: keeper.begin_stage(0),
        lambda: keeper.checkpoints.set_aside(path),
        lambda: keeper.checkpoints.remove_unfinished() or keeper.checkpoints.name_best(STATE, {}),
        lambda: Monitor(tmp_path, True, 0, "", lease.check),
    ):
        with pytest.raises(UserError, match="was taken over by process 7 on node9") as told:
            write()
        assert type(told.value) is UserError  # the job is not to be queued again
    assert listing(tmp_path) == before


def test_taken_over_while_exporting(tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export of the other trainer, or the one before, stays."""
    old = tmp_path / "export" / "stage0"
    old.mkdir(parents=True)
    (old / "latent_config.json").write_text("old")
    keeper = keeper_of(lease, **{"train.export": "stages"})
    keeper.parts.engine.module = SimpleNamespace(backbone=SimpleNamespace(vlm=None), method=None)
    keeper.parts.processor = keeper.parts.base = None
    monkeypatch.setattr(stage_end, "gathered_weights", lambda *_: {})

    def write_export(*given: Any) -> None:
        given[6].mkdir(exist_ok=True)
        take_over(lease)

    monkeypatch.setattr(stage_end, "write_export", write_export)
    with pytest.raises(UserError, match="was taken over"):
        keeper.end_stage(0, 8)
    assert listing(tmp_path / "export") == {"stage0/latent_config.json": b"old"}
    assert not (tmp_path / "stage0.done").exists()
