"""The method by its definition, slow and plain: what the latent forward is compared with.

One row at a time, without padding; every pass runs transformers' own model with eager attention over the
whole prefix again, and the scores are read off its attention maps.

Shapes: P question columns, T columns so far, H query heads, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.batch import Row
from pipeline.latent.method import LatentConfig
from tests.pipeline.tiny import family_of

Choice = Callable[[int], list[int]]
"""Step -> the question columns that it takes."""


@dataclass
class NaiveStep:
    columns: list[int]
    """Question columns taken, in inserted order"""
    scores: Tensor
    """(P,) s"""
    gap: float
    """Smallest distance of two scores that decide the choice; near zero it would be a matter of luck"""


class NaiveRow:
    """The final sequence of one row, grown from nothing."""

    def __init__(
        self,
        vlm: Any,
        row: Row,
        config: LatentConfig,
        choice: Choice | None = None,
    ) -> None:
        """choice: takes the place of the selection."""
        self.vlm, self.row, self.config, self.choice = vlm, row, config, choice
        self.family = family_of(vlm)
        ids = torch.tensor(row.prompt_ids)
        self.free = [column for column, token in enumerate(row.prompt_ids) if token == vlm.config.image_token_id]
        self.prompt = self.embed(ids)
        if row.pixel_values is not None:
            columns = dict(zip(self.free, self.family.features(vlm, row), strict=True))
            self.prompt = torch.stack([columns.get(i, embedding) for i, embedding in enumerate(self.prompt)])
        self.embeds = self.prompt
        self.positions = torch.from_numpy(row.prompt_positions)
        if config.positions == "sequential":
            self.positions = torch.arange(len(ids)).expand(3, -1)
        self.steps: list[NaiveStep] = []
        for step in range(row.latents):
            self.take_step(step)

    def embed(self, ids: Tensor) -> Tensor:
        return self.family.embed(self.vlm, ids)

    def append(self, embeds: Tensor) -> None:
        """Columns at the next positions, on all three axes."""
        first = self.positions.max() + 1
        self.embeds = torch.cat([self.embeds, embeds])
        new = torch.arange(first, first + len(embeds)).expand(3, -1)
        self.positions = torch.cat([self.positions, new], dim=1)

    def take_step(self, step: int) -> None:
        hidden, attention = full_pass(self.vlm, self.embeds, self.positions)
        # the last query row, plain mean over layers and heads
        scores = attention[:, :, -1, : len(self.prompt)].mean((0, 1)).detach()
        columns, gap = self.choose(step, scores)
        self.steps.append(NaiveStep(columns, scores, gap))
        self.free = [column for column in self.free if column not in columns]
        latent = hidden[-1].detach() if self.config.latent_grad == "detach" else hidden[-1]
        self.append(torch.stack([*(self.prompt[column] for column in columns), latent]))

    def choose(self, step: int, scores: Tensor) -> tuple[list[int], float]:
        """The columns a step takes, and the smallest distance of two scores that decide it."""
        count, selection, gap = self.config.num_patches, self.config.selection, float("inf")
        by_score = self.config.patch_order == "score"
        if self.choice is not None:
            return self.choice(step), gap
        if selection == "none":
            columns = []
        elif selection == "uniform":
            columns = evenly_spaced(self.free, count)
        else:
            ranked = sorted(self.free, key=lambda column: scores[column].item(), reverse=selection != "least")
            columns = ranked[:count]
            first = 0 if by_score else count - 1  # the order among them counts only where it is kept
            gap = smallest_gap(scores[ranked[first : count + 1]])
        return (columns if by_score else sorted(columns)), gap

    def logits(self) -> Tensor:
        """(T,vocab) of the sequence so far."""
        return self.family.logits(self.vlm, full_pass(self.vlm, self.embeds, self.positions)[0])

    def nll(self) -> Tensor:
        """Negative log-likelihood of each target token; the last column before them predicts the first."""
        start, targets = len(self.embeds), torch.tensor(self.row.target_ids, dtype=torch.int64)
        self.append(self.embed(targets))
        return F.cross_entropy(self.logits()[start - 1 : -1], targets, reduction="none")

    def answer(self, count: int, eos: int) -> list[int]:
        """At most `count` greedy tokens, up to eos."""
        tokens: list[int] = []
        while len(tokens) < count and eos not in tokens:
            tokens.append(int(self.logits()[-1].argmax()))
            self.append(self.embed(torch.tensor(tokens[-1:])))
        return tokens


def evenly_spaced(columns: list[int], count: int) -> list[int]:
    left = len(columns)
    return columns if left <= count else [columns[-(-i * left // count)] for i in range(count)]


def smallest_gap(scores: Tensor) -> float:
    return min((b - a for a, b in itertools.pairwise(scores.sort().values.tolist())), default=float("inf"))


def full_pass(vlm: Any, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Final hidden states (T,D) and attention maps (layers,H,T,T) of a whole prefix."""
    out = run_whole(vlm, embeds, positions)
    return out.last_hidden_state[0], torch.cat(out.attentions)


def last_layers(vlm: Any, embeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """Hidden states (count,D) of the last layers at the last column, as transformers counts them."""
    return torch.cat(run_whole(vlm, embeds, positions).hidden_states)[-count:, -1]


def run_whole(vlm: Any, embeds: Tensor, positions: Tensor) -> Any:
    window = getattr(vlm.config.get_text_config(), "sliding_window", None)
    return family_of(vlm).decode(vlm, embeds, positions, masks(len(embeds), window))


def masks(total: int, window: int | None) -> dict[str, Tensor]:
    """Additive masks (1,1,T,T) by kind of layer."""
    distance = torch.arange(total)[:, None] - torch.arange(total)[None]
    allowed = {"full_attention": distance >= 0}
    if window is not None:
        allowed["sliding_attention"] = (distance >= 0) & (distance < window)
    return {
        kind: torch.zeros(1, 1, total, total).masked_fill(~seen, torch.finfo(torch.float32).min)
        for kind, seen in allowed.items()
    }
