"""Stages, views of a rationale, and the share of rows that take an earlier stage."""

from __future__ import annotations

from collections import Counter

import pytest
from pydantic import ValidationError

from pipeline.curriculum import CurriculumConfig, StageConfig, View, stage_of_row, view

FIVE = "One\nis odd. Two is even. Three. Four. Five."
MERGED = ["One is odd. Two is even", "Three. Four", "Five."]


def stage(latents: int = 0, skip: int = 0, **options) -> StageConfig:
    return StageConfig(latents=latents, skip=skip, **options or {"epochs": 1})


@pytest.mark.parametrize(("skip", "steps"), [(0, MERGED), (1, MERGED[1:]), (2, MERGED[2:]), (3, []), (9, [])], ids=str)
def test_first_steps_are_left_out(skip: int, steps: list[str]) -> None:
    assert view(FIVE, stage(2, skip), 3) == View(2, steps)


@pytest.mark.parametrize(
    ("groups", "steps"),
    [
        (1, ["One is odd. Two is even. Three. Four. Five."]),
        (2, ["One is odd. Two is even. Three", "Four. Five."]),
        (4, ["One is odd. Two is even", "Three", "Four", "Five."]),
        (9, ["One is odd", "Two is even", "Three", "Four", "Five."]),
    ],
    ids=str,
)
def test_groups(groups: int, steps: list[str]) -> None:
    assert view(FIVE, stage(), groups).steps == steps


def test_latents_do_not_depend_on_the_number_of_steps() -> None:
    assert view("One step only.", stage(3, 3), 3) == View(3, [])
    assert view("", stage(3, 3), 3) == View(3, [])
    assert view("One step only.", stage(1, 0), 3) == View(1, ["One step only."])


def test_published_schedule() -> None:
    stages = CurriculumConfig().stages
    assert [(s.epochs, s.steps, s.latents, s.skip) for s in stages] == [(4, None, n, n) for n in range(4)]
    assert CurriculumConfig().groups == 3 and CurriculumConfig().mix == 0 and not CurriculumConfig().reset_optimizer


@pytest.mark.parametrize(
    "length", [{}, {"epochs": 1, "steps": 5}, {"epochs": 0}, {"steps": 0}, {"epochs": -1}], ids=str
)
def test_a_stage_has_one_positive_length(length: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        StageConfig(latents=1, skip=1, **length)


@pytest.mark.parametrize("options", [{"stages": []}, {"groups": 0}, {"mix": 1.1}, {"mix": -0.1}], ids=str)
def test_bad_curricula_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        CurriculumConfig(**options)


# ---- mix --------------------------------------------------------------------------------------
SAMPLES = range(4000)


def stages_of(mix: float, at: int = 3, seed: int = 0, epoch: int = 0, samples: range = SAMPLES) -> list[int]:
    config = CurriculumConfig(mix=mix)
    return [stage_of_row(config, at, seed, epoch, sample) for sample in samples]


def test_without_mix_every_row_takes_the_stage() -> None:
    assert set(stages_of(0.0)) == {3}


def test_first_stage_has_no_earlier_one() -> None:
    assert set(stages_of(0.9, at=0)) == {0}


def test_mix_is_the_share_of_rows_at_an_earlier_stage() -> None:
    counts = Counter(stages_of(0.3))
    assert set(counts) == {0, 1, 2, 3}
    assert 0.67 < counts[3] / len(SAMPLES) < 0.73  # standard deviation 0.007
    assert all(0.08 < counts[earlier] / len(SAMPLES) < 0.12 for earlier in range(3))


def test_all_rows_may_be_mixed() -> None:
    assert set(stages_of(1.0)) == {0, 1, 2}


def test_mix_is_a_pure_function_of_seed_stage_epoch_and_sample() -> None:
    few = range(60)
    keys = [(at, seed, epoch) for at in (1, 2, 3) for seed in (0, 1) for epoch in (0, 1)]
    draws = [tuple(stages_of(0.5, *key, few)) for key in keys]
    assert len(set(draws)) == len(keys)
    backwards = [tuple(stages_of(0.5, *key, few[::-1])[::-1]) for key in reversed(keys)]
    assert backwards[::-1] == draws
