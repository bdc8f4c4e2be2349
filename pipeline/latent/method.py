"""What a latent step is made of: its options, the parts that they name, and what it takes of a backbone.

Shapes: B rows, P question columns, K patches a step, W columns of feedback, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.data.batch import Batch
from pipeline.latent.attention import Pass
from pipeline.latent.parts import AUXILIARIES, FEEDBACKS, WEIGHTINGS, Reading, expect
from pipeline.latent.select import SELECTIONS
from pipeline.loss import LabelHead
from pipeline.registry import Registry, failures_told

if TYPE_CHECKING:
    from pipeline.latent.forward import Trace


class LatentConfig(BaseModel):
    """Options that change the mathematics of a latent step."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    num_patches: int = Field(32, ge=0)
    """K: image columns that each latent step takes (paper: 32 for Qwen2-VL, 64 for Chameleon)."""
    latent_grad: Literal["bptt", "detach"] = "bptt"
    """Whether gradient flows through h into the pass that produced it (bptt) or not (detach: published)."""
    positions: Literal["mrope", "sequential"] = "mrope"
    """The backbone's own positions for the question (mrope), or one-dimensional ones (sequential: published)."""
    patch_order: Literal["position", "score"] = "position"
    """Order of V's columns inside a step."""
    selection: str = "attention"
    """Which patches: those attended to most; controls are random, uniform, least, none; all takes all that are left."""
    feedback: str = "hidden"
    """What a step feeds back: h (hidden), one learned embedding (pause), or no column (none)."""
    weighting: str = "copy"
    """How patches enter: as they are (copy), or times their share of attention, with gradient (weighted)."""
    auxiliary: str = "none"
    """What is added to the loss: none, or norm (keeps h as long as embeddings)."""
    auxiliary_weight: float = Field(1.0, ge=0)

    @field_validator("selection", "feedback", "weighting", "auxiliary")
    @classmethod
    def known(cls, name: str, field: Any) -> str:
        return REGISTRIES[field.field_name].check(name)

    @property
    def patches_taken(self) -> int | None:
        """Patches that a step takes, as far as the image has them; None: all of them."""
        return {"k": self.num_patches, "all": None, "none": 0}[SELECTIONS[self.selection].takes]

    @property
    def step_columns(self) -> int | None:
        """Columns that a step inserts, K + W; None: it depends on the image."""
        return None if self.patches_taken is None else self.patches_taken + FEEDBACKS[self.feedback].width


REGISTRIES: dict[str, Registry[Any]] = {
    "selection": SELECTIONS,
    "feedback": FEEDBACKS,
    "weighting": WEIGHTINGS,
    "auxiliary": AUXILIARIES,
}
"""Option -> the parts that it may name."""


class LatentMethod(nn.Module):
    """The parts that a LatentConfig names, with their parameters."""

    def __init__(self, config: LatentConfig, hidden_size: int, layers: int | None = None) -> None:
        """layers: of the decoder, where it has been built.  Raises UserError for parts that cannot be made."""
        super().__init__()
        self.config, self.weighting = config, WEIGHTINGS[config.weighting]
        with failures_told(f"latent.feedback {config.feedback}"):
            self.feedback = FEEDBACKS[config.feedback](hidden_size)
        with failures_told(f"latent.auxiliary {config.auxiliary}"):
            self.auxiliary = AUXILIARIES[config.auxiliary](hidden_size)
        kind = type(self.feedback)
        if self.feedback.width != kind.width:  # a step's columns are counted before there is a model
            raise UserError(
                f"latent.feedback {config.feedback}: width is {self.feedback.width} in its __init__, {kind.width} in"
                " its class; say it in the class"
            )
        wanted, there = self.feedback.read_layers, layers or 0
        if layers is not None and wanted is not True and wanted > there:
            raise UserError(
                f"latent.feedback {config.feedback} reads {wanted} layers (read_layers), the model has {there}"
            )
        self.read_layers = there if wanted is True else int(wanted)

    @classmethod
    def of(cls, config: LatentConfig, backbone: Backbone) -> LatentMethod:
        """New parts for the backbone's decoder."""
        text = backbone.core.config.get_text_config()
        return cls(config, text.hidden_size, text.num_hidden_layers)

    def columns(self, step: LatentStep, prompt_embeds: Tensor) -> Tensor:
        """What a step inserts, (B,K+W,D): its patches' input embeddings, then its feedback; zero in masked columns."""
        # indexed: backward of `gather` would hold the whole prompt
        rows = torch.arange(len(prompt_embeds), device=prompt_embeds.device)[:, None]
        vision = prompt_embeds[rows, step.columns]
        with failures_told(f"latent.weighting {self.config.weighting}", theirs=True):
            factors = self.weighting.factors(step.reading.saliency, step.columns, step.filled)
        if factors is not None:
            expect(factors, step.columns.shape, vision.device, f"latent.weighting {self.config.weighting}")
            vision = vision * factors[..., None].to(vision.dtype)
        own = next(self.feedback.parameters(), vision).dtype
        with failures_told(f"latent.feedback {self.config.feedback}", theirs=True):
            text = self.feedback(replace(step.reading, prompt_embeds=prompt_embeds).to(own))
        shape = (len(vision), self.feedback.width, vision.shape[-1])
        expect(text, shape, vision.device, f"latent.feedback {self.config.feedback}")
        # filled, not multiplied: what a part makes of an empty slot may be no number
        return torch.cat([vision, text.to(vision.dtype)], dim=1).masked_fill(~step.inserted[..., None], 0)

    def added(self, trace: Trace, batch: Batch) -> Tensor:
        """The auxiliary loss of each row, (B,)."""
        with failures_told(f"latent.auxiliary {self.config.auxiliary}", theirs=True):
            loss = self.auxiliary(trace, batch)
        expect(loss, batch.latents.shape, batch.latents.device, f"latent.auxiliary {self.config.auxiliary}")
        return loss


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
    reading: Reading
    """What the step's parts saw; without a graph where `latent_grad` is detach"""
    inserted: Tensor
    """(B,K+W) bool: real columns that it inserts"""
