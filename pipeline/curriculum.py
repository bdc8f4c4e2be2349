"""Which reasoning steps a sample shows, and how many latent steps replace the rest: (stage, sample) -> view.

Splitting and merging rationales happens here, at training, so one set of shards serves every curriculum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from data_prep.steps import merge_steps, split_steps
from pipeline.registry import Registry, described, expect_call, failures_told


class StageConfig(BaseModel):
    """One stage of the curriculum (method: `schedule`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    latents: int = Field(ge=0)
    """n: latent steps of every row."""
    skip: int = Field(ge=0)
    """Explicit steps left out, from the first on."""
    epochs: float | None = Field(None, gt=0, le=1_000_000)
    """Length in passes over the training split."""
    steps: int | None = Field(None, gt=0, le=1_000_000_000)
    """Length in optimizer steps, in place of epochs."""
    where: dict[str, list[str]] = {}
    """Train on rows whose breakdown fields have one of these values; empty: on all."""

    @model_validator(mode="after")
    def one_length(self) -> StageConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self


Count = Callable[[StageConfig, int], int]
"""(stage, explicit steps that the row's rationale has) -> its latent steps, at most the stage's"""


def check_count(part: Any) -> None:
    expect_call(part, "it", "stage", "steps")


COUNTS: Registry[Count] = Registry("count", check_count)
COUNTS.add("stage")(lambda stage, steps: stage.latents)


@COUNTS.add("replaced")
def in_proportion(stage: StageConfig, steps: int) -> int:
    """As many latent steps for each explicit one as the stage has, for those that the row really loses."""
    return -(-stage.latents * min(stage.skip, steps) // stage.skip) if stage.skip else stage.latents


def published_schedule() -> list[StageConfig]:
    return [StageConfig(latents=n, skip=n, epochs=4) for n in range(4)]


class CurriculumConfig(BaseModel):
    """Stages, and how rationales become steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    stages: list[StageConfig] = Field(default_factory=published_schedule, min_length=1)
    """In order; each starts from the end of the one before it."""
    groups: int = Field(3, ge=1)
    """A rationale of more steps than this is merged to so many consecutive groups."""
    count: str = "stage"
    """Latent steps of a training row: the stage's (stage), or fewer where its rationale has fewer steps than the stage
    skips (replaced).  An answer takes the stage's."""
    mix: float = Field(0.0, ge=0, le=1)
    """Share of rows that take a random earlier stage (Coconut's uniform_prob)."""
    reset_optimizer: bool = False
    """Start each stage with a fresh optimizer (Coconut) instead of one throughout (published)."""

    @field_validator("count")
    @classmethod
    def known(cls, name: str) -> str:
        return COUNTS.check(name)

    @model_validator(mode="after")
    def counts(self) -> CurriculumConfig:
        """Ask for every number of steps that a row can have, so that no loader worker finds a mistake."""
        for stage in self.stages:
            for steps in range(min(self.groups, 100) + 1):
                with failures_told(f"curriculum.count {self.count}"):
                    found = COUNTS[self.count](stage, steps)
                if not isinstance(found, Integral):
                    raise ValueError(f"count {self.count} returned {described(found)}, expected a whole number")
        return self


@dataclass(frozen=True)
class View:
    """What a sample looks like at a stage."""

    latents: int
    steps: list[str]
    """Explicit steps that remain."""


def view(rationale: str, stage: StageConfig, groups: int, count: str = "stage") -> View:
    """The view of a rationale at `stage`; by default n latents are used even where it has fewer steps."""
    steps = merge_steps(split_steps(rationale), groups)
    return View(min(stage.latents, max(0, COUNTS[count](stage, len(steps)))), steps[stage.skip :])


def stage_of_row(config: CurriculumConfig, stage: int, seed: int, epoch: int, sample: int) -> int:
    """The stage a sample is shown at in an epoch of `stage`: itself, or with `mix` an earlier one.

    A pure function of its arguments, so that it depends on neither rank, worker nor resume.
    """
    if not config.mix or not stage:
        return stage
    rng = np.random.Generator(np.random.Philox(key=[seed, (stage << 32) | epoch], counter=[0, 0, 0, sample]))
    return int(rng.integers(stage)) if rng.random() < config.mix else stage
