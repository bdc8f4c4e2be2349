"""How a latent step's passes are executed: two schedules with the numbers of the definition.

    segmented   every column through the decoder once, in n+1 passes; with `bptt` and `detach`.  Keys and values of
                earlier passes stay in the graph.  With `detach`, checkpointing and no dropout, layers are instead run
                again whole in backward (`recompute`), which keeps no keys and values.
    prepass     n passes without a graph fix V and h, then one ordinary pass over the whole sequence; `detach` only

Cost in forwards of the whole sequence (a backward is two): an ordinary step 3, with checkpointing 4; segmented the
same; prepass one more for its question and latent steps.  Parameter gathers under ZeRO-3 with nothing kept between
passes: segmented n+1 forward and n+1 backward, prepass and whole layers n+1 forward and one backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.data.batch import Batch
from pipeline.latent.attention import CachedSegments, Pass
from pipeline.latent.forward import LatentForward, Replay, Trace, last_real
from pipeline.latent.method import Backbone, LatentMethod
from pipeline.latent.recompute import LayerTape

Wanted = Literal["auto", "segmented", "prepass"]


@dataclass(frozen=True)
class Schedule:
    """A schedule, decided for a run."""

    name: Literal["segmented", "prepass"] = "segmented"
    whole_layers: bool = False
    """segmented: run whole layers again in backward instead of keeping keys and values"""
    reason: str = ""

    def __str__(self) -> str:
        whole = ", whole layers run again in backward" if self.whole_layers else ""
        return f"{self.name}{whole} ({self.reason})"


def choose_schedule(wanted: Wanted, *, latent_grad: str, checkpointing: bool, dropout: bool, gathers: bool) -> Schedule:
    """The schedule of a run.

    dropout: of the decoder's layers; gathers: whether every pass gathers the parameters anew (ZeRO-3 on several ranks,
    not kept between passes).  `prepass` with `bptt` is refused when the config is read.
    """
    if latent_grad == "bptt":
        return Schedule(reason="bptt has no other")
    whole = checkpointing and not dropout
    if wanted == "prepass":
        return Schedule("prepass", reason="asked for")
    if wanted == "segmented":
        return Schedule(whole_layers=whole, reason="asked for")
    if whole:
        return Schedule(whole_layers=True, reason="detach with checkpointing: each layer once forward, once backward")
    if gathers:
        return Schedule("prepass", reason="every pass gathers the parameters: one backward gathers them once")
    return Schedule(reason="parameters stay: a prepass would be a forward more")


def latent_forward(
    backbone: Backbone,
    batch: Batch,
    method: LatentMethod,
    schedule: Schedule | None = None,
    replay: Replay | None = None,
) -> Trace:
    """Question, latent steps and targets; `schedule` (segmented without it) changes no number."""
    schedule = schedule or Schedule()
    if not torch.is_grad_enabled() or (schedule.name == "segmented" and not schedule.whole_layers):
        return _segmented(backbone, batch, method, replay)
    assert method.config.latent_grad == "detach", "the other schedules cut the graph at h"
    return _fixed_then_whole(backbone, batch, method, replay, record=schedule.whole_layers)


def _segmented(backbone: Backbone, batch: Batch, method: LatentMethod, replay: Replay | None) -> Trace:
    run = LatentForward(backbone, batch, method, replay=replay)
    embeds, positions = run.prompt_embeds, run.prompt_positions
    for _ in range(batch.passes):
        embeds, positions = run.take_step(run.run_pass(embeds, positions, read=True))
    start = embeds.shape[1]
    embeds = torch.cat([embeds, backbone.embed_tokens(batch.target_ids)], dim=1)
    positions = torch.cat([positions, run.sequence.grow(batch.target_mask)], dim=2)
    run.run_pass(embeds, positions, read=False)
    run.end_at(start - 1)
    return Trace(run.steps, run.tips, run.passes, start, run.embeds)


def _fixed_then_whole(
    backbone: Backbone, batch: Batch, method: LatentMethod, replay: Replay | None, record: bool
) -> Trace:
    """Passes without a graph fix V and what is read; one pass over the whole sequence has a graph.

    A step's parts run once, with their graph: they may draw, and count.
    record: run the last pass without a graph too, and let the whole pass take over what all passes computed.
    """
    prompt, targets = backbone.embed_prompt(batch), backbone.embed_tokens(batch.target_ids)
    tape = LayerTape() if record else None
    inserted: list[Tensor] = []
    with torch.no_grad():
        run = LatentForward(
            backbone, batch, method, kept=CachedSegments(), replay=replay, tape=tape, prompt_embeds=prompt
        )
        embeds, positions = run.prompt_embeds, run.prompt_positions
        all_positions = [positions]
        for _ in range(batch.passes):
            saliency = run.run_pass(embeds, positions, read=True)
            with torch.enable_grad():
                embeds, positions = run.take_step(saliency)
            inserted.append(embeds)
            all_positions.append(positions)
        all_positions.append(run.sequence.grow(batch.target_mask))
        if tape is not None:
            run.run_pass(torch.cat([embeds, targets], dim=1), torch.cat(all_positions[-2:], dim=2), read=False)
            tape.whole = True

    whole = torch.cat([prompt, *inserted, targets], dim=1)
    if not whole.requires_grad:  # a checkpointed layer has a graph only where its input has one
        whole.requires_grad_()
    masks = run.masks(whole.shape[1])
    hidden = backbone.decode(whole, torch.cat(all_positions, dim=2), masks, Pass(tape=tape))
    for step in run.steps:
        step.reading = step.reading.forget()
    tips: list[Tensor] = []
    end = prompt.shape[1] - 1
    for taken, columns in enumerate([prompt[:, :0], *inserted]):
        end += columns.shape[1]
        tips.append(last_real(hidden[:, end], tips, run.steps[:taken]))
    start = whole.shape[1] - targets.shape[1]
    return Trace(run.steps, tips, [hidden], start, [prompt, *inserted, targets])
