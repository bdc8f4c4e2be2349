"""Which columns are taken: examples by hand, and rules for any scores and candidates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_prep.errors import UserError
from pipeline.latent.select import PATCH_ORDERS, SELECTIONS, Selection, select_patches, selection_entropy

RANKED = [name for name in SELECTIONS if SELECTIONS[name].takes == "k"]


def row(scores: list[float], free: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Scores (1,P) and the candidates at the columns `free`, all by default."""
    saliency = torch.tensor([scores])
    candidates = torch.zeros_like(saliency, dtype=torch.bool)
    candidates[0, list(range(len(scores))) if free is None else free] = True
    return saliency, candidates


def chosen(saliency: Tensor, candidates: Tensor, num_patches: int, **options) -> list[int]:
    """Columns that a batch of one row takes."""
    columns, filled = select_patches(saliency, candidates, num_patches, **options)
    assert columns.shape == filled.shape == (1, 0 if options.get("selection") == "none" else num_patches)
    return columns[filled].tolist()


# ---- by hand ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("selection", "order", "expected"),
    [
        ("attention", "position", [1, 3, 4]),
        ("attention", "score", [3, 1, 4]),
        ("least", "position", [0, 2, 5]),
        ("least", "score", [2, 5, 0]),
        ("uniform", "position", [0, 2, 4]),
        ("none", "position", []),
        ("none", "score", []),
    ],
)
def test_three_of_six(selection: str, order: str, expected: list[int]) -> None:
    scores = row([0.3, 0.8, 0.1, 0.9, 0.7, 0.2])
    assert chosen(*scores, 3, selection=selection, patch_order=order) == expected


@pytest.mark.parametrize("order", PATCH_ORDERS)
@pytest.mark.parametrize("selection", ["attention", "least"])
def test_ties_go_to_the_lower_column(selection: str, order: str) -> None:
    assert chosen(*row([0.5] * 40), 7, selection=selection, patch_order=order) == list(range(7))
    assert chosen(*row([0.5] * 40, [3, 30, 31, 39]), 2, selection=selection, patch_order=order) == [3, 30]


def test_only_free_columns_are_taken_however_high_others_score() -> None:
    assert chosen(*row([0.9, 0.1, 0.8, 0.2], [1, 3]), 1, patch_order="score") == [3]
    assert chosen(*row([0.9, 0.0, 0.8, 0.0], [1, 3]), 2) == [1, 3]  # a score of zero is a score


@pytest.mark.parametrize("selection", RANKED)
def test_exhaustion_takes_what_is_left(selection: str) -> None:
    columns, filled = select_patches(*row([0.1, 0.4, 0.2, 0.3], [1, 2]), 3, selection=selection)
    assert columns[0, :2].tolist() == [1, 2] and filled.tolist() == [[True, True, False]]


def test_nothing_left() -> None:
    columns, filled = select_patches(*row([0.1, 0.4], []), 2)
    assert columns.shape == (1, 2) and not filled.any()


def test_more_patches_than_columns() -> None:
    """A question shorter than K, as in a batch without images."""
    columns, filled = select_patches(*row([0.1, 0.4], []), 5)
    assert columns.shape == (1, 5) and not filled.any() and columns.max() < 2  # still columns to gather from


def test_default_options_are_those_of_the_method() -> None:
    scores = row([0.3, 0.8, 0.1, 0.9])
    assert chosen(*scores, 2) == chosen(*scores, 2, selection="attention", patch_order="position") == [1, 3]


@pytest.mark.parametrize(
    ("free", "num_patches", "expected"),
    [
        (range(12), 4, [0, 3, 6, 9]),
        (range(10), 4, [0, 3, 5, 8]),
        (range(5, 9), 4, [5, 6, 7, 8]),
        (range(5, 9), 3, [5, 7, 8]),
        (range(0, 20, 2), 1, [0]),
    ],
)
def test_uniform_is_evenly_spaced(free: range, num_patches: int, expected: list[int]) -> None:
    assert chosen(*row([0.0] * 20, list(free)), num_patches, selection="uniform") == expected


@given(st.integers(1, 200), st.integers(1, 64))
def test_uniform_gaps_differ_by_at_most_one(left: int, num_patches: int) -> None:
    columns = chosen(*row([0.0] * left), num_patches, selection="uniform")
    assert len(columns) == min(num_patches, left)
    gaps = {b - a for a, b in zip(columns, [*columns[1:], columns[0] + left], strict=True)}
    assert max(gaps) - min(gaps) <= 1


# ---- random -----------------------------------------------------------------------------------
def draw(row_id: int, step: int = 0, columns: int = 100, left: int = 0, count: int = 8, right: int = 0) -> list[int]:
    """A draw among `columns` columns with padding around them, in the row's own numbers."""
    saliency, candidates = row([0.0] * (left + columns + right), list(range(left, left + columns)))
    options = {"selection": "random", "row_ids": torch.tensor([row_id]), "step": step}
    return [column - left for column in chosen(saliency, candidates, count, **options)]


@given(st.integers(0, 10**9), st.integers(0, 9), st.integers(0, 40), st.integers(0, 40))
def test_random_does_not_depend_on_padding(row_id: int, step: int, left: int, right: int) -> None:
    assert draw(row_id, step, left=left, right=right) == draw(row_id, step)


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_random_does_not_depend_on_the_batch(row_ids: list[int]) -> None:
    saliency = torch.zeros(len(row_ids), 100)
    candidates = torch.ones_like(saliency, dtype=torch.bool)
    columns, _ = select_patches(saliency, candidates, 8, selection="random", row_ids=torch.tensor(row_ids))
    assert columns.tolist() == [draw(row_id) for row_id in row_ids]


def test_random_does_not_depend_on_the_scores() -> None:
    saliency, candidates = row([0.0] * 100)
    options = {"selection": "random", "row_ids": torch.tensor([3])}
    other = torch.rand(saliency.shape, generator=torch.Generator().manual_seed(0))
    assert chosen(saliency, candidates, 8, **options) == chosen(other, candidates, 8, **options)


def test_random_differs_by_row_and_step() -> None:
    draws = [tuple(draw(row_id, step)) for row_id in range(50) for step in range(4)]
    assert len(set(draws)) == len(draws)


def test_random_takes_every_column_about_equally_often() -> None:
    counts = torch.zeros(100)
    for row_id in range(1000):
        counts[draw(row_id)] += 1
    # binomial: 1000 draws of 8 in 100 give 80 each, standard deviation 8.6
    assert (counts - 80).abs().max() < 6 * 8.6


def test_random_pairs_are_independent() -> None:
    """Neighbouring columns are taken together no more often than others."""
    pairs = sum(column + 1 in taken for taken in (set(draw(r)) for r in range(1000)) for column in taken)
    expected = 1000 * 99 * (8 * 7) / (100 * 99)
    assert abs(pairs - expected) < 6 * math.sqrt(expected)


# ---- rules ------------------------------------------------------------------------------------
@st.composite
def scored_rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores (B,P), with many ties, and candidates of their own in each row."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    levels = st.integers(0, 5)
    scores = draw(st.lists(levels, min_size=batch * width, max_size=batch * width))
    free = draw(st.lists(st.booleans(), min_size=batch * width, max_size=batch * width))
    return torch.tensor(scores).view(batch, width) / 5, torch.tensor(free).view(batch, width)


@given(
    scored_rows(),
    st.integers(0, 30),
    st.sampled_from(RANKED),
    st.sampled_from(PATCH_ORDERS),
    st.integers(0, 3),
)
def test_slots(rows: tuple[Tensor, Tensor], num_patches: int, selection: str, order: str, step: int) -> None:
    """Exactly min(K, left) different candidates, in the first slots."""
    saliency, candidates = rows
    ids = torch.arange(len(saliency))
    columns, filled = select_patches(
        saliency, candidates, num_patches, selection=selection, patch_order=order, row_ids=ids, step=step
    )
    assert columns.shape == filled.shape == (len(saliency), num_patches)
    for slots, full, free in zip(columns, filled, candidates, strict=True):
        count = min(num_patches, int(free.sum()))
        assert full.tolist() == [True] * count + [False] * (num_patches - count)
        taken = slots[:count].tolist()
        assert len(set(taken)) == count and free[taken].all()
        assert order == "score" or taken == sorted(taken)


@given(scored_rows(), st.integers(1, 24), st.sampled_from(["attention", "least"]))
def test_best_scores_and_their_order(rows: tuple[Tensor, Tensor], num_patches: int, selection: str) -> None:
    saliency, candidates = rows
    columns, filled = select_patches(saliency, candidates, num_patches, selection=selection, patch_order="score")
    sign = 1 if selection == "least" else -1
    for i, scores in enumerate(saliency.tolist()):
        free = candidates[i].nonzero()[:, 0].tolist()
        expected = sorted(free, key=lambda column: (sign * scores[column], column))[:num_patches]
        assert columns[i][filled[i]].tolist() == expected


@given(scored_rows(), st.integers(1, 8), st.sampled_from(RANKED))
def test_no_column_is_taken_twice(rows: tuple[Tensor, Tensor], num_patches: int, selection: str) -> None:
    """Steps until nothing is left take every candidate once."""
    saliency, candidates = rows
    free = candidates.clone()
    seen: list[list[int]] = [[] for _ in free]
    for step in range(candidates.shape[1] // num_patches + 1):
        columns, filled = select_patches(saliency, free, num_patches, selection=selection, step=step)
        for i in range(len(free)):
            taken = columns[i][filled[i]]
            seen[i] += taken.tolist()
            free[i, taken] = False
    assert [sorted(row) for row in seen] == [row.nonzero()[:, 0].tolist() for row in candidates]


# ---- rankings of one's own --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ranking", "expected"),
    [
        (lambda s, *_: torch.tensor([[3, 1, 2, 9]]), [0, 3]),
        (lambda s, *_: torch.tensor([[2, 7, 2, 1]], dtype=torch.uint8), [0, 1]),
        (lambda s, *_: torch.tensor([[False, True, False, True]]), [1, 3]),
        (lambda s, *_: torch.tensor([[0.0, -math.inf, -math.inf, math.inf]]), [0, 3]),
        (lambda s, *_: torch.tensor([[-math.inf, -math.inf, 0.0, -math.inf]]).bfloat16(), [2]),
        (lambda s, *_: torch.tensor([[1.0, math.nan, 2.0, 3.0]]), [2, 3]),  # a column that is not free
    ],
)
def test_rankings_of_any_type(monkeypatch: pytest.MonkeyPatch, ranking: Any, expected: list[int]) -> None:
    """-inf is never taken."""
    monkeypatch.setitem(SELECTIONS._parts, "own", Selection(ranking))
    free = [0, 2, 3] if expected == [2, 3] else [0, 1, 2, 3]
    assert chosen(*row([0.1, 0.2, 0.3, 0.4], free), 2, selection="own") == expected


@pytest.mark.parametrize(
    ("ranking", "said"),
    [
        (lambda s, *_: s / 0 * 0, "latent.selection own returned NaN for some image columns; -inf is the score of"),
        (lambda s, *_: s[0], r"latent.selection own returned \(4,\) in place of \(1, 4\)"),
        (lambda s, *_: s.tolist(), r"latent.selection own returned .* \(list\) in place of a real tensor \(1, 4\)"),
        (lambda s, *_: s.to("meta"), "latent.selection own returned a tensor on meta in place of cpu, where its inp"),
        (lambda s, *_: s + 1j, r"latent.selection own returned .* in place of a real tensor \(1, 4\)"),
    ],
)
def test_rankings_that_rank_nothing(monkeypatch: pytest.MonkeyPatch, ranking: Any, said: str) -> None:
    monkeypatch.setitem(SELECTIONS._parts, "own", Selection(ranking))
    with pytest.raises(UserError, match=said):
        chosen(*row([0.1, 0.2, 0.3, 0.4]), 2, selection="own")


def test_a_diverged_model_is_not_the_selection_s_fault() -> None:
    """Training stops at a loss that is no number, and says so better."""
    saliency, candidates = row([math.nan] * 4)
    assert select_patches(saliency, candidates, 2, selection="least")[0].shape == (1, 2)


# ---- entropy ----------------------------------------------------------------------------------
def test_entropy() -> None:
    assert selection_entropy(*row([0.2] * 8)).item() == pytest.approx(math.log(8))
    assert selection_entropy(*row([0.2, 0.3, 0.2, 0.9], [0, 2])).item() == pytest.approx(math.log(2))
    assert selection_entropy(*row([0.0, 0.3, 0.0], [0, 1])).item() == pytest.approx(0.0)
    assert selection_entropy(*row([0.2, 0.3], [])).item() == 0
