"""Validation on a fixed subset: loss with the remaining steps given, accuracy with everything generated."""

from __future__ import annotations

from dataclasses import dataclass

import deepspeed
import numpy as np
import torch

from data_prep.example import Example
from pipeline.curriculum import CurriculumConfig, StageConfig
from pipeline.data.batch import Batch, collate
from pipeline.data.loader import Share, training_row
from pipeline.data.mixture import Index, members_of
from pipeline.data.order import EMPTY, EpochOrder, rank_share
from pipeline.distributed import total
from pipeline.latent.decode import Decoding
from pipeline.prompt import RowBuilder
from pipeline.scoring.judges import strict_choice
from pipeline.watching.activity import ACTIVITY

SUBSET_SEED = 1
"""Seed of the subset: fixed, so that every run of a data folder validates on the same rows."""


def subset(index: Index, samples: int) -> np.ndarray:
    """Positions of `samples` samples, or of all where there are fewer; of a mixture equally many of each data set."""
    orders = [
        member.first + EpochOrder(member.index.shard_sizes, SUBSET_SEED, 0, 0).take(0, min(samples, len(member.index)))
        for member in members_of(index)
    ]
    turns = sorted((turn, who) for who, order in enumerate(orders) for turn in range(len(order)))
    return np.array([orders[who][turn] for turn, who in turns[:samples]], dtype=np.int64)


@dataclass(frozen=True)
class ValidationSet:
    """A rank's part of the subset; every rank has the same number of batches."""

    batches: list[Batch]
    examples: list[list[Example | None]]

    @classmethod
    def of(
        cls,
        index: Index,
        builder: RowBuilder,
        stage: StageConfig,
        curriculum: CurriculumConfig,
        samples: int,
        share: Share,
    ) -> ValidationSet:
        """`samples` rows as `stage` shows them, as an answer takes them: every row has the stage's latent steps.

        share.micro_batch rows are decoded at once.
        """
        curriculum = curriculum.model_copy(update={"count": "stage"})
        chosen = subset(index, samples)
        batches, examples = [], []
        for rows in rank_share(chosen, share.rank, share.world, share.micro_batch):
            built = [training_row(index, builder, int(i), stage, curriculum) for i in rows]
            batches.append(collate(built, builder.processor.row_format, stage.latents))
            examples.append(
                [
                    None if i == EMPTY or not row.target_ids else index.read(int(i))
                    for i, row in zip(rows, built, strict=True)
                ]
            )
        return cls(batches, examples)


@torch.no_grad()
def validate(
    engine: deepspeed.DeepSpeedEngine,
    data: ValidationSet,
    builder: RowBuilder,
    max_new_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    """Mean NLL a token, accuracy and mean autoregressive steps over all ranks' rows; all ranks call it together.

    Besides, how many rows were asked, and how many could not be: bad ones, and those that are too long.
    """
    decoding = Decoding(max_new_tokens, builder.processor.eos_id, synced=engine.zero_optimization_partition_weights())
    engine.eval()
    nll = labels = right = asked = unusable = steps = 0.0
    for batch, examples in zip(data.batches, data.examples, strict=True):
        batch = batch.to(device)
        with ACTIVITY.part("forward"):
            loss, _ = engine(batch)
        nll, labels = nll + float(loss), labels + int(batch.label_mask.sum())
        unusable += len(batch.bad) + batch.overlong
        with ACTIVITY.part("answer"):
            tokens, taken = engine(batch, answer=decoding)
        for row, example in enumerate(examples):
            if example is None:
                continue
            text = builder.processor.decode(tokens[row])
            asked += 1
            steps += taken[row]
            right += is_right(text, example, builder.config.answer)
    engine.train()
    nll, labels, right, asked, unusable, steps = total([nll, labels, right, asked, unusable, steps], device)
    return {
        "val/loss": nll / max(1, labels),
        "val/accuracy": right / max(1, asked),
        "val/autoregressive_steps": steps / max(1, asked),
        "val/rows": asked,
        "val/unusable_rows": unusable,
    }


def is_right(text: str, example: Example, style: str) -> bool:
    """Strictly scored: the answer sentence names the right choice."""
    return strict_choice(text, len(example.choices), style) == example.answer
