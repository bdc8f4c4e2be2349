"""A disk that is full, for real: a small tmpfs, which takes root to mount."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_prep.errors import UserError
from pipeline import distributed
from pipeline.keeping import keep as module
from pipeline.keeping import stage_end
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.lease import Lease
from pipeline.keeping.writing import full_disk_told
from pipeline.watching.monitor import Monitor
from tests.launch import losses, train, try_train
from tests.pipeline.test_keep import boundary, keeper_of, listing
from tests.pipeline.test_plan import STATE

Sized = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Sized]:
    """Called with a size in KiB: an empty disk, later the same one with more room."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        again = "remount," if folder.is_mount() else ""
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"{again}size={size}k", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    monkeypatch.setattr(distributed, "from_main", lambda value: value)
    monkeypatch.setattr(distributed, "barrier", lambda: None)
    monkeypatch.setattr(module, "weights_of", lambda engine: SimpleNamespace(found=STATE.weights))


def test_a_run_stops_and_goes_on(whole_run, data, disk: Sized) -> None:
    """The third checkpoint does not fit: both ranks end at a step, with a line of each that met it.

    With more room the run goes on.
    """
    out = disk(5700) / "run"
    options = ["--stages", "0", "--train.checkpoint_every", "2", "--train.keep_checkpoints", "5"]
    code, log = try_train(out, data, *options, "--train.async_checkpoints", "true", ranks=2)
    assert code == 2 and "Traceback" not in log, log[-4000:]
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert 1 <= len(lines) <= 2
    assert all("could not write a checkpoint (" in line and "free some space" in line for line in lines)
    saved = Checkpoints(out).all()
    assert [c.state.step for c in saved] == [2, 4] and not any(c.damaged() for c in saved)
    assert not list((out / "checkpoints").glob("writing*"))
    disk(20_000)
    log = train(out, data, *options, ranks=2)
    assert f"resumed from {saved[-1].path}" in log and (out / "stage0.done").exists()
    assert losses(out) == {step: loss for step, loss in losses(whole_run).items() if step < 8}


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint(disk: Sized, alone: None, background: bool) -> None:
    """However it is written: one line, the one before as it was, nothing left; and with more room it is written."""
    lease = Lease(disk(200) / "run")
    lease.acquire()
    try:
        keeper = keeper_of(lease, background, **{"train.keep_checkpoints": "5"})
        keeper.save(0, 1, 8, 1)
        keeper.finish()
        before = listing(keeper.checkpoints.folder)
        keeper.parts.engine.weights = torch.zeros(100_000)
        with pytest.raises(UserError) as caught:
            keeper.save(0, 2, 8, 2)
            keeper.finish()
        (line,) = caught.value.lines
        assert "rank 0 could not write a checkpoint (" in line
        assert listing(keeper.checkpoints.folder) == before and not keeper.checkpoints.all()[0].damaged()
        disk(2000)
        keeper = keeper_of(lease, background)
        keeper.save(0, 2, 8, 2)
        keeper.finish()
        boundary(keeper)
        assert [c.state.step for c in keeper.checkpoints.all()] == [1, 2]
    finally:
        lease.release()


def test_an_export(disk: Sized, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; neither a part of it nor the stage's marker stays."""
    lease = Lease(disk(200) / "run")
    lease.acquire()
    try:
        keeper = keeper_of(lease, **{"train.export": "stages"})
        keeper.parts.engine.module = SimpleNamespace(backbone=SimpleNamespace(vlm=None), method=None)
        keeper.parts.processor = keeper.parts.base = None
        monkeypatch.setattr(stage_end, "gathered_weights", lambda *_: {"weight": torch.zeros(100_000)})

        def write_export(_: Any, weights: dict[str, torch.Tensor], *given: Any) -> None:
            given[4].mkdir(parents=True, exist_ok=True)
            save_file(weights, given[4] / "model.safetensors")

        monkeypatch.setattr(stage_end, "write_export", write_export)
        with (
            pytest.raises(UserError, match="could not be written .*; free some disk space"),
            full_disk_told(keeper.out),
        ):
            keeper.end_stage(0, 8)
        assert not list((keeper.out / "export").iterdir()) and not (keeper.out / "stage0.done").exists()
    finally:
        lease.release()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the thread that writes events
@pytest.mark.parametrize("what", ["metrics.jsonl", "tensorboard"])
def test_numbers(disk: Sized, what: str) -> None:
    """One line from whichever file is full, at the step that it lacks."""
    out = disk(64)
    monitor = Monitor(out, True, 0, "", lambda: None)
    monitor.step(0, {"loss": 1.0})
    (out / "ballast").touch()
    with pytest.raises(OSError, match="No space left"), open(out / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(b"\0" * 512)
    with pytest.raises(UserError, match="No space left on device.; free some disk space"), full_disk_told(out):
        for step in range(1, 1000):
            if what == "tensorboard":
                monitor.scalars(step, {"train/loss": 1.0})
            else:
                monitor.step(step, {"loss": 1.0})
