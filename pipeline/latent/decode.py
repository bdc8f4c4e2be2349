"""KV-cached latent decoding: the question once, n latent steps, then tokens one by one, for a whole batch.

Every forward feeds new columns only.  Autoregressive steps of a row = its latent steps + generated tokens with eos.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.batch import Batch
from pipeline.latent.attention import MergedSegments
from pipeline.latent.forward import Backbone, LatentConfig, LatentForward, LatentStep, Replay


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


@torch.no_grad()
def generate(
    backbone: Backbone,
    batch: Batch,
    config: LatentConfig,
    *,
    max_new_tokens: int,
    eos_id: int,
    all_finished: Callable[[bool], bool] = bool,
    replay: Replay | None = None,
) -> Generation:
    """Greedy answers to a batch's questions after `batch.passes` latent steps; its targets are not looked at.

    all_finished: whether every rank is done, given that this one is.  Ranks that share parameters (ZeRO-3) must run
    the same number of forwards; a single process needs nothing.
    """
    run = LatentForward(backbone, batch, config, kept=MergedSegments(), replay=replay)
    embeds, positions = run.prompt_embeds, run.prompt_positions
    tips = []
    for _ in range(batch.passes):
        hidden, saliency = run.run_pass(embeds, positions, read=True)
        tips.append(hidden[:, -1])
        embeds, positions = run.take_step(hidden[:, -1], saliency)
    hidden, _ = run.run_pass(embeds, positions, read=False)
    tips.append(hidden[:, -1])
    # a row with fewer latents than the batch is answered from its own last real column
    rows = torch.arange(len(batch.latents), device=hidden.device)
    tip = torch.stack(tips)[batch.latents, rows]

    tokens: list[list[int]] = [[] for _ in rows]
    running = torch.ones_like(batch.latents, dtype=torch.bool)
    for count in range(1, max_new_tokens + 1):
        chosen = backbone.logits(tip).argmax(-1)
        for row in running.nonzero()[:, 0].tolist():
            tokens[row].append(int(chosen[row]))
        running = running & (chosen != eos_id)
        if count == max_new_tokens or all_finished(not running.any()):
            break
        new = running[:, None]
        hidden, _ = run.run_pass(backbone.embed_tokens(chosen[:, None]), run.sequence.grow(new), read=False)
        tip = hidden[:, -1]
    return Generation(tokens, run.steps, run.passes_run)
