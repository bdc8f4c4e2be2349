"""Rows -> aligned, padded, masked tensors.

Rows are left-padded so that the question ends, and the first latent step begins, in the same column of all rows; then
right-padded.  Shapes: B rows, P question columns, R columns of remaining steps, answer and eos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a column without loss."""


@dataclass(frozen=True)
class RowFormat:
    """What of a backbone the row builder and the collator need to know."""

    pad_id: int
    image_token_id: int
    blank_shape: tuple[int, ...]
    """Shape of a blank image's pixel values; those of several images are joined along the first axis."""
    blank_grid: tuple[int, int, int]
    """Its grid."""
    merge: int
    """Cells a side of an image's grid that become one image column."""


@dataclass
class Row:
    """One sample as token ids; or a masked row (no labels), which keeps the slot of a missing or bad one."""

    key: str
    row_id: int
    prompt_ids: Sequence[int]
    prompt_positions: np.ndarray
    """(3, P) positions on the backbone's rotary axes, from 0."""
    target_ids: Sequence[int] = ()
    """Remaining steps + answer + eos, which are labels; before them the tokens that are given."""
    latents: int = 0
    pixel_values: np.ndarray | None = None
    """fp32, all images of the row, as the backbone's vision tower takes them."""
    image_grid: Sequence[tuple[int, int, int]] = ()
    """Per image: cells in time, height, width."""
    dropped_steps: int = 0
    """Trailing steps left out because the row was overlong."""
    bad: str = ""
    """Why the row is masked: reason for the log."""
    overlong: bool = False
    """Masked because it is too long, which is no fault of the sample."""
    given: int = 0
    """How many of the first targets are given and not predicted: what stands between latent steps and text."""


def masked_row(fmt: RowFormat, key: str = "", bad: str = "", overlong: bool = False) -> Row:
    """A row of one pad token and no label: it counts for nothing."""
    return Row(key, 0, [fmt.pad_id], np.zeros((3, 1), dtype=np.int64), bad=bad, overlong=overlong)


@dataclass
class Batch:
    """A micro-batch on one rank; see the module header for shapes."""

    prompt_ids: Tensor
    """(B,P) int64"""
    prompt_mask: Tensor
    """(B,P) bool, real columns"""
    prompt_positions: Tensor
    """(3,B,P) int64"""
    image_mask: Tensor
    """(B,P) bool, image columns of the question"""
    pixel_values: Tensor
    """fp32, images in the rows' order; a blank one where no row has any, so that every rank runs its vision tower"""
    image_grid: Tensor
    """(images, 3) int64"""
    latents: Tensor
    """(B,) int64, latent steps of each row"""
    target_ids: Tensor
    """(B,R) int64"""
    target_mask: Tensor
    """(B,R) bool"""
    row_ids: Tensor
    """(B,) int64, seeds per-row draws"""
    passes: int
    """Latent passes of this step: the largest number any row of any rank has"""
    has_images: bool
    """Whether `pixel_values` are rows' images; else they are the blank one"""
    keys: list[str] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of rows masked because their sample could not be used"""
    dropped_steps: int = 0
    overlong: int = 0
    """Rows masked because they are too long"""
    given: int = 0
    """Target columns from the first on that are given and not predicted"""

    @property
    def labels(self) -> Tensor:
        """(B,R) int64, IGNORE on padding and on given tokens."""
        return self.target_ids.masked_fill(~self.label_mask, IGNORE)

    @property
    def label_mask(self) -> Tensor:
        """(B,R) bool: target columns that are predicted."""
        predicted = torch.arange(self.target_ids.shape[1], device=self.target_ids.device) >= self.given
        return self.target_mask & predicted

    @property
    def columns(self) -> int:
        """Real question and answer columns, for throughput."""
        return int(self.prompt_mask.sum() + self.target_mask.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def collate(rows: Sequence[Row], fmt: RowFormat, passes: int) -> Batch:
    """Align rows to one batch of `passes` latent passes.

    Raises ValueError where a row has more latents than `passes`, its image columns do not match its images, or rows
    differ in how many of their targets are given.
    """
    size = len(rows)
    width = max(len(row.prompt_ids) for row in rows)
    given = max(row.given for row in rows)
    target_width = max(1, max(len(row.target_ids) for row in rows))
    prompt_ids = torch.full((size, width), fmt.pad_id)
    prompt_mask = torch.zeros(size, width, dtype=torch.bool)
    positions = torch.zeros(3, size, width, dtype=torch.int64)
    target_ids = torch.full((size, target_width), fmt.pad_id)
    target_mask = torch.zeros(size, target_width, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row.target_ids and row.given != given:
            raise ValueError(f"{row.key}: {row.given} given tokens in a batch of rows with {given}")
        if row.latents > passes:
            raise ValueError(f"{row.key}: {row.latents} latents in a batch of {passes} passes")
        start, length = width - len(row.prompt_ids), len(row.target_ids)
        prompt_ids[i, start:] = torch.as_tensor(row.prompt_ids)
        prompt_mask[i, start:] = True
        positions[:, i, start:] = torch.from_numpy(row.prompt_positions)
        target_ids[i, :length] = torch.as_tensor(row.target_ids, dtype=torch.int64)
        target_mask[i, :length] = True
        expected = sum(t * h * w for t, h, w in row.image_grid) // fmt.merge**2
        if (found := int((prompt_ids[i, start:] == fmt.image_token_id).sum())) != expected:
            raise ValueError(f"{row.key}: {found} image columns for images of {expected}")
    pixels = [torch.from_numpy(row.pixel_values) for row in rows if row.pixel_values is not None]
    grids = [grid for row in rows for grid in row.image_grid]
    has_images = bool(pixels)
    if not has_images:
        pixels, grids = [torch.zeros(fmt.blank_shape)], [fmt.blank_grid]
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_positions=positions,
        image_mask=(prompt_ids == fmt.image_token_id) & prompt_mask,
        pixel_values=torch.cat(pixels),
        image_grid=torch.tensor(grids, dtype=torch.int64),
        latents=torch.tensor([row.latents for row in rows]),
        target_ids=target_ids,
        target_mask=target_mask,
        row_ids=torch.tensor([row.row_id for row in rows], dtype=torch.int64),
        given=given,
        passes=passes,
        has_images=has_images,
        keys=[row.key for row in rows],
        bad=[(row.key, row.bad) for row in rows if row.bad],
        dropped_steps=sum(row.dropped_steps for row in rows),
        overlong=sum(row.overlong for row in rows),
    )
