"""The parts of a latent step, each chosen by name in a recipe and open to a user's own file (`--plugin`).

    feedback    what a step feeds back of the pass before it: columns of text        (B,W,D)
    selection   which image columns it takes: a ranking of those that are left       (B,P), in `select`
    weighting   how they enter: as they are, or times a weight                       (B,K)
    auxiliary   what is added to the loss, row by row                                (B,)

A part sees a `Reading` or a `Trace` and nothing else of the pipeline; docs/new_method.md adds one.
Shapes: B rows, P question columns, T columns so far, K patches a step, D hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.data.batch import Batch
from pipeline.registry import Registry, described, expect_call, expect_subclass

if TYPE_CHECKING:
    from pipeline.latent.forward import Trace


@dataclass(frozen=True)
class Reading:
    """What a pass shows at the column that ends it."""

    step: int
    """From 0"""
    batch: Batch
    prompt_embeds: Tensor
    """(B,P,D) input embeddings of the question, image columns included"""
    passes: tuple[Tensor, ...]
    """Final hidden states (B,L,D) of every pass so far, after the decoder's last norm"""
    mask: Tensor
    """(B,T) bool, real columns so far"""
    tip: Tensor
    """(B,D) h of the paper: the final hidden state of the row's last real column"""
    saliency: Tensor
    """(B,P) s of the paper, fp32: the last row's attention, mean over layers and heads"""
    layers: Tensor | None = None
    """(B,N,D) hidden states of the decoder's last N layers at that column, N as the feedback's `read_layers` says; the
    last of them is `tip`, after the decoder's last norm, the others come before it.  None where it says nothing"""

    @property
    def first(self) -> bool:
        """Whether this is the first latent step, before which nothing but the question was read; of all rows alike."""
        return self.step == 0

    @property
    def hidden(self) -> Tensor:
        """Final hidden states of all columns so far, (B,T,D)."""
        return torch.cat(self.passes, dim=1)

    @property
    def tips(self) -> Tensor:
        """h of every pass so far, (B,step+1,D): where the question ended and where each step did; the last is `tip`."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device) * self.mask
        ends = accumulate(hidden.shape[1] for hidden in self.passes)
        last = torch.stack([places[:, :end].amax(1) for end in ends], dim=1)
        return self.hidden.gather(1, last[..., None].expand(-1, -1, self.tip.shape[-1]))

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """Final hidden states of each row's last `count` real columns, newest last.

        Returns them (B,count,D) and which of them there are (B,count) bool; `count` is at most T.
        """
        order = self.mask.long().argsort(dim=1, stable=True)[:, -count:]
        return self.hidden.gather(1, order[..., None].expand(-1, -1, self.tip.shape[-1])), self.mask.gather(1, order)

    def to(self, dtype: torch.dtype) -> Reading:
        """The same in the type of a part's own parameters; itself where that is no other."""
        if dtype == self.tip.dtype:
            return self
        return replace(self._map(lambda hidden: hidden.to(dtype)), prompt_embeds=self.prompt_embeds.to(dtype))

    def forget(self) -> Reading:
        """The same without hidden states, which would be held until backward."""
        return replace(self, passes=(), tip=self.tip[:0], layers=None)

    def detach(self) -> Reading:
        """The same without a graph (`latent_grad: detach`)."""
        return replace(self._map(Tensor.detach), saliency=self.saliency.detach())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Reading:
        """The same with other hidden states."""
        layers = None if self.layers is None else function(self.layers)
        return replace(self, passes=tuple(map(function, self.passes)), tip=function(self.tip), layers=layers)


def expect(result: Any, shape: Sequence[int], device: torch.device, part: str) -> None:
    """Raise UserError where a part returned anything else: torch would stretch it, or fail far from here."""
    shape = tuple(shape)
    if not isinstance(result, Tensor) or result.is_complex():
        raise UserError(f"{part} returned {described(result)} in place of a real tensor {shape}")
    if tuple(result.shape) != shape:
        raise UserError(f"{part} returned {tuple(result.shape)} in place of {shape}")
    if result.device != device:
        raise UserError(f"{part} returned a tensor on {result.device} in place of {device}, where its inputs are")


# ---- feedback ---------------------------------------------------------------------------------------------------
class Feedback(nn.Module, ABC):
    """What a step feeds back; may have parameters, which are trained, checkpointed and exported with the model."""

    width = 1
    """W: columns that a step feeds back, the same in every step"""
    read_layers: int = 0
    """N: of how many of the decoder's last layers `Reading.layers` holds hidden states; True: of all"""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, reading: Reading) -> Tensor:
        """Input embeddings (B,width,D) of the step's last columns."""


def check_feedback(part: Any) -> None:
    expect_subclass(part, Feedback, "hidden_size")
    expect_call(part.forward, f"{part.__name__}.forward", "self", "reading")
    if type(part.width) is not int or part.width < 0:
        raise ValueError(f"{part.__name__}.width is {described(part.width)}, expected a whole number, 0 or more")
    if not isinstance(part.read_layers, int) or part.read_layers < 0:
        raise ValueError(
            f"{part.__name__}.read_layers is {described(part.read_layers)}, expected a number of layers, or True"
        )


FEEDBACKS: Registry[type[Feedback]] = Registry("feedback", check_feedback)


@FEEDBACKS.add("hidden")
class HiddenState(Feedback):
    """h itself (the paper's latent text; Coconut's continuous thought)."""

    def forward(self, reading: Reading) -> Tensor:
        return reading.tip[:, None]


@FEEDBACKS.add("pause")
class Pause(Feedback):
    """One learned embedding, whatever was read: as many columns, no information."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size)
        self.embedding = nn.Parameter(torch.empty(1, hidden_size).normal_(std=0.02))

    def forward(self, reading: Reading) -> Tensor:
        return self.embedding.to(reading.tip.dtype).expand(len(reading.tip), 1, -1)


@FEEDBACKS.add("none")
class Nothing(Feedback):
    """No text: a step is its image columns alone."""

    width = 0

    def forward(self, reading: Reading) -> Tensor:
        return reading.tip[:, None][:, :0]


# ---- weighting --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Weighting:
    """How chosen image columns enter: (s (B,P), columns (B,K), filled (B,K)) -> factors (B,K), or None for 1."""

    factors: Callable[[Tensor, Tensor, Tensor], Tensor | None]
    gradient: bool = False
    """Whether gradient flows through s; with `latent_grad: bptt` only"""


def check_weighting(part: Any) -> None:
    if not isinstance(part, Weighting):
        raise ValueError(f"expected Weighting(function), got {described(part)}")
    expect_call(part.factors, "its function", "saliency", "columns", "filled")
    if not isinstance(part.gradient, bool):
        raise ValueError(f"gradient is {described(part.gradient)}, expected True or False")


WEIGHTINGS: Registry[Weighting] = Registry("weighting", check_weighting)
WEIGHTINGS.add("copy")(Weighting(lambda saliency, columns, filled: None))


def by_share(saliency: Tensor, columns: Tensor, filled: Tensor) -> Tensor:
    """Each column times its share of the chosen columns' attention; 1 on average."""
    chosen = saliency.gather(1, columns) * filled
    return chosen * filled.sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp(min=1e-12)


WEIGHTINGS.add("weighted")(Weighting(by_share, gradient=True))


# ---- auxiliary loss ---------------------------------------------------------------------------------------------
class Auxiliary(nn.Module, ABC):
    """What is added to the loss of a row; may have parameters, which are trained and checkpointed."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, trace: Trace, batch: Batch) -> Tensor:
        """(B,) fp32: a row's loss, to be added to its mean NLL a token times `latent.auxiliary_weight`."""


def check_auxiliary(part: Any) -> None:
    expect_subclass(part, Auxiliary, "hidden_size")
    expect_call(part.forward, f"{part.__name__}.forward", "self", "trace", "batch")


AUXILIARIES: Registry[type[Auxiliary]] = Registry("auxiliary loss", check_auxiliary)


@AUXILIARIES.add("none")
class NoLoss(Auxiliary):
    def forward(self, trace: Trace, batch: Batch) -> Tensor:
        return batch.latents.new_zeros(len(batch.latents), dtype=torch.float32)


@AUXILIARIES.add("norm")
class NormLoss(Auxiliary):
    """Keeps h as long as the embeddings it stands among: mean over a row's steps of log(|h| / mean |embedding|)^2."""

    def forward(self, trace: Trace, batch: Batch) -> Tensor:
        if not trace.steps:
            return batch.latents.new_zeros(len(batch.latents), dtype=torch.float32)
        real = batch.prompt_mask.float()
        lengths = trace.embeds[0].detach().float().norm(dim=-1)
        usual = (lengths * real).sum(1) / real.sum(1)
        excess = torch.stack([(tip.float().norm(dim=-1) / usual).log() ** 2 for tip in trace.tips[:-1]], dim=1)
        active = torch.stack([step.active for step in trace.steps], dim=1)
        return (excess * active).sum(1) / active.sum(1).clamp(min=1)
