"""The sign of life of a run, and the command that reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.errors import PassingFault, UserError
from pipeline import status
from pipeline.keeping.lease import Lease, this_process
from pipeline.watching import heartbeat as module
from pipeline.watching.activity import Activity
from pipeline.watching.heartbeat import Beat, Heartbeat, Where, path_of, read_beat, stop_path
from pipeline.watching.watch import STOPPED, StopRequest
from tests.launch import ROOT
from tests.pipeline.test_lease import becomes_true

WHERE = Where(1, 5, 8, 13, 0.25, 2.0, 1.5, 3)
BEAT = Beat(
    time=10_000.0, host="node7", pid=12, job="345", ranks=4, started=6000.0, restarts=2, phase="training",
    part="forward", seconds=1.0, where=WHERE, checkpoint="stage1-step000003", checkpoint_time=9000.0,
)  # fmt: skip
KEPT: Any = SimpleNamespace(check=lambda: None)


def written(run: Path, beat: Beat) -> Path:
    path_of(run).write_text(json.dumps(asdict(beat)))
    return run


# ---- activity ---------------------------------------------------------------------------------
def test_activity_returns_to_what_it_was() -> None:
    clock = iter(range(100))
    activity = Activity(lambda: next(clock))
    activity.enter("training")
    with activity.part("forward"):
        assert str(activity.now) == "training (forward)" and activity.now.since == 2
    with pytest.raises(KeyError), activity("saving"), activity.part("collective"):
        assert (activity.now.phase, activity.now.part) == ("saving", "collective")
        raise KeyError
    assert (activity.now.phase, activity.now.part, activity.now.since) == ("training", "", 7)


# ---- writing ----------------------------------------------------------------------------------
def test_phases_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new phase without waiting for the next beat; at the end what became of it; then one restart more."""
    monkeypatch.setattr(module, "LOOK", 0.01)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("stage0-step000003\n")
    activity = Activity()
    with Heartbeat(tmp_path, KEPT, 0, 2, activity) as heartbeat:
        first = read_beat(tmp_path)
        assert first and (first.phase, first.restarts, first.job, first.where) == ("starting", 0, "77", Where())
        heartbeat.where = WHERE
        activity.enter("saving")
        assert becomes_true(lambda: (beat := read_beat(tmp_path)) and beat.phase == "saving" and beat.where == WHERE)
    last = read_beat(tmp_path)
    assert last and (last.phase, last.where, last.checkpoint) == ("done", WHERE, "stage0-step000003")
    with Heartbeat(tmp_path, KEPT, 0, 2, activity):
        assert (beat := read_beat(tmp_path)) and beat.restarts == 1
    with Heartbeat(tmp_path, KEPT, 0, 2, activity):
        assert (beat := read_beat(tmp_path)) and beat.restarts == 1, "the one before trained no step"


@pytest.mark.parametrize(
    ("error", "phase", "reason"),
    [
        (SystemExit(STOPPED), "stopped", ""),
        (UserError("no data", "no model"), "failed", "no data no model"),
        (PassingFault("no disk"), "failed", "no disk"),
        (RuntimeError("out of\nmemory"), "failed", "RuntimeError: out of memory"),
    ],
)
def test_how_it_ended(tmp_path: Path, error: BaseException, phase: str, reason: str) -> None:
    with pytest.raises(type(error)), Heartbeat(tmp_path, KEPT, 0, 1, Activity()):
        raise error
    beat = read_beat(tmp_path)
    assert beat and (beat.phase, beat.reason) == (phase, reason)


def test_who_may_not_write(tmp_path: Path) -> None:
    """Another rank, and one whose folder was taken over."""
    with Heartbeat(tmp_path, KEPT, 1, 2, Activity()):
        pass
    with Heartbeat(tmp_path, Lease(tmp_path), 0, 2, Activity()):  # somebody removed it
        pass
    assert not path_of(tmp_path).exists()


def test_a_failing_disk_is_left_alone(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "gone", KEPT, 0, 1, Activity()):
        pass


def test_a_damaged_name_of_the_newest_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    assert module.newest_checkpoint(tmp_path) == {"checkpoint": "", "checkpoint_time": None}


def test_a_damaged_file_counts_no_restarts(tmp_path: Path) -> None:
    path_of(tmp_path).write_text('{"time": "x')
    with pytest.raises(UserError, match=r"heartbeat.json is damaged; the next start of training replaces it"):
        read_beat(tmp_path)
    with Heartbeat(tmp_path, KEPT, 0, 1, Activity()):
        assert (beat := read_beat(tmp_path)) and beat.restarts == 0


# ---- reading ----------------------------------------------------------------------------------
def test_alive(tmp_path: Path) -> None:
    for stage in (0, 10):
        (tmp_path / f"stage{stage}.done").write_text("{}")
    lines = status.lines(tmp_path, BEAT, BEAT.time + 4)
    assert lines == [
        f"{tmp_path}: alive 4 s ago: training (forward) for 1 s",
        "process 12 on node7, job 345, 4 ranks, started 1 h 6 min ago, restart 2",
        "stage 1: step 5 of 8, global step 13",
        "loss 0.2500, 2.00 steps/s, 2 s left in the stage, 3 bad samples",
        "stages done: 0, 10",
        "newest checkpoint: none",
    ]


@pytest.mark.parametrize(("phase", "head"), [("validating", "HANGS, told"), ("saving", "alive")])
def test_a_process_that_lives_and_does_not_get_on(tmp_path: Path, phase: str, head: str) -> None:
    beat = replace(BEAT, phase=phase, seconds=720.0)
    said = f"{tmp_path}: {head} 5 s ago: {phase} (forward) for 12 min"
    assert status.lines(tmp_path, beat, beat.time + 5)[0] == said
    assert status.verdict(beat, beat.time + 5) == head.lower().removesuffix(", told")


@pytest.mark.parametrize(
    ("phase", "age", "code", "said"),
    [
        ("training", 5, 0, "alive 5 s ago: training (forward) for 1 s"),
        ("exporting", 110, 0, "alive"),
        ("training", 720, 1, "DEAD: no sign of life for 12 min; its last was training (forward)"),
        ("stopped", 30, 1, "stopped on request 30 s ago; the same command goes on"),
        ("failed", 30, 1, "failed 30 s ago: no disk"),
        ("done", 10**6, 0, "done, 11 d 13 h ago"),
    ],
)
def test_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, phase: str, age: int, code: int, said: str
) -> None:
    monkeypatch.setattr(status.time, "time", lambda: BEAT.time + age)
    run = written(tmp_path, replace(BEAT, phase=phase, reason="no disk" if phase == "failed" else ""))
    if code:
        with pytest.raises(SystemExit) as end:
            status.main(run=run)
        assert end.value.code == code
    else:
        status.main(run=run)
    assert f"{run}: {said}" in capsys.readouterr().out


def test_a_process_of_this_machine(tmp_path: Path) -> None:
    """Dead as soon as it is gone, alive as long as it is there and beats."""
    beat = replace(BEAT, process=this_process())
    assert status.verdict(beat, BEAT.time + 5) == "alive" and status.verdict(beat, BEAT.time + 500) == "dead"
    gone = replace(BEAT, process={**this_process(), "started": "0"})
    assert status.verdict(gone, BEAT.time + 1) == "dead"
    assert f"{tmp_path}: DEAD: the process has ended for 1 s" in status.lines(tmp_path, gone, BEAT.time + 1)[0]
    elsewhere = replace(BEAT, process={**this_process(), "started": "0", "space": "pid:[7]"})
    assert status.verdict(elsewhere, BEAT.time + 1) == "alive", "a container's process has another number here"


def test_guards_are_told(tmp_path: Path) -> None:
    """Of a run that counts them."""
    beat = replace(BEAT, where=replace(WHERE, skipped=2, rollbacks=1))
    lines = status.lines(tmp_path, beat, BEAT.time)
    assert "loss 0.2500, 2.00 steps/s, 2 s left in the stage, 3 bad samples, 2 skipped steps, 1 rollbacks" in lines


def test_for_scripts(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        status.main(run=written(tmp_path, BEAT), json=True)
    found = json.loads(capsys.readouterr().out)
    assert end.value.code == 1 and found["verdict"] == "dead" and found["age"] > 1000
    assert (found["where"]["global_step"], found["job"]) == (13, "345")


def test_asked_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a file, once; a request to the start before is not this one's, and nobody else can be asked."""
    monkeypatch.setattr(module, "LOOK", 0.01)
    asked = StopRequest()
    monkeypatch.setattr(module, "STOP", asked)
    stop_path(tmp_path).touch()
    with Heartbeat(tmp_path, KEPT, 0, 1, Activity()):
        assert not stop_path(tmp_path).exists() and not asked.requested
        status.main(run=tmp_path, stop=True)
        assert becomes_true(lambda: asked.requested) and not stop_path(tmp_path).exists()
    with pytest.raises(UserError, match="cannot be asked to stop: done, 0 s ago"):
        status.main(run=tmp_path, stop=True)
    assert not stop_path(tmp_path).exists()


def test_command(tmp_path: Path) -> None:
    """It imports no torch, and a folder without a run is a user's mistake."""
    code = "import sys, pipeline.status; assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for run, said in ((tmp_path / "no", "no such folder"), (tmp_path, "has no heartbeat.json")):
        with pytest.raises(UserError, match=said):
            status.main(run=run)


def test_the_first_reason_is_kept(tmp_path: Path) -> None:
    """A rank that hangs ends, and only then the collective of those that waited for it fails."""
    with pytest.raises(RuntimeError), Heartbeat(tmp_path, KEPT, 0, 2, Activity()) as heartbeat:
        heartbeat.close("failed", "rank 1 hangs")
        raise RuntimeError("connection closed by peer")
    beat = read_beat(tmp_path)
    assert beat is not None and (beat.phase, beat.reason) == ("failed", "rank 1 hangs")
