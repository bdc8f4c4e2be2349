"""How sure an accuracy is, whether two differ, and whether answers favour a position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 10_000


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson, 1927), as fractions; (0, 1) for no trial."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(right: int, total: int, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of an accuracy, as fractions; (0, 1) for no trial.

    Drawing `total` questions with replacement and counting the right ones is one binomial draw, so the `RESAMPLES`
    resamples are drawn as their counts. Of no width where all or none are right: prefer Wilson's there.
    """
    if total == 0:
        return 0.0, 1.0
    counts = np.random.default_rng(seed).binomial(total, right / total, RESAMPLES)
    low, high = np.percentile(counts / total, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Two sets of answers to the same questions."""

    questions: int
    only_first: int
    """Questions that the first alone has right"""
    only_second: int
    """Questions that the second alone has right"""
    p_value: float
    """McNemar's exact test, two-sided: how often a fair coin splits these two numbers so unevenly or more"""
    difference: float
    """Accuracy of the first less that of the second, as a fraction"""
    interval: tuple[float, float]
    """95% percentile bootstrap interval of the difference, questions drawn in pairs"""


def compare(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> Comparison:
    """Compare what is right, question by question, of two equally long sequences of at least one."""
    total = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    shares = [only_first / total, only_second / total]
    draws = np.random.default_rng(seed).multinomial(total, [*shares, max(0.0, 1 - sum(shares))], RESAMPLES)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / total, [2.5, 97.5])
    return Comparison(
        total, only_first, only_second, mcnemar_exact(only_first, only_second),
        (only_first - only_second) / total, (float(low), float(high)),
    )  # fmt: skip


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's test by the exact binomial distribution; 1 where the two never differ."""
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**discordant)


@dataclass(frozen=True)
class ChiSquare:
    """Pearson's statistic and what it means."""

    statistic: float
    freedom: int
    """Degrees of freedom; 0 where there is nothing to test"""
    p_value: float


def chi_square(observed: Sequence[Sequence[float]], expected: Sequence[Sequence[float]], freedom: int) -> ChiSquare:
    """Pearson's chi-square of counts against expected counts of the same shape, all above 0."""
    seen, due = np.asarray(observed, dtype=float), np.asarray(expected, dtype=float)
    statistic = float(((seen - due) ** 2 / due).sum())
    return ChiSquare(statistic, freedom, _tail(statistic, freedom))


def fit(counts: Sequence[int], shares: Sequence[float]) -> ChiSquare:
    """Goodness of fit of counts to shares, over the categories whose share is above 0."""
    pairs = [(count, share) for count, share in zip(counts, shares, strict=True) if share > 0]
    total, whole = sum(count for count, _ in pairs), sum(share for _, share in pairs)
    if total == 0 or len(pairs) < 2:
        return ChiSquare(0.0, 0, 1.0)
    expected = [total * share / whole for _, share in pairs]
    return chi_square([[count for count, _ in pairs]], [expected], len(pairs) - 1)


def homogeneity(groups: Sequence[tuple[int, int]]) -> ChiSquare:
    """Whether (right, total) of several groups can have one accuracy; empty groups do not count."""
    groups = [(right, total) for right, total in groups if total]
    total = sum(t for _, t in groups)
    share = sum(r for r, _ in groups) / max(1, total)
    if len(groups) < 2 or share in (0, 1):
        return ChiSquare(0.0, 0, 1.0)
    observed = [[right, total - right] for right, total in groups]
    return chi_square(observed, [[total * share, total * (1 - share)] for _, total in groups], len(groups) - 1)


def _tail(statistic: float, freedom: int) -> float:
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()
