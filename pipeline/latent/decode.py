"""KV-cached latent decoding of a batch: the question, n latent steps, then transformers' own `generate`.

The n+1 latent passes (the question; V1, h1; ...; Vn, hn) fill one cache.  `generate` predicts from columns that it
feeds itself, and the rows of a batch end at different passes; so each row's last real column (the question's end, or
its own last h) is taken out of the cache and fed again, at its old position, as generate's first new column.  Forward
calls of a batch: 1 + n + tokens.  Autoregressive steps of a row: its latent steps + generated tokens with eos.

Shapes: B rows, T columns that the passes fed, W real columns of the row that has most, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from pipeline.data.batch import Batch
from pipeline.latent.attention import CachedSegments
from pipeline.latent.forward import LatentForward, Replay
from pipeline.latent.method import Backbone, LatentMethod, LatentStep

LOWEST_TEMPERATURE = 1e-6
"""Below it, logits divided by the temperature would leave fp32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the draws come from PyTorch's global generator."""

    temperature: float = 0.0
    """0: the likeliest token"""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability; 1: among all"""
    top_k: int = 0
    """Draw among so many likeliest tokens; 0: among all"""

    def problems(self) -> list[str]:
        """What is wrong with the values, a line each, as options of a command."""
        lines = []
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < float("inf"):
            lines.append(f"--temperature {self.temperature}: expected 0 (greedy) or at least {LOWEST_TEMPERATURE}")
        if not 0 < self.top_p <= 1:
            lines.append(f"--top_p {self.top_p}: expected above 0 and at most 1")
        if self.top_k < 0:
            lines.append(f"--top_k {self.top_k}: expected 0 (all tokens) or more")
        if self.temperature == 0 and (self.top_p != 1 or self.top_k != 0):
            lines.append("--top_p and --top_k choose among draws: give --temperature above 0 too")
        return lines

    def describe(self) -> str:
        """For reports."""
        if self.temperature == 0:
            return "greedy"
        return f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}"


@dataclass(frozen=True)
class Decoding:
    """How answers are written after the latent steps."""

    max_new_tokens: int
    eos_id: int
    sampling: Sampling = Sampling()
    synced: bool = False
    """Ranks share parameters (ZeRO-3): all go on until every rank is done, so that they run as many forwards"""

    def config(self) -> GenerationConfig:
        """The same for transformers' generate."""
        sampling = self.sampling
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            options = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
            }
        # what follows a row's eos is cut off: any id of the vocabulary will do as padding
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens, eos_token_id=self.eos_id, pad_token_id=0, num_beams=1, **options
        )


@dataclass
class Generation:
    """What a batch of prompts was answered with."""

    tokens: list[list[int]]
    """Generated ids by row, eos included where it came"""
    steps: list[LatentStep]
    """Latent steps: which patches each took"""
    forward_calls: int

    def autoregressive_steps(self, row: int) -> int:
        return int(sum(step.active[row] for step in self.steps)) + len(self.tokens[row])


@contextmanager
def no_defaults(model: Any) -> Iterator[None]:
    """Keep a checkpoint's own generation_config.json (sampling, penalties) from filling in what ours leaves open."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def generate(
    backbone: Backbone, batch: Batch, method: LatentMethod, decoding: Decoding, replay: Replay | None = None
) -> Generation:
    """Answers to a batch's questions after `batch.passes` latent steps; of its targets only the given are looked at.

    A question must end in text, whose three axes have one position; and the model must be in eval mode.
    """
    kept = CachedSegments()
    run = LatentForward(backbone, batch, method, kept=kept, replay=replay)
    embeds, positions = run.prompt_embeds, run.prompt_positions
    for _ in range(batch.passes):
        embeds, positions = run.take_step(run.run_pass(embeds, positions, read=True))
    if batch.given:
        embeds = torch.cat([embeds, backbone.embed_tokens(batch.target_ids[:, : batch.given])], dim=1)
        positions = torch.cat([positions, run.sequence.grow(batch.target_mask[:, : batch.given])], dim=2)
    run.run_pass(embeds, positions, read=False)

    # each row is answered from its own last real column
    columns = torch.arange(run.sequence.mask.shape[1], device=embeds.device)
    last = (columns * run.sequence.mask).argmax(1)
    tip = torch.cat(run.embeds, dim=1)[torch.arange(len(last), device=last.device), last]
    mask = kept.take_last(run.sequence.mask)
    before = kept.cache.get_seq_length()
    with no_defaults(backbone.core):
        ids = backbone.vlm.generate(
            input_ids=batch.prompt_ids[:, :0],
            # generate wants the embeddings of all columns, and cuts off those that the cache has
            inputs_embeds=tip[:, None].expand(-1, mask.shape[1], -1),
            attention_mask=mask.long(),
            position_ids=backbone.position_ids((run.sequence.next_position - 1).expand(3, -1)[..., None]),
            past_key_values=kept.cache,
            generation_config=decoding.config(),
            synced_gpus=decoding.synced,
        )
    tokens = [up_to(row, decoding.eos_id) for row in ids.tolist()]
    return Generation(tokens, run.steps, len(run.passes) + kept.cache.get_seq_length() - before)


def up_to(tokens: list[int], end: int) -> list[int]:
    """`tokens` to the first `end`, that included; all where it does not come."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
