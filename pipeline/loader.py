"""Order + shards -> a rank's micro-batches of every step, decoded and tokenised in worker processes.

The loader holds no position: it is asked for steps from a given one on, so resuming costs nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data_prep.errors import UserError
from data_prep.reader import BadSample, ShardIndex
from pipeline.batch import Batch, Row, collate, masked_row
from pipeline.curriculum import CurriculumConfig, StageConfig, stage_of_row, view
from pipeline.order import EMPTY, EpochOrder, rank_share
from pipeline.prompt import OverlongSample, RowBuilder, UnusableSample

LAST_SECONDS = 30
"""How long a worker outlives a SIGTERM that did not come from its rank."""


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
        index: ShardIndex,
        builder: RowBuilder,
        curriculum: CurriculumConfig,
        stage: int,
        share: Share,
        seed: int,
        last_batch: str,
    ) -> None:
        self.index, self.builder, self.curriculum = index, builder, curriculum
        self.stage, self.share, self.seed = stage, share, seed
        self.passes = curriculum.stages[stage].latents
        if curriculum.mix:
            self.passes = max(s.latents for s in curriculum.stages[: stage + 1])
        self.chosen = matching(index, curriculum.stages[stage].where)
        shards = index.records["shard"][self.chosen]
        self._sizes = np.bincount(shards, minlength=len(index.shard_sizes)).tolist()
        samples, batch = len(self.chosen), share.global_batch
        self.steps_per_epoch = samples // batch if last_batch == "drop" else -(-samples // batch)
        if not self.steps_per_epoch:
            raise UserError(
                f"stage {stage}: {samples} training samples fit it, less than one global batch of {batch};"
                " lower train.global_batch or set data.last_batch to pad"
            )
        self._epoch: tuple[int, EpochOrder] | None = None

    def __len__(self) -> int:
        """Steps of the stage."""
        config = self.curriculum.stages[self.stage]
        return config.steps or max(1, round((config.epochs or 0) * self.steps_per_epoch))

    def describe_epoch(self) -> str:
        """What an epoch takes of the split, for the log."""
        taken = min(self.steps_per_epoch * self.share.global_batch, len(self.chosen))
        where = self.curriculum.stages[self.stage].where
        kinds = " and ".join(f"{name} is {' or '.join(values)}" for name, values in where.items())
        fitting = f" the {len(self.chosen)} whose {kinds} (curriculum.stages.where), of" if kinds else ""
        return f"{taken} samples an epoch, of{fitting} {len(self.index)} there are"

    def samples(self, step: int) -> tuple[int, np.ndarray]:
        """(epoch, sample indices of the global batch) of a step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, EpochOrder(self._sizes, self.seed, self.stage, epoch))
        places = self._epoch[1].take(batch * self.share.global_batch, self.share.global_batch)
        return epoch, np.where(places == EMPTY, EMPTY, self.chosen[places])

    def __getitem__(self, step: int) -> list[Batch]:
        epoch, samples = self.samples(step)
        share = self.share
        micro = rank_share(samples, share.rank, share.world, share.micro_batch)
        return [self._collate([self._row(int(i), epoch) for i in rows]) for rows in micro]

    def _collate(self, rows: list[Row]) -> Batch:
        return collate(rows, self.builder.processor.row_format, self.passes)

    def _row(self, sample: int, epoch: int) -> Row:
        stage = self.curriculum.stages[stage_of_row(self.curriculum, self.stage, self.seed, epoch, sample)]
        return training_row(self.index, self.builder, sample, stage, self.curriculum)


def _outlast_signals(worker: int) -> None:
    """A signal to the whole process group asks the rank to stop: its workers go on while it saves, but not for ever."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_term, args=(os.getppid(),), daemon=True).start()


def _end_on_term(rank: int) -> None:
    """End at the rank's own SIGTERM; after somebody else's, `LAST_SECONDS` later at most."""
    if signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        signal.sigtimedwait({signal.SIGTERM}, LAST_SECONDS)
    os._exit(0)


def matching(index: ShardIndex, where: Mapping[str, Collection[str]]) -> np.ndarray:
    """Positions of the samples whose breakdown fields have the values that `where` lists; all without it.

    Reads every sample once if there is something to compare.  A bad sample matches: it is to be counted as bad.
    """
    if not where:
        return np.arange(len(index))

    def matches(position: int) -> bool:
        try:
            fields = index.read(position).fields
        except BadSample:
            return True
        return all(fields.get(name) in values for name, values in where.items())

    return np.array([i for i in range(len(index)) if matches(i)], dtype=np.int64)


def training_row(
    index: ShardIndex, builder: RowBuilder, sample: int, stage: StageConfig, curriculum: CurriculumConfig
) -> Row:
    """The row of a sample as `stage` shows it; a masked row, saying why, for one that cannot be used."""
    if sample == EMPTY:
        return masked_row(builder.processor.row_format)
    try:
        example = index.read(sample)
        shown = view(example.rationale, stage, curriculum.groups, curriculum.count)
        return builder.row(example, index.key(sample), sample, shown.latents, shown.steps)
    except OverlongSample:
        return masked_row(builder.processor.row_format, index.key(sample), overlong=True)
    except (BadSample, UnusableSample) as error:
        reason = error.reason if isinstance(error, BadSample) else str(error)
        return masked_row(builder.processor.row_format, index.key(sample), reason)


def steps_from(dataset: StageSteps, start: int, workers: int) -> Iterator[list[Batch]]:
    """Micro-batches of steps `start`, `start+1`, ... of the stage, in order, whatever the number of workers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            sampler=range(start, len(dataset)),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            worker_init_fn=_outlast_signals,
        )
    )
