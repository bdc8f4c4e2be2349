"""Intervals and tests against values worked out elsewhere."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.stats import bootstrap_interval, compare, fit, homogeneity, mcnemar_exact, wilson_interval


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(1, 10, 0.0179, 0.4042), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_interval_against_tabled_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-4)


def test_interval_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_bootstrap_is_the_resampling_of_questions() -> None:
    """The interval against one from resampled answers, drawn one by one."""
    right = np.zeros(200)
    right[:120] = 1
    drawn = np.random.default_rng(1).choice(right, (10_000, 200)).mean(axis=1)
    assert bootstrap_interval(120, 200) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.01)


def test_bootstrap_is_a_function_of_its_seed() -> None:
    assert bootstrap_interval(1234, 5000, 3) == bootstrap_interval(1234, 5000, 3)
    assert len({bootstrap_interval(1234, 5000, seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(("right", "total", "interval"), [(0, 0, (0.0, 1.0)), (0, 9, (0.0, 0.0)), (9, 9, (1.0, 1.0))])
def test_bootstrap_at_the_edges(right: int, total: int, interval: tuple[float, float]) -> None:
    assert bootstrap_interval(right, total) == interval


@given(st.integers(1, 500), st.data())
def test_bootstrap_holds_the_accuracy(total: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, total))
    low, high = bootstrap_interval(right, total)
    assert 0 <= low <= right / total <= high <= 1


@pytest.mark.parametrize(
    ("first", "second", "p"), [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 0.0625), (1, 9, 0.021484375), (2, 8, 0.109375)]
)
def test_mcnemar_against_tabled_values(first: int, second: int, p: float) -> None:
    assert mcnemar_exact(first, second) == mcnemar_exact(second, first) == pytest.approx(p, rel=1e-12)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_counts_all_equally_uneven_splits(first: int, second: int) -> None:
    n = first + second
    uneven = [i for i in range(n + 1) if abs(2 * i - n) >= abs(first - second)]
    assert mcnemar_exact(first, second) == pytest.approx(float(Fraction(sum(comb(n, i) for i in uneven), 2**n)))


def test_mcnemar_of_thousands() -> None:
    assert 0 < mcnemar_exact(1000, 1200) < 1e-4 and mcnemar_exact(0, 5000) == 0.0


def test_comparison_counts_pairs() -> None:
    first = [True, True, True, False, False, True]
    second = [True, False, False, True, False, False]
    found = compare(first, second)
    assert (found.questions, found.only_first, found.only_second) == (6, 3, 1)
    assert found.difference == pytest.approx(2 / 6) and found.p_value == mcnemar_exact(3, 1) == 0.625
    assert found.interval[0] < 2 / 6 < found.interval[1]
    back = compare(second, first)
    assert (back.only_first, back.difference) == (1, -found.difference)


def test_comparison_with_oneself() -> None:
    found = compare([True, False], [True, False])
    assert (found.p_value, found.difference, found.interval) == (1.0, 0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("counts", "shares", "statistic", "freedom", "p"),
    [
        ([44, 56], [1, 1], 1.44, 1, 0.23013934),
        ([5, 8, 9, 8, 10, 20], [1] * 6, 13.4, 5, 0.01990522),  # a die thrown 60 times
        ([16, 18, 16, 14, 12, 12], [1] * 6, 2.0, 5, 0.84914504),
    ],
)
def test_goodness_of_fit_against_tabled_values(counts, shares, statistic, freedom, p) -> None:
    found = fit(counts, shares)
    assert (found.statistic, found.freedom) == (pytest.approx(statistic), freedom)
    assert found.p_value == pytest.approx(p, rel=1e-6)


def test_categories_without_a_share_do_not_count() -> None:
    assert fit([44, 56, 7], [3, 3, 0]) == fit([44, 56], [1, 1])
    assert fit([0, 0], [1, 1]).p_value == fit([5], [1]).p_value == 1.0


def test_homogeneity_against_a_table_by_hand() -> None:
    """2 x 2 with rows 10 of 30 and 20 of 30: all expected counts are 15, so 4 times 25 / 15."""
    found = homogeneity([(10, 30), (20, 30), (0, 0)])
    assert (found.statistic, found.freedom) == (pytest.approx(100 / 15), 1)
    assert found.p_value == pytest.approx(0.00982327, rel=1e-5)


@pytest.mark.parametrize("groups", [[], [(1, 2)], [(2, 2), (3, 3)], [(0, 2), (0, 3)]])
def test_homogeneity_of_nothing_to_tell(groups: list[tuple[int, int]]) -> None:
    assert homogeneity(groups).p_value == 1.0


def test_homogeneity_does_not_depend_on_the_order() -> None:
    groups = [(3, 9), (4, 5), (1, 7)]
    values = {round(homogeneity(list(order)).statistic, 9) for order in itertools.permutations(groups)}
    assert len(values) == 1
