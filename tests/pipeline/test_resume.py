"""Going on past damaged checkpoints: from the newest sound one, never from one that was set aside, never anew."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.errors import PassingFault, UserError
from pipeline import distributed
from pipeline.distributed import World
from pipeline.ds_config import Triangle
from pipeline.keeping.checkpoint import Checkpoints
from pipeline.keeping.resume import from_sound
from pipeline.plan import Plan, done_marker, where_to_start
from tests.pipeline.test_checkpoint import manifest_of
from tests.pipeline.test_plan import STATE, settings, write_checkpoint

LOG = logging.getLogger("test_resume")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    monkeypatch.setattr(distributed, "from_main", lambda value: value)


def run_of(out: Path, *steps: tuple[int, int]) -> list[Path]:
    """Sound checkpoints after (stage, step), of three stages of 8 steps."""
    made = []
    for stage, step in steps:
        made.append(write_checkpoint(out, replace(STATE, stage=stage, step=step)))
        (made[-1] / "weights.pt").write_text("weights")
        manifest_of(made[-1], "weights.pt")
        if step == 8:
            done_marker(out, stage).write_text("{}")
    (made[-1].parent / "latest").write_text(made[-1].name)
    return made


def plan_of(out: Path, *stages: int) -> Plan:
    asked = list(stages or range(3))
    left, starts = where_to_start(Checkpoints(out), asked, 3, "auto", 1, 2)
    curriculum: Any = SimpleNamespace(stages=[None] * 3)
    config: Any = SimpleNamespace(curriculum=curriculum, optim=settings().optim)
    return Plan(config, {"zero_optimization": {"stage": 2}}, out, left, starts, Triangle(8, 8, 1, 1), asked, "auto")


def start_of(out: Path, *stages: int) -> tuple[list[int], list[str]]:
    """Stages left, and the checkpoints begun with."""
    plan = from_sound(plan_of(out, *stages), World(), LOG, lambda: None)
    assert all(start.checked and not start.damaged() for start in plan.starts.values())
    return plan.stages, [start.path.name for start in plan.starts.values()]


def test_sound(tmp_path: Path) -> None:
    made = run_of(tmp_path, (0, 8), (1, 3))
    assert start_of(tmp_path) == ([1, 2], ["stage1-step000003"])
    assert all(path.exists() for path in made)


@pytest.mark.parametrize("file", ["weights.pt", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, how: str) -> None:
    made = run_of(tmp_path, (0, 8), (1, 3), (1, 6))
    victim = made[-1] / file
    victim.write_text({"changed": victim.read_text().replace("e", "f"), "cut": victim.read_text()[:-9]}.get(how, ""))
    if how == "gone":
        victim.unlink()
    assert start_of(tmp_path) == ([1, 2], ["stage1-step000003"])
    if file == "manifest.json" and how == "gone":
        return  # it has never been a checkpoint
    aside = made[-1].with_name("damaged-stage1-step000006")
    assert aside.is_dir() and not made[-1].exists()
    said = f"checkpoint {made[-1]}: {file} is damaged; set aside as {aside.name}, and not used any more"
    assert caplog.messages == [said, f"going on from {made[1]}"]
    assert (made[0].parent / "latest").read_text().strip() == "stage1-step000003"
    assert start_of(tmp_path) == ([1, 2], ["stage1-step000003"]), "the next start too"


def test_one_after_another(tmp_path: Path) -> None:
    """Down to the end of the stage before; and where that is damaged, its stage is trained again from inside."""
    made = run_of(tmp_path, (0, 6), (0, 8), (1, 3), (1, 6))
    for path in made[2:]:
        (path / "weights.pt").write_text("WEIGHTS")
    assert start_of(tmp_path) == ([1, 2], ["stage0-step000008"])
    (made[1] / "weights.pt").write_text("WEIGHTS")
    assert start_of(tmp_path) == ([0, 1, 2], ["stage0-step000006"])


def test_the_end_of_the_stage_before(tmp_path: Path) -> None:
    """Asked for one stage alone, it is refused, with the reason; the advice then works."""
    made = run_of(tmp_path, (0, 6), (0, 8))
    (made[1] / "weights.pt").write_text("WEIGHTS")
    with pytest.raises(UserError) as caught:
        start_of(tmp_path, 1)
    first, second = caught.value.lines
    assert first.startswith(f"checkpoint {made[1]}: weights.pt is damaged")
    assert "stage 1 starts from the end of stage 0" in second and second.endswith("train it first: --stages 0")
    assert start_of(tmp_path, 0) == ([0], ["stage0-step000006"])


def test_none_is_sound(tmp_path: Path) -> None:
    """A run never begins anew by itself, not at the next start either."""
    for path in run_of(tmp_path, (0, 3), (0, 6)):
        (path / "weights.pt").write_text("WEIGHTS")
    with pytest.raises(UserError) as caught:
        start_of(tmp_path)
    assert len(caught.value.lines) == 3 and "has no sound checkpoint" in caught.value.lines[2]
    with pytest.raises(UserError, match="no sound checkpoint, only damaged ones .damaged-stage0-step000003, damaged-"):
        plan_of(tmp_path)


def test_folder_that_cannot_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = run_of(tmp_path, (0, 3), (0, 6))
    (made[1] / "weights.pt").unlink()

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Checkpoints, "set_aside", read_only)
    with pytest.raises(UserError, match="a damaged checkpoint cannot be renamed: .*Read-only"):
        start_of(tmp_path)


@pytest.mark.parametrize(
    ("fails", "kind"),
    [
        (PassingFault("the lease cannot be read"), PassingFault),
        (OSError(116, "Stale file handle"), PassingFault),
        (UserError("taken over"), UserError),
        (OSError(13, "Permission denied"), UserError),
    ],
    ids=str,
)
def test_a_damaged_one_that_cannot_be_set_aside(tmp_path: Path, fails: Exception, kind: type[UserError]) -> None:
    made = run_of(tmp_path, (0, 8), (1, 3))
    (made[-1] / "weights.pt").write_text("other")

    def fence() -> None:
        raise fails

    with pytest.raises(UserError) as told:
        from_sound(plan_of(tmp_path), World(), LOG, fence)
    assert type(told.value) is kind and made[-1].exists()
