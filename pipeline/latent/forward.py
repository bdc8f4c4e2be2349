"""The latent forward, pass by pass: Q, V1, h1, V2, h2, ..., Vn, hn, R.

Pass p = 0..n-1 ends at the last column so far and yields h_{p+1} (its final hidden state) and s (its attention over the
question's image columns); V_{p+1} are the input embeddings of the K columns with the largest s.  The last pass runs
over the remaining steps R.  Paper section 3; numbers equal those of recomputing every prefix.  `schedules` says which
of the passes build the graph for backward.

Shapes: B rows, P question columns, K patches a step, R target columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.batch import Batch
from pipeline.latent.attention import KeptSegments, Pass, segment_mask
from pipeline.latent.select import select_patches, selection_entropy
from pipeline.loss import LabelHead

if TYPE_CHECKING:
    from pipeline.latent.recompute import LayerTape


class LatentConfig(BaseModel):
    """Options that change the mathematics of a latent step."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_patches: int = Field(32, ge=0)
    """K: image columns that each latent step takes (paper: 32 for Qwen2-VL)."""
    latent_grad: Literal["bptt", "detach"] = "bptt"
    """Whether gradient flows through h into the pass that produced it (bptt) or not (detach: published)."""
    positions: Literal["mrope", "sequential"] = "mrope"
    """The backbone's own positions for the question (mrope), or one-dimensional ones (sequential: published)."""
    patch_order: Literal["position", "score"] = "position"
    """Order of V's columns inside a step."""
    selection: Literal["attention", "random", "uniform", "least", "none"] = "attention"
    """Which patches: those attended to most, or a control."""

    @property
    def patches_taken(self) -> int:
        """Patches that a step takes, as far as the image has them."""
        return 0 if self.selection == "none" else self.num_patches


class Backbone(Protocol):
    """What the forward needs of a model; see `pipeline.backbones`."""

    def embed_tokens(self, ids: Tensor) -> Tensor: ...

    def embed_prompt(self, batch: Batch) -> Tensor: ...

    def position_ids(self, positions: Tensor) -> Tensor: ...

    def decode(self, embeds: Tensor, positions: Tensor, masks: dict[str, Tensor], latent: Pass) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    @property
    def head(self) -> LabelHead: ...

    @property
    def sliding_window(self) -> int | None: ...

    @property
    def core(self) -> Any:
        """The transformers model."""

    vlm: Any
    """The transformers model, or peft's wrapper around it"""


@dataclass
class LatentStep:
    """One latent step of a batch, for reports and tests."""

    columns: Tensor
    """(B,K) question columns taken, in inserted order"""
    filled: Tensor
    """(B,K) bool: slots that hold a patch"""
    saliency: Tensor
    """(B,P) s, fp32"""
    candidates: Tensor
    """(B,P) bool, columns that could still be taken"""
    latent: Tensor
    """(B,D) h, as read (before detach)"""
    active: Tensor
    """(B,) bool: rows that take this step"""


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
    """n+1 tensors (B,D): final hidden state of the column that ends Q, h1, ..., hn"""
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
        config: LatentConfig,
        kept: KeptSegments | None = None,
        replay: Replay | None = None,
        tape: LayerTape | None = None,
        prompt_embeds: Tensor | None = None,
    ) -> None:
        """prompt_embeds: (B,P,D) where they have been computed; tape: records the layers of every pass."""
        self.backbone, self.batch, self.config, self.replay, self.tape = backbone, batch, config, replay, tape
        self.kept = KeptSegments() if kept is None else kept
        self.passes_run = 0
        self.prompt_embeds = backbone.embed_prompt(batch) if prompt_embeds is None else prompt_embeds
        positions = batch.prompt_positions
        if config.positions == "sequential":
            positions = (batch.prompt_mask.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        self.prompt_positions = positions
        last = positions.masked_fill(~batch.prompt_mask, -1).amax((0, 2))
        self.sequence = Columns(batch.prompt_mask, last + 1)
        self.candidates = batch.image_mask
        self.steps: list[LatentStep] = []

    def run_pass(self, embeds: Tensor, positions: Tensor, read: bool) -> tuple[Tensor, Tensor]:
        """Feed the newest columns, embeds (B,L,D); their mask is already in `sequence`.

        Returns hidden (B,L,D) and, with `read`, s over the question's columns (B,P), else an empty tensor.
        """
        columns = self.prompt_embeds.shape[1] if read else 0
        if self.tape is not None:
            self.tape.start_pass()
        latent = Pass(self.passes_run, self.kept, columns, tape=self.tape)
        hidden = self.backbone.decode(embeds, positions, self.masks(embeds.shape[1]), latent)
        self.passes_run += 1
        return hidden, latent.mean_saliency() if read else hidden.new_empty(0)

    def masks(self, length: int) -> dict[str, Tensor]:
        """Masks of the last `length` columns, (B,1,length,T) bool, by kind of layer."""
        mask, window = self.sequence.mask, self.backbone.sliding_window
        masks = {"full_attention": segment_mask(mask, length)}
        if window is not None:
            masks["sliding_attention"] = segment_mask(mask, length, window)
        return masks

    def take_step(self, hidden: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
        """The latent step after a pass: V and h as new columns.

        hidden (B,D) of the pass's last column.  Returns embeds (B,K+1,D) and positions (3,B,K+1).
        """
        batch, config, step = self.batch, self.config, len(self.steps)
        active = batch.latents > step
        if self.replay is not None:
            columns, filled = self.replay(step, saliency)
        else:
            columns, filled = select_patches(
                saliency,
                self.candidates,
                config.num_patches,
                selection=config.selection,
                patch_order=config.patch_order,
                row_ids=batch.row_ids,
                step=step,
            )
        filled = filled & active[:, None]
        self.steps.append(LatentStep(columns, filled, saliency, self.candidates, hidden, active))
        taken = torch.zeros_like(self.candidates, dtype=torch.int64).scatter_add_(1, columns, filled.long()) > 0
        self.candidates = self.candidates & ~taken

        positions = self.sequence.grow(torch.cat([filled, active[:, None]], dim=1))
        text = hidden.detach() if config.latent_grad == "detach" else hidden
        return latent_columns(self.prompt_embeds, self.steps[-1], text), positions


def latent_columns(prompt_embeds: Tensor, step: LatentStep, text: Tensor) -> Tensor:
    """What a step inserts, (B,K+1,D): its patches' input embeddings, then `text` (B,D), h; zero in masked columns."""
    # indexed: backward of `gather` would hold the whole prompt
    rows = torch.arange(len(text), device=text.device)[:, None]
    vision = prompt_embeds[rows, step.columns] * step.filled[..., None].to(text.dtype)
    return torch.cat([vision, (text * step.active[:, None].to(text.dtype))[:, None]], dim=1)
