"""The latent forward, pass by pass: Q, V1, h1, V2, h2, ..., Vn, hn, R.

Pass p = 0..n-1 ends at the last column so far and yields h_{p+1} (its final hidden state) and s (its attention over the
question's image columns); V_{p+1} are the input embeddings of the K columns with the largest s.  The last pass runs
over the remaining steps R.  Paper section 3; numbers equal those of recomputing every prefix.  `schedules` says which
of the passes build the graph for backward.

Shapes: B rows, P question columns, K patches a step, R target columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.latent.attention import KeptSegments, Pass, segment_mask
from pipeline.latent.method import Backbone, LatentMethod, LatentStep
from pipeline.latent.parts import Reading
from pipeline.latent.select import select_patches, selection_entropy

if TYPE_CHECKING:
    from pipeline.latent.recompute import LayerTape


@dataclass
class Columns:
    """Bookkeeping of columns so far: which are real, and the position of the next one."""

    mask: Tensor
    next_position: Tensor

    def grow(self, new: Tensor) -> Tensor:
        """Append columns with real-column mask `new` (B,L); return their positions (3,B,L)."""
        positions = (self.next_position[:, None] + new.long().cumsum(1) - 1).clamp(min=0)
        self.mask = torch.cat([self.mask, new], dim=1)
        self.next_position = self.next_position + new.long().sum(1)
        return positions.expand(3, -1, -1)


@dataclass
class Trace:
    """All that a latent forward computed."""

    steps: list[LatentStep]
    tips: list[Tensor]
    """n+1 tensors (B,D): final hidden state of the row's last real column after Q, step 1, ..., step n"""
    hidden: list[Tensor]
    """Final hidden states by pass; concatenated they are the final sequence (B,T,D)"""
    target_start: int
    """First column of R in the last pass"""
    embeds: list[Tensor] = field(default_factory=list)
    """Input embeddings by pass"""

    def predictors(self, latents: Tensor) -> Tensor:
        """(B,R,D): the hidden state that predicts each target column.

        R's first token is predicted by the row's own last real column: h of its last step, or the end of Q.
        """
        tips = torch.stack(self.tips, dim=1)
        first = tips.gather(1, latents[:, None, None].expand(-1, 1, tips.shape[-1]))
        return torch.cat([first, self.hidden[-1][:, self.target_start : -1]], dim=1)

    @torch.no_grad()
    def statistics(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over rows for monitoring: latent norm, selection entropy, coverage, and the rows they are over."""
        zero = batch.latents.new_zeros((), dtype=torch.float32)
        sums = {"latent_norm": zero, "selection_entropy": zero, "latent_steps": zero, "coverage": zero}
        for step in self.steps:
            active = step.active.float()
            sums["latent_norm"] = sums["latent_norm"] + (step.latent.detach().float().norm(dim=-1) * active).sum()
            entropy = selection_entropy(step.saliency, step.candidates)
            sums["selection_entropy"] = sums["selection_entropy"] + (entropy * active).sum()
            sums["latent_steps"] = sums["latent_steps"] + active.sum()
            taken = (step.filled & step.active[:, None]).sum(1) / batch.image_mask.sum(1).clamp(min=1)
            sums["coverage"] = sums["coverage"] + taken.sum()
        sums["rows_with_latents"] = ((batch.latents > 0) & batch.image_mask.any(1)).sum().float()
        return sums


Replay = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Test hook: (step, saliency) -> (columns, filled) in place of the selection."""


class LatentForward:
    """One run over a batch, pass by pass; training and decoding share it."""

    def __init__(
        self,
        backbone: Backbone,
        batch: Batch,
        method: LatentMethod,
        kept: KeptSegments | None = None,
        replay: Replay | None = None,
        tape: LayerTape | None = None,
        prompt_embeds: Tensor | None = None,
    ) -> None:
        """prompt_embeds: (B,P,D) where they have been computed; tape: records the layers of every pass."""
        self.backbone, self.batch, self.method, self.replay, self.tape = backbone, batch, method, replay, tape
        self.config = method.config
        self.kept = KeptSegments() if kept is None else kept
        self.prompt_embeds = backbone.embed_prompt(batch) if prompt_embeds is None else prompt_embeds
        positions = batch.prompt_positions
        if self.config.positions == "sequential":
            positions = (batch.prompt_mask.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        self.prompt_positions = positions
        last = positions.masked_fill(~batch.prompt_mask, -1).amax((0, 2))
        self.sequence = Columns(batch.prompt_mask, last + 1)
        self.candidates = batch.image_mask
        self.passes: list[Tensor] = []
        self.embeds: list[Tensor] = []
        self.steps: list[LatentStep] = []
        self.tips: list[Tensor] = []
        self.layers: list[Tensor] = []
        """(B,N,D) by pass, as `tips`: what the last N layers put out, where the method reads it"""

    def run_pass(self, embeds: Tensor, positions: Tensor, read: bool) -> Tensor:
        """Feed the newest columns, embeds (B,L,D); their mask is already in `sequence`.

        read: the pass ends a question or a step, and the next step reads it.  Returns s over the question's columns
        (B,P), or an empty tensor.
        """
        columns = self.prompt_embeds.shape[1] if read else 0
        if self.tape is not None:
            self.tape.start_pass()
        gradient = self.method.weighting.gradient and self.config.latent_grad == "bptt"
        layers = self.method.read_layers if read else 0
        latent = Pass(len(self.passes), self.kept, columns, read_gradient=gradient, read_layers=layers, tape=self.tape)
        hidden = self.backbone.decode(embeds, positions, self.masks(embeds.shape[1]), latent)
        if layers:
            self.layers.append(last_real(latent.take_layers(), self.layers, self.steps))
        self.passes.append(hidden)
        self.embeds.append(embeds)
        return latent.mean_saliency() if read else hidden.new_empty(0)

    def masks(self, length: int) -> dict[str, Tensor]:
        """Masks of the last `length` columns, (B,1,length,T) bool, by kind of layer."""
        mask, window = self.sequence.mask, self.backbone.sliding_window
        masks = {"full_attention": segment_mask(mask, length)}
        if window is not None:
            masks["sliding_attention"] = segment_mask(mask, length, window)
        return masks

    def end_at(self, column: int) -> Tensor:
        """Note column `column` of the last pass as the end of the question or of a step; its hidden state (B,D)."""
        tip = self.passes[-1][:, column].clone()  # a view would hold all of the pass until backward
        self.tips.append(last_real(tip, self.tips, self.steps))
        return self.tips[-1]

    def take_step(self, saliency: Tensor) -> tuple[Tensor, Tensor]:
        """The latent step after a pass: its new columns' embeds (B,K+W,D) and positions (3,B,K+W)."""
        batch, config, step = self.batch, self.config, len(self.steps)
        tip = self.end_at(-1)
        active = batch.latents > step
        columns, filled = self._choose(saliency, step)
        filled = filled & active[:, None]
        width = self.method.feedback.width
        if not width:  # the next pass is read at its last column, which must be a real one
            order = filled.long().argsort(dim=1, stable=True)
            columns, filled = columns.gather(1, order), filled.gather(1, order)
        inserted = torch.cat([filled, active[:, None].expand(-1, width)], dim=1)
        layers = self.layers[-1] if self.layers else None
        reading = Reading(
            step, batch, self.prompt_embeds, tuple(self.passes), self.sequence.mask, tip, saliency, layers
        )
        if config.latent_grad == "detach":
            reading = reading.detach()
        self.steps.append(LatentStep(columns, filled, saliency, self.candidates, tip, active, reading, inserted))
        taken = torch.zeros_like(self.candidates, dtype=torch.int64).scatter_add_(1, columns, filled.long()) > 0
        self.candidates = self.candidates & ~taken
        return self.method.columns(self.steps[-1], self.prompt_embeds), self.sequence.grow(inserted)

    def _choose(self, saliency: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Columns (B,K) that a step takes, and which of the K slots are filled."""
        if self.replay is not None:
            return self.replay(step, saliency)
        return select_patches(
            saliency.detach(),
            self.candidates,
            self.config.num_patches,
            selection=self.config.selection,
            patch_order=self.config.patch_order,
            row_ids=self.batch.row_ids,
            step=step,
        )


def last_real(tip: Tensor, before: Sequence[Tensor], steps: Sequence[LatentStep]) -> Tensor:
    """`tip` (B,...) for rows whose last step inserted a column; for others, what they had `before` that step."""
    if not steps:
        return tip
    return torch.where(steps[-1].inserted.any(1).view(-1, *[1] * (tip.ndim - 1)), tip, before[-1])
