"""Which image columns a latent step takes: latent vision V of a pass.

A selection ranks the columns that are left; it is chosen by name and open to a user's own file (`parts`).
Shapes: B rows, P question columns, K patches a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.latent.parts import expect
from pipeline.registry import Registry, described, expect_call, failures_told

PATCH_ORDERS = ("position", "score")
Ranking = Callable[[Tensor, Tensor, int, Tensor | None, int], Tensor]
"""(s (B,P) fp32, candidates (B,P) bool, K, row ids (B,) or None, step) -> scores (B,P), of which the highest are
taken, -inf never"""
Takes = Literal["k", "all", "none"]


@dataclass(frozen=True)
class Selection:
    """A way to choose image columns."""

    ranking: Ranking
    takes: Takes = "k"
    """How many a step takes: `num_patches`, all that are left, or none"""


def check_selection(part: Any) -> None:
    if not isinstance(part, Selection):
        raise ValueError(f"expected Selection(ranking), got {described(part)}")
    expect_call(part.ranking, "its ranking", "saliency", "candidates", "num_patches", "row_ids", "step")
    if part.takes not in get_args(Takes):
        raise ValueError(f"takes is {described(part.takes)}, expected one of {', '.join(get_args(Takes))}")


SELECTIONS: Registry[Selection] = Registry("selection", check_selection)


def select_patches(
    saliency: Tensor,
    candidates: Tensor,
    num_patches: int,
    *,
    selection: str = "attention",
    patch_order: str = "position",
    row_ids: Tensor | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """Columns of the K chosen patches and which of the K slots are filled.

    saliency (B,P) fp32; candidates (B,P) bool, image columns of the row that no earlier step took.
    Returns columns (B,K) int64 and filled (B,K) bool; filled slots come first.  Fewer candidates than K fill fewer
    slots.  Ties go to the lower column, on every device.  `row_ids` (B,) seeds `random`, so that a row's draw
    depends neither on its batch nor on the rank.  Raises UserError where a ranking is of another shape, or NaN.
    """
    chosen = SELECTIONS[selection]
    if chosen.takes != "k":
        # one column at least, masked where nothing is left: a step may have no other
        num_patches = max(1, int(candidates.sum(1).max())) if chosen.takes == "all" else 0
    with failures_told(f"latent.selection {selection}", theirs=True):
        ranking = chosen.ranking(saliency, candidates, num_patches, row_ids, step)
    ranking = checked(ranking, saliency, candidates, selection)
    ranking = ranking.masked_fill(~candidates, float("-inf"))
    values, columns = ranking.sort(dim=1, descending=True, stable=True)
    missing = num_patches - columns.shape[1]
    if missing > 0:  # a question shorter than K, in a batch without images
        values = torch.nn.functional.pad(values, (0, missing), value=float("-inf"))
        columns = torch.nn.functional.pad(columns, (0, missing))
    columns, filled = columns[:, :num_patches], values[:, :num_patches] > float("-inf")
    if patch_order == "position":
        # empty slots sort behind every column
        order = columns.masked_fill(~filled, candidates.shape[1]).argsort(dim=1, stable=True)
        columns, filled = columns.gather(1, order), filled.gather(1, order)
    return columns, filled


def checked(ranking: Any, saliency: Tensor, candidates: Tensor, selection: str) -> Tensor:
    """A selection's scores (B,P), whole numbers as fp64.  Raises UserError where they rank nothing."""
    part = f"latent.selection {selection}"
    expect(ranking, saliency.shape, saliency.device, part)
    # where s itself is no number, the model has diverged, which training says better
    if (ranking.isnan() & candidates & ~saliency.isnan()).any():
        raise UserError(f"{part} returned NaN for some image columns; -inf is the score of what is never to be taken")
    return ranking if ranking.is_floating_point() else ranking.double()


def _by_attention(saliency: Tensor, *_) -> Tensor:
    return saliency


SELECTIONS.add("attention")(Selection(_by_attention))
SELECTIONS.add("least")(Selection(lambda saliency, *_: -saliency))
SELECTIONS.add("all")(Selection(_by_attention, takes="all"))
SELECTIONS.add("none")(Selection(_by_attention, takes="none"))


def _by_random(saliency: Tensor, candidates: Tensor, num_patches: int, row_ids: Tensor | None, step: int) -> Tensor:
    """A hash of (row, step, column) in place of a generator: the same on every device and in every batch."""
    rows = torch.zeros_like(saliency[:, 0], dtype=torch.int64) if row_ids is None else row_ids
    # number image columns from the row's first, so that padding does not change the draw
    columns = candidates.long().cumsum(1)
    x = rows[:, None] * 0x9E3779B1 + step * 0x85EBCA77 + columns * 0xC2B2AE3D
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return (x ^ (x >> 15)).double()


SELECTIONS.add("random")(Selection(_by_random))


def _by_uniform(saliency: Tensor, candidates: Tensor, num_patches: int, *_) -> Tensor:
    """Evenly spaced among the columns that are left."""
    left = candidates.sum(1, keepdim=True)
    number = candidates.long().cumsum(1) - 1
    wanted = (number * num_patches) // left.clamp(min=1)
    before = ((number - 1) * num_patches) // left.clamp(min=1)
    return ((number == 0) | (wanted != before) | (left <= num_patches)).float()


SELECTIONS.add("uniform")(Selection(_by_uniform))


def selection_entropy(saliency: Tensor, candidates: Tensor) -> Tensor:
    """Entropy in nats of s over the candidate columns, renormalised, (B,); 0 for a row without candidates."""
    weights = saliency * candidates
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.special.entr(weights).sum(1)
