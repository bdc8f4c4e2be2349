"""Order + shards -> a rank's micro-batches of every step, decoded and tokenised in worker processes.

The loader holds no position: it is asked for steps from a given one on, so resuming costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data_prep.errors import UserError
from data_prep.reader import BadSample
from pipeline.curriculum import CurriculumConfig, StageConfig, stage_of_row, view
from pipeline.data.batch import Batch, Row, collate, masked_row
from pipeline.data.matching import matching, read_sound
from pipeline.data.mixture import Index, members_of, record_values
from pipeline.data.order import EMPTY, BatchOrder, DataState, Stream, rank_share
from pipeline.data.workers import loaded
from pipeline.prompt import OverlongSample, RowBuilder, UnusableSample


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this rank computes."""

    rank: int
    world: int
    global_batch: int
    micro_batch: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step, the same on every rank."""
        share = -(-self.global_batch // self.world)
        return -(-share // self.micro_batch)


class StageSteps(Dataset):
    """Map-style: step of a stage -> this rank's micro-batches.  A pure function of its arguments."""

    def __init__(
        self,
        index: Index,
        builder: RowBuilder,
        curriculum: CurriculumConfig,
        stage: int,
        share: Share,
        seed: int,
        last_batch: str,
        group_by_length: int = 0,
        chosen: np.ndarray | None = None,
    ) -> None:
        """group_by_length: `data.group_by_length`; chosen: what `matching` found for the stage, if that is known.

        Raises UserError where too few samples fit the stage.
        """
        self.index, self.builder, self.curriculum = index, builder, curriculum
        self.stage, self.share, self.seed = stage, share, seed
        self.last_batch, self.group_by_length = last_batch, group_by_length
        self.passes = curriculum.stages[stage].latents
        if curriculum.mix:
            self.passes = max(s.latents for s in curriculum.stages[: stage + 1])
        where = curriculum.stages[stage].where
        self.chosen = matching(index, [where])[0] if where and chosen is None else chosen
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "order"}  # its caches stay behind

    @functools.cached_property
    def order(self) -> BatchOrder:
        """Which samples a step has; the same on every rank."""
        members = members_of(self.index)
        streams = []
        for member in members:
            chosen, end = self.chosen, member.first + len(member.index)
            if chosen is not None:
                chosen = chosen[slice(*np.searchsorted(chosen, (member.first, end)))] - member.first
            salt = member.salt if len(members) > 1 else []
            streams.append(Stream(member.index.shard_sizes, self.seed, self.stage, chosen, member.first, salt))
        lengths = functools.partial(expected_columns, self.index, self.builder)
        return BatchOrder(
            streams, [member.weight for member in members], self.share.global_batch, self.last_batch,
            [self.seed, self.stage], self.group_by_length, lengths,
        )  # fmt: skip

    def _check(self) -> None:
        members, order = members_of(self.index), self.order
        nothing = [m.name for m, stream in zip(members, order.streams, strict=True) if not len(stream)]
        if nothing and len(members) > 1:
            raise UserError(*(f"stage {self.stage}: no training sample of {name} fits it" for name in nothing))
        where = dict(self.curriculum.stages[self.stage].where)
        if not order.epoch_samples and where:
            raise UserError(f"stage {self.stage}: 0 training samples fit it, by its curriculum.stages.where {where}")
        if not order.steps_per_epoch:
            raise UserError(
                f"stage {self.stage}: {order.epoch_samples} training samples fit it, less than one global batch of"
                f" {order.batch}; lower train.global_batch or set data.last_batch to pad"
            )

    def __len__(self) -> int:
        """Steps of the stage."""
        config = self.curriculum.stages[self.stage]
        return config.steps or max(1, round((config.epochs or 0) * self.order.steps_per_epoch))

    def describe_epoch(self) -> str:
        """What an epoch takes of the split, for the log."""
        order, members = self.order, members_of(self.index)
        where = self.curriculum.stages[self.stage].where
        kinds = " and ".join(f"{name} is {' or '.join(values)}" for name, values in where.items())
        fitting = f" the {order.epoch_samples} whose {kinds} (curriculum.stages.where), of" if kinds else ""
        said = f"{order.epoch_samples - order.dropped} samples an epoch, of{fitting} {len(self.index)} there are"
        if len(members) > 1:
            cycle = sum(member.weight for member in members)
            parts = zip(members, order.streams, strict=True)
            said += ": " + ", ".join(f"{m.name} {len(stream)} ({m.weight} of {cycle} rows)" for m, stream in parts)
        return said

    def describe_last_batch(self) -> str:
        """What becomes of an epoch's last, incomplete batch, for the log; nothing where none is."""
        if self.order.dropped:
            return f"the last {self.order.dropped} samples of every epoch's order are dropped (data.last_batch)"
        return f"{self.order.padded} slots of every epoch's last batch are padded" if self.order.padded else ""

    def epoch_of(self, step: int) -> int:
        """The epoch in which a step begins; of a mixture, all its samples together are one."""
        return self.order.epoch_of(step)

    def state(self, step: int) -> DataState:
        """How far the data is when `step` steps are done."""
        samples = step * self.share.global_batch
        return DataState(self.stage, self.epoch_of(step), samples, self.seed, self.index.index_hash)

    def samples(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, sample indices of the global batch) of a step."""
        return self.epoch_of(step), self.order.take(step)[1]

    def slots(self, step: int) -> list[list[tuple[int, int]]]:
        """(sample, epoch) of every row of this rank's micro-batches, EMPTY for one that is only a slot."""
        epochs, samples = self.order.take(step)
        share = self.share
        micro = rank_share(np.arange(len(samples)), share.rank, share.world, share.micro_batch)
        epochs, samples = np.append(epochs, 0), np.append(samples, EMPTY)  # what slot EMPTY, the last, refers to
        return [list(zip(samples[rows].tolist(), epochs[rows].tolist(), strict=True)) for rows in micro]

    def __getitem__(self, step: int) -> list[Batch]:
        fmt = self.builder.processor.row_format
        return [collate([self._row(*slot) for slot in slots], fmt, self.passes) for slots in self.slots(step)]

    def _row(self, sample: int, epoch: int) -> Row:
        if sample == EMPTY:
            return masked_row(self.builder.processor.row_format)
        stage = self.curriculum.stages[stage_of_row(self.curriculum, self.stage, self.seed, epoch, sample)]
        return training_row(self.index, self.builder, sample, stage, self.curriculum)


def expected_columns(index: Index, builder: RowBuilder, samples: np.ndarray) -> np.ndarray:
    """About how many columns the rows of samples have, (samples,) int64, from the index records alone.

    The image's columns, which follow from its size, and a column for every 4 bytes of the sample's text.
    """

    def columns_of(width: int, height: int) -> int:
        try:
            return builder.processor.image_columns(width, height) if width and height else 0
        except ValueError:  # no shape for the model: it will be a masked row
            return 0

    widths, heights, sizes = record_values(index, samples, "width", "height", "json_size")
    shapes, which = np.unique(np.stack([widths, heights]), axis=1, return_inverse=True)
    images = np.array([columns_of(int(w), int(h)) for w, h in shapes.T], dtype=np.int64)
    return images[which.reshape(-1)] + sizes // 4


def training_row(
    index: Index, builder: RowBuilder, sample: int, stage: StageConfig, curriculum: CurriculumConfig
) -> Row:
    """The row of a sample as `stage` shows it; a masked row, saying why, for one that cannot be used."""
    if sample == EMPTY:
        return masked_row(builder.processor.row_format)
    try:
        example = read_sound(index, sample)
        shown = view(example.rationale, stage, curriculum.groups, curriculum.count)
        return builder.row(example, index.key(sample), sample, shown.latents, shown.steps)
    except OverlongSample:
        return masked_row(builder.processor.row_format, index.key(sample), overlong=True)
    except (BadSample, UnusableSample) as error:
        reason = error.reason if isinstance(error, BadSample) else str(error)
        return masked_row(builder.processor.row_format, index.key(sample), reason)


def steps_from(dataset: StageSteps, start: int, workers: int) -> Iterator[list[Batch]]:
    """Micro-batches of steps `start`, `start+1`, ... of the stage, in order, whatever the number of workers."""
    return loaded(dataset, range(start, len(dataset)), workers)
