"""Steps that go wrong: told and counted, and after several in a row undone."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from pipeline.watching.monitor import StepResult

WINDOW, FEWEST = 64, 16
"""Losses of good steps that a loss is compared with: the last ones of the stage, and not before there are so many."""


@dataclass(frozen=True)
class GuardState:
    """What a run remembers of its steps; every checkpoint holds it, so that a resumed run judges alike."""

    skipped: int = 0
    """Steps of the run whose update was left out, since a loss or gradient was no number"""
    spikes: int = 0
    """Steps of the run whose loss was far above the ones before"""
    rollbacks: int = 0
    in_a_row: int = 0
    """Steps of either kind since the last good one"""
    losses: tuple[float, ...] = ()
    """Of the last good steps of this stage"""


class Guard:
    """Judges every step by numbers that all ranks have: they decide alike, without asking each other."""

    def __init__(self, rollback_after: int, spike: float, state: GuardState | None = None) -> None:
        """rollback_after, spike: `train.rollback_after` and `train.spike` (pipeline/config.py)."""
        self.rollback_after, self.spike = rollback_after, spike
        self.state = state or GuardState()
        self.good = 0
        """Good steps since this start began or went back"""

    def judge(self, result: StepResult) -> str:
        """Count a step; what was wrong with it, or nothing."""
        state = self.state
        if not (result.applied and math.isfinite(result.loss)):
            self.state = replace(state, skipped=state.skipped + 1, in_a_row=state.in_a_row + 1)
            return f"loss {result.loss}, gradient norm {result.grad_norm}: not applied"
        if told := self._spikes(result.loss):
            self.state = replace(state, spikes=state.spikes + 1, in_a_row=state.in_a_row + 1)
            return told
        self.good += 1
        self.state = replace(state, in_a_row=0, losses=(*state.losses, result.loss)[-WINDOW:])
        return ""

    def _spikes(self, loss: float) -> str:
        losses = self.state.losses
        if not self.spike or len(losses) < FEWEST:
            return ""
        middle = statistics.median(losses)
        # 1.4826 times the median distance is the standard deviation where losses are normal; never quite nothing
        deviation = max(1.4826 * statistics.median(abs(x - middle) for x in losses), 0.01 * abs(middle), 1e-6)
        far = (loss - middle) / deviation
        if far <= self.spike:
            return ""
        return f"loss {loss:.4f}, {far:.0f} deviations above {middle:.4f}, the median of {len(losses)} steps"

    @property
    def due(self) -> bool:
        """Whether as many steps in a row went wrong as training takes."""
        return self.state.in_a_row >= max(1, self.rollback_after)

    @property
    def recovered(self) -> bool:
        """Whether enough good steps followed, since training began or went back, that this is another fault."""
        return self.good >= FEWEST

    def begin_stage(self) -> None:
        """Another stage has losses of its own."""
        self.state = replace(self.state, losses=())

    def rolled_back(self) -> None:
        self.good = 0
        self.state = replace(self.state, rollbacks=self.state.rollbacks + 1, in_a_row=0, losses=())

    def scalars(self) -> dict[str, float]:
        state = self.state
        return {"run/skipped": state.skipped, "run/spikes": state.spikes, "run/rollbacks": state.rollbacks}
