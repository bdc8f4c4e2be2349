"""Steps that go wrong: what counts as such, and when they are undone."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.watching.guard import FEWEST, WINDOW, Guard, GuardState
from pipeline.watching.monitor import StepResult


def result(loss: float = 2.0, applied: bool = True) -> StepResult:
    return StepResult(loss, 1.0 if applied else math.inf, applied, 10, False, {})


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (result(math.nan), "loss nan, gradient norm 1.0: not applied"),
        (result(math.inf, applied=False), "loss inf, gradient norm inf: not applied"),
        (result(2.0, applied=False), "loss 2.0, gradient norm inf: not applied"),
    ],
)
def test_what_is_no_number_is_counted(step: StepResult, told: str) -> None:
    guard = Guard(2, 20.0)
    assert guard.judge(step) == told and not guard.due
    guard.judge(step)
    assert guard.due and guard.scalars() == {"run/skipped": 2, "run/spikes": 0, "run/rollbacks": 0}


def test_a_good_step_ends_the_row() -> None:
    guard = Guard(2, 20.0)
    for applied in (False, True, False):
        guard.judge(result(applied=applied))
    assert not guard.due and guard.state.skipped == 2 and guard.state.losses == (2.0,)


def test_0_takes_no_wrong_step() -> None:
    guard = Guard(0, 20.0)
    guard.judge(result(math.nan))
    assert guard.due


def falling(steps: int) -> list[float]:
    """A loss as training has it: falling, and noisy."""
    return [2.0 + 4.0 * math.exp(-i / 20) + 0.1 * math.sin(7.0 * i) for i in range(steps)]


def test_a_spike() -> None:
    guard = Guard(3, 20.0)
    for loss in falling(60):
        assert guard.judge(result(loss)) == ""
    told = guard.judge(result(60.0))
    assert told.startswith("loss 60.0000, ") and "the median of 60 steps" in told
    assert guard.state.spikes == 1 and len(guard.state.losses) == 60, "a spike is nothing to compare with"
    assert guard.judge(result(2.5)) == ""


def test_where_there_is_nothing_to_compare_with() -> None:
    guard, off = Guard(3, 20.0), Guard(3, 0.0)
    for loss in falling(FEWEST - 1):
        guard.judge(result(loss))
        off.judge(result(loss))
    assert guard.judge(result(1e6)) == "" == off.judge(result(1e6)), "too few"
    guard.begin_stage()
    for loss in falling(FEWEST):
        assert guard.judge(result(100.0 + loss)) == "", "another stage, another level"
        off.judge(result(loss))
    assert guard.judge(result(1e6)) and off.judge(result(1e6)) == ""


def test_losses_all_alike() -> None:
    guard = Guard(3, 20.0)
    for _ in range(WINDOW):
        guard.judge(result(0.0))
    assert guard.judge(result(0.0)) == "" and guard.judge(result(1.0))


def test_recovered() -> None:
    """Not by few steps, nor by any before training went back."""
    guard = Guard(3, 20)
    told = []
    for _ in range(FEWEST):
        guard.judge(result(math.nan))
        told.append(guard.recovered)
        guard.judge(result())
        guard.begin_stage()
    assert not any(told) and guard.recovered
    guard.judge(result(math.nan))
    assert guard.recovered
    guard.rolled_back()
    assert not guard.recovered


def test_rolled_back() -> None:
    guard = Guard(1, 20.0, GuardState(skipped=3, losses=(1.0,)))
    guard.judge(result(math.nan))
    guard.rolled_back()
    assert guard.state == GuardState(skipped=4, rollbacks=1) and not guard.due


@given(st.lists(st.one_of(st.floats(-10, 1e6), st.just(math.nan)), max_size=100), st.integers(0, 100))
def test_a_resumed_run_judges_alike(losses: list[float], cut: int) -> None:
    whole, before = Guard(3, 5.0), Guard(3, 5.0)
    for loss in losses[:cut]:
        before.judge(result(loss))
    after: Any = Guard(3, 5.0, before.state)
    said = [whole.judge(result(loss)) for loss in losses]
    assert said[cut:] == [after.judge(result(loss)) for loss in losses[cut:]]
    if cut <= len(losses):
        assert whole.state == after.state
    assert len(whole.state.losses) <= WINDOW
