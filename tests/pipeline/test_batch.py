"""Rows become one batch: alignment, padding, masks and labels by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.batch import IGNORE, Row, RowFormat, collate, masked_row

FORMAT = RowFormat(pad_id=9, image_token_id=6, blank_shape=(4, 3), blank_grid=(1, 2, 2), merge=2)


def row(name: str, prompt: list[int], targets: list[int], latents: int = 0, images: int = 0) -> Row:
    """`images` of one column each; positions that count from 10 on."""
    positions = np.arange(10, 10 + len(prompt)) + np.array([[0], [100], [200]])
    pixels = np.full((4 * images, 3), float(len(prompt)), dtype=np.float32) if images else None
    return Row(name, len(prompt), prompt, positions, targets, latents, pixels, [(1, 2, 2)] * images)


ROWS = [row("a", [1, 6, 2], [3, 4], 1, 1), row("b", [5], [7, 8, 9]), row("c", [6, 6, 1, 9], [], 2, 2)]


def test_questions_end_and_answers_begin_together() -> None:
    """A pad token inside a question is a real column."""
    batch = collate(ROWS, FORMAT, 2)
    assert batch.prompt_ids.tolist() == [[9, 1, 6, 2], [9, 9, 9, 5], [6, 6, 1, 9]]
    assert batch.prompt_mask.int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert batch.image_mask.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert batch.target_ids.tolist() == [[3, 4, 9], [7, 8, 9], [9, 9, 9]]
    assert batch.labels.tolist() == [[3, 4, IGNORE], [7, 8, 9], [IGNORE] * 3]
    assert batch.prompt_positions[1].tolist() == [[0, 110, 111, 112], [0, 0, 0, 110], [110, 111, 112, 113]]


def test_the_rest_of_a_batch() -> None:
    batch = collate(ROWS, FORMAT, 2)
    assert (batch.latents.tolist(), batch.row_ids.tolist(), batch.passes) == ([1, 0, 2], [3, 1, 4], 2)
    assert batch.keys == ["a", "b", "c"] and batch.bad == []
    assert batch.image_grid.tolist() == [[1, 2, 2]] * 3
    assert batch.pixel_values[:, 0].tolist() == [3.0] * 4 + [4.0] * 8  # in the rows' order
    assert batch.has_images and batch.columns == 8 + 5


def test_text_only_batch_has_a_blank_image() -> None:
    batch = collate([ROWS[1]], FORMAT, 0)
    assert batch.image_grid.tolist() == [[1, 2, 2]] and batch.pixel_values.tolist() == [[0.0] * 3] * 4
    assert not batch.has_images and not batch.image_mask.any()


def test_masked_rows() -> None:
    batch = collate([masked_row(FORMAT), masked_row(FORMAT, "k", "why"), ROWS[0]], FORMAT, 1)
    assert batch.bad == [("k", "why")] and batch.keys == ["", "k", "a"]
    assert batch.labels[:2].tolist() == [[IGNORE, IGNORE]] * 2 and batch.latents.tolist() == [0, 0, 1]


def test_a_question_of_pad_tokens_that_are_image_tokens() -> None:
    """Padding is no image column, even where both are one token."""
    fmt = replace(FORMAT, pad_id=6)
    batch = collate([ROWS[0], ROWS[1]], fmt, 1)
    assert batch.image_mask.int().tolist() == [[0, 1, 0], [0, 0, 0]]


def test_to_moves_every_tensor() -> None:
    moved = collate(ROWS, FORMAT, 2).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 10 and all(tensor.is_meta for tensor in tensors)
    assert (moved.passes, moved.keys) == (2, ["a", "b", "c"])


def test_more_latents_than_passes_are_refused() -> None:
    with pytest.raises(ValueError, match="c: 2 latents in a batch of 1 passes"):
        collate(ROWS, FORMAT, 1)


def test_image_columns_that_do_not_match_the_images_are_refused() -> None:
    with pytest.raises(ValueError, match="a: 1 image columns for images of 4"):
        collate([replace(ROWS[0], image_grid=[(1, 4, 4)])], FORMAT, 1)


def test_rows_of_different_given_tokens_are_no_batch() -> None:
    rows = [row("a", [5], targets=[7, 8]), replace(row("b", [5], targets=[7, 8]), given=1)]
    with pytest.raises(ValueError, match="a: 0 given tokens in a batch of rows with 1"):
        collate(rows, FORMAT, 0)


def test_given_tokens_are_no_labels() -> None:
    rows = [
        replace(row("a", [5], targets=[7, 8, 9]), given=1),
        masked_row(FORMAT),
        replace(row("b", [5], targets=[6]), given=1),
    ]
    batch = collate(rows, FORMAT, 0)
    assert batch.labels.tolist() == [[IGNORE, 8, 9], [IGNORE] * 3, [IGNORE] * 3]
    assert batch.label_mask.sum() == 2 and batch.target_mask.sum() == 4
