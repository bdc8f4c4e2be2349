"""Kept segments and masks of a pass."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.latent.attention import KeptSegments, last_row_saliency, segment_mask


def pair(first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Keys and values (1,1,L,1) that count up."""
    keys = torch.arange(first, first + columns, dtype=torch.float32).view(1, 1, -1, 1)
    return keys, -keys


def numbers(tensor: Tensor) -> list[float]:
    return tensor.flatten().tolist()


def test_segments_are_joined_by_layer() -> None:
    kept = KeptSegments()
    kept.extend(0, 0, *pair(0, 3))
    kept.extend(0, 1, *pair(100, 3))
    keys, values = kept.extend(1, 0, *pair(3, 2))
    assert numbers(keys) == [0, 1, 2, 3, 4] and numbers(values) == [0, -1, -2, -3, -4]
    assert numbers(kept.extend(1, 1, *pair(103, 1))[0]) == [100, 101, 102, 103]
    assert len(kept.tensors()) == 8


def test_recomputing_a_segment_neither_appends_nor_overwrites() -> None:
    """Checkpointing runs a layer again in backward, after later segments were kept."""
    kept = KeptSegments()
    for index, first in enumerate((0, 3, 6)):
        kept.extend(index, 0, *pair(first, 3))
    assert numbers(kept.extend(1, 0, *pair(30, 3))[0]) == [0, 1, 2, 30, 31, 32]
    assert numbers(kept.extend(0, 0, *pair(70, 3))[0]) == [70, 71, 72]
    assert numbers(kept.extend(2, 0, *pair(6, 3))[0]) == list(range(9))
    assert len(kept.tensors()) == 6


def seen(column_mask: list[int], length: int, window: int | None = None) -> list[list[int]]:
    """For each query column, the columns that it sees."""
    mask = segment_mask(torch.tensor([column_mask], dtype=torch.bool), length, window)
    assert mask.shape == (1, 1, length, len(column_mask)) and mask.dtype == torch.bool
    return [row.nonzero()[:, 0].tolist() for row in mask[0, 0]]


def test_mask_is_causal_over_real_columns() -> None:
    assert seen([1, 1, 1, 1], 4) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert seen([1, 1, 1, 1, 1], 2) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_a_masked_column_sees_itself_too_and_nothing_sees_it() -> None:
    assert seen([0, 0, 1, 1], 4) == [[0], [1], [2], [2, 3]]
    assert seen([1, 1, 0, 1, 0], 3) == [[0, 1, 2], [0, 1, 3], [0, 1, 3, 4]]


def test_window_counts_real_columns() -> None:
    assert seen([1, 1, 1, 1, 1], 5, window=2) == [[0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert seen([0, 1, 0, 1, 0, 1], 1, window=2) == [[3, 5]]
    assert seen([1, 1, 1], 1, window=9) == [[0, 1, 2]]


def test_saliency_is_the_last_row_of_the_attention_map() -> None:
    torch.manual_seed(0)
    query, keys = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 7, 8)
    mask = segment_mask(torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7], dtype=torch.bool), 3)
    logits = query @ keys.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    maps = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    expected = maps[:, :, -1].mean(1)[:, :5]
    torch.testing.assert_close(last_row_saliency(query, keys, mask, 0.3, 5), expected)
    assert last_row_saliency(query, keys, mask, 0.3, 5)[0, 0] == 0
